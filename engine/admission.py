"""Whose job is admitted next: fair between tenants, by priority within one.

Between tenants the least served goes first. A tenant's counter rises by what its jobs cost, 1 for
a prompt token computed and 2 for a token generated; one that comes back after a pause starts at
the least counter of those that are active, so nobody saves up. Sheng 2024 (arXiv:2401.00588,
algorithm 2, virtual token counter).

Within a tenant the lower priority number goes first, then the older job. Every fourth admission
goes to a job that has waited longer than `priority_patience_s`, oldest first: with m such jobs of
its tenant before it, a job is admitted within 4 (m + 1) admissions of the tenant. Once admitted, a
job as old as that goes before every younger one of its tenant.
"""

import heapq
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from engine.config import EnginePlan
from engine.errors import DeadlinePassed, QueueFull
from engine.pace import Pace
from engine.sequence import Kind, Sequence

PROMPT_COST = 1.0
GENERATED_COST = 2.0
_AGED_EVERY = 4  # admissions of a tenant
_LONGEST_RETRY_S = 60.0
_Test = Callable[[Sequence], bool]
_MOST_KEPT = 4_096  # counters, before those that say nothing are dropped


class _Line:
    """The waiting jobs of one tenant."""

    def __init__(self) -> None:
        self.by_age: OrderedDict[Sequence, None] = OrderedDict()  # in order of arrival
        self._by_rank: list[tuple[int, int, Sequence]] = []
        self.num_admitted = 0
        self.num_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.by_age[sequence] = None
        self.num_tokens += len(sequence.tokens)
        if sequence.is_returning:  # it lost its pages: it is the oldest there is
            self.by_age.move_to_end(sequence, last=False)
        heapq.heappush(self._by_rank, (sequence.job.priority, sequence.number, sequence))

    def discard(self, sequence: Sequence) -> None:
        del self.by_age[sequence]
        self.num_tokens -= len(sequence.tokens)

    def first(self, may_go: _Test, is_impatient: _Test) -> Sequence | None:
        """The next one; the line is not empty. None: none of them may go."""
        oldest = next(iter(self.by_age))
        is_turn = self.num_admitted % _AGED_EVERY == _AGED_EVERY - 1
        if is_turn and is_impatient(oldest):
            return oldest
        while self._by_rank[0][2] not in self.by_age:
            heapq.heappop(self._by_rank)
        best = self._by_rank[0][2]
        if may_go(best) or is_impatient(best):
            return best
        ranked = (sequence for _, _, sequence in sorted(self._by_rank) if sequence in self.by_age)
        return next((each for each in ranked if may_go(each) or is_impatient(each)), None)


class WaitingQueue:
    """Owner of the jobs that wait and of what each tenant has been served."""

    def __init__(
        self, plan: EnginePlan, pace: Pace, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._pace, self._clock = plan, pace, clock
        self._lines: dict[str, _Line] = {}
        self._served: dict[str, float] = {}
        self._active: Counter[str] = Counter()  # jobs of a tenant, waiting or running
        self._numbers = 0
        self.num_waiting = 0  # plain numbers, which any thread may read
        self.num_tokens = 0  # to be computed for those that wait

    def check(self, sequence: Sequence, *, num_free: int) -> None:
        """Refuse a new job that there is no room or no time for.

        The first `num_free` jobs are about to be admitted and wait in no queue. A tenant may
        always have its share of the queue, or one job in it, whoever filled the rest.
        Raises QueueFull, DeadlinePassed.
        """
        plan, tenant = self._plan, sequence.job.tenant
        if self.is_late(sequence):
            raise self.too_late(sequence)
        num_waiting = self.num_waiting - num_free
        num_tokens = self.num_tokens + len(sequence.tokens)
        fits = num_waiting < plan.max_waiting and num_tokens <= plan.max_waiting_tokens
        if num_waiting < 0 or not self.num_waiting or fits:
            return
        line = self._lines.get(tenant)
        num_tenants = len(self._lines) + (line is None)
        if line is None or (
            num_tenants > 1
            and len(line.by_age) * num_tenants < plan.max_waiting
            and (line.num_tokens + len(sequence.tokens)) * num_tenants <= plan.max_waiting_tokens
        ):
            return
        wait_s = self._pace.least_s(self.num_tokens)
        raise QueueFull(
            f"{num_waiting} requests with {self.num_tokens} tokens wait; at most "
            f"{plan.max_waiting} and {plan.max_waiting_tokens} may: retry later",
            retry_s=min(max(wait_s, 1.0), _LONGEST_RETRY_S),
        )

    def is_late(self, sequence: Sequence) -> bool:
        """Whether a job that has not begun can no longer end before its deadline.

        What its prompt costs is known once it has its pages, and with them the cached prefix.
        """
        deadline_s = sequence.job.deadline_s
        if deadline_s is None or sequence.is_returning:
            return False
        return self._clock() + self._least_s(sequence) > deadline_s

    def too_late(self, sequence: Sequence) -> DeadlinePassed:
        """What a late job ends with."""
        assert sequence.job.deadline_s is not None
        left_s = sequence.job.deadline_s - self._clock()
        needed_s = self._least_s(sequence)
        if left_s > 0:
            self._pace.refused()
        return DeadlinePassed(
            f"the request has {max(left_s, 0):.3g} s until its deadline and needs "
            f"{needed_s:.3g} s or more; it was not begun: allow more time, or retry when the "
            "server is less busy"
        )

    def _least_s(self, sequence: Sequence) -> float:
        is_generating = sequence.kind is Kind.GENERATE
        num_generated = max(1, sequence.job.sampling.min_tokens) if is_generating else 0
        num_missing = len(sequence.tokens) - sequence.num_computed if sequence.pages else 0
        return self._pace.least_s(num_missing, num_generated)

    def enter(self, sequence: Sequence) -> None:
        """A job arrives. It counts as its tenant's until `leave`."""
        tenant = sequence.job.tenant
        if not self._active:
            self._served.clear()  # nobody is here: nobody is ahead
        if not self._active[tenant]:
            least = min((self._served[name] for name in self._active if name != tenant), default=0)
            if len(self._served) >= _MOST_KEPT:  # who is behind the active ones gets level anyway
                self._served = {
                    n: c for n, c in self._served.items() if n in self._active or c > least
                }
            self._served[tenant] = max(self._served.get(tenant, 0), least)
        self._active[tenant] += 1
        self._numbers += 1
        sequence.number = self._numbers
        self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """Let a job wait, again if it lost its pages."""
        self._lines.setdefault(sequence.job.tenant, _Line()).add(sequence)
        self.num_waiting += 1
        self.num_tokens += len(sequence.tokens)

    def first(self, may_go: _Test = lambda _: True) -> Sequence | None:
        """Who is admitted next, of those that may go; one that is impatient always may."""
        for tenant in sorted(self._lines, key=self._served.__getitem__):
            found = self._lines[tenant].first(may_go, self.is_impatient)
            if found is not None:
                return found
        return None

    def is_impatient(self, sequence: Sequence) -> bool:
        """Whether a job has waited so long that its age counts more than anything else."""
        return self._clock() - sequence.created_s > self._plan.priority_patience_s

    def admit(self, sequence: Sequence) -> None:
        """The job waits no longer: it has a place."""
        self._lines[sequence.job.tenant].num_admitted += 1
        self.discard(sequence)

    def discard(self, sequence: Sequence) -> None:
        """The job waits no longer. One that did not wait is ignored."""
        tenant = sequence.job.tenant
        line = self._lines.get(tenant)
        if line is None or sequence not in line.by_age:
            return
        line.discard(sequence)
        self.num_waiting -= 1
        self.num_tokens -= len(sequence.tokens)
        if not line.by_age:
            del self._lines[tenant]

    def leave(self, sequence: Sequence) -> None:
        """A job has ended, waiting or not."""
        self.discard(sequence)
        tenant = sequence.job.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def charge(self, tenant: str, cost: float) -> None:
        """Something was computed for a job of the tenant."""
        self._served[tenant] += cost

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._served[tenant]
