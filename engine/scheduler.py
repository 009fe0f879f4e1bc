"""Who runs next, and on which pages. Integers and deques; no arrays on a device.

One turn computes at most `step_tokens`, padding included: first one token of every answer under
way, then chunks of prompts with what is left; a slice of learning comes on top. `engine.admission`
says who is admitted; a cached prefix is not computed again. When pages run out, the tenant with
the most pages gives back those of its least important, latest job, which starts again from its
tokens (Kwon 2023, arXiv:2309.06180, section 4.5). Teacher-forced passes take what users leave and
lose their pages first. Who began and lacks a slot on the device keeps its row and pages; a job
whose LoRA has none is not begun before, unless it has lost patience.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.admission import PROMPT_COST, WaitingQueue
from engine.api import LoraRef
from engine.config import EnginePlan
from engine.holdings import Holdings
from engine.pace import Pace
from engine.sequence import Kind, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens [start, start + length) of one sequence."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool  # of what is known: then a single step, or the end, follows


@dataclass(slots=True)
class Step:
    """What one turn computes, in this order."""

    copies: list[tuple[int, int]] = field(default_factory=list)  # from page, to page
    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    reads: list[Sequence] = field(default_factory=list)  # a slice of given tokens each
    capture: Chunk | None = None  # a slice of a teacher-forced pass

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks or self.reads or self.capture)

    def forget(self, sequence: Sequence) -> None:
        """Leave out a sequence that is about to lose its pages."""
        self.copies = [pair for pair in self.copies if pair[1] not in sequence.pages]
        self.decodes = [one for one in self.decodes if one is not sequence]
        self.reads = [one for one in self.reads if one is not sequence]
        self.chunks = [chunk for chunk in self.chunks if chunk.sequence is not sequence]


class Seats(Protocol):
    """The slots that LoRAs have on the device."""

    def find(self, lora: LoraRef) -> int | None:
        """The slot of a resident version."""
        ...

    @property
    def num_available(self) -> int:
        """Slots that nobody uses."""
        ...


class Scheduler:
    """Owner of the queues and of every page a sequence holds."""

    def __init__(
        self,
        plan: EnginePlan,
        pace: Pace,
        *,
        seats: Seats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._seats, self._clock = plan, seats, clock
        self.holdings = Holdings(plan, clock=clock)
        self.queue = WaitingQueue(plan, pace, clock=clock)
        self.running: list[Sequence] = []  # by admission, oldest first
        self.capturing: deque[Sequence] = deque()
        self._rows = list(range(plan.max_num_seqs - 1, -1, -1))
        self._preempted: list[Sequence] = []
        self._late: list[Sequence] = []
        self.num_preemptions = self.num_cached_tokens = 0

    @property
    def has_user_work(self) -> bool:
        """Whether any user waits for anything."""
        return bool(self.queue.num_waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a job. Raises QueueFull, DeadlinePassed."""
        if sequence.kind is Kind.CAPTURE:
            self.capturing.append(sequence)
        else:
            self.queue.check(sequence, num_free=len(self._rows))
            self.queue.enter(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a job, finished or cancelled; its pages and row return now."""
        if sequence.kind is Kind.CAPTURE:
            self._give_back(sequence)
            self.capturing.remove(sequence)
        elif sequence.number:
            self.holdings.keep_warm(sequence)
            self._give_back(sequence)
            if sequence in self.running:
                self.running.remove(sequence)
            self.queue.leave(sequence)

    def take_preempted(self) -> list[Sequence]:
        """Sequences that lost their pages since the last call; what else they hold must go too."""
        taken, self._preempted = self._preempted, []
        return taken

    def take_late(self) -> list[Sequence]:
        """Sequences that were not begun because they could not end in time."""
        taken, self._late = self._late, []
        return taken

    def next(self, *, may_learn: bool) -> Step:
        """The next turn's work with its pages reserved; empty when there is nothing to do."""
        self._admit()
        step = Step()
        self._next_tokens(step)
        room = self._next_reads(step, self._plan.step_tokens - len(step.decodes))
        self._next_chunks(step, room)
        if may_learn or not self.has_user_work:
            step.capture = self._next_capture()
        return step

    def computed(
        self, sequence: Sequence, hidden: np.ndarray, *, cost: float = PROMPT_COST
    ) -> None:
        """The next tokens have keys and values; `hidden` [t, D] are their final states.

        Sums the states, takes the prompt's mean where the prompt ends, lets the prefix cache have
        pages that are full, and charges the tenant `cost` a token.
        """
        size, first = self._plan.page_size, sequence.num_computed
        at, end = first, first + len(hidden)
        while at < end:
            until = min(end, (at // size + 1) * size)
            if at < sequence.num_prompt:
                until = min(until, sequence.num_prompt)
            sequence.add_states(hidden[at - first : until - first])
            at = until
            if at == sequence.num_prompt and sequence.prompt_vector is None:
                assert sequence.vector_sum is not None
                sequence.prompt_vector = sequence.vector_sum / np.float32(at)
            if at % size == 0:
                self.holdings.fill(sequence, at)
        sequence.num_computed = end
        if sequence.kind is not Kind.CAPTURE:
            self.queue.charge(sequence.job.tenant, len(hidden) * cost)

    def fork(self, leader: Sequence, sibling: Sequence) -> bool:
        """Let another answer go on from the leader's prompt, on the same pages.

        False: no row is free; it waits like any other job, and will find the prompt cached.
        """
        sibling.prompt_vector, sibling.head = leader.prompt_vector, leader.head
        sibling.num_cached = leader.num_cached
        self.queue.enter(sibling)
        if not self._rows:
            return False
        self.holdings.share(leader, sibling)
        self._start(sibling)
        return True

    def _admit(self) -> None:
        while self._rows:
            sequence = self.queue.first(self._has_seat)
            if sequence is None:
                return
            if not self._place(sequence):
                return
            if self.queue.is_late(sequence):
                self._give_back(sequence)
                self.queue.discard(sequence)
                self._late.append(sequence)
            else:
                self._start(sequence)

    def _has_seat(self, sequence: Sequence) -> bool:
        """Whether a job can begin: without a slot for its LoRA it would hold a row for nothing."""
        lora = sequence.job.lora
        if lora is None or self._seats.find(lora) is not None:
            return True
        expected = {s.job.lora.identity for s in self.running if s.lacks_lora and s.job.lora}
        return lora.identity in expected or len(expected) < self._seats.num_available

    def _place(self, sequence: Sequence) -> bool:
        """Find pages for all tokens that are known and the next one; cached ones are not taken."""
        self.holdings.match(sequence)
        if self._grow(sequence, len(sequence.tokens) + 1):
            return True
        self._give_back(sequence)
        return False

    def _start(self, sequence: Sequence) -> None:
        self.queue.admit(sequence)
        sequence.row = self._rows.pop()
        if not sequence.admitted_s:
            sequence.admitted_s = self._clock()
        if not sequence.is_returning and not sequence.index:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.num_cached_tokens += sequence.num_cached
        self.running.append(sequence)

    def _next_tokens(self, step: Step) -> None:
        """A token of every answer under way; preempts where its page is missing."""
        for sequence in [s for s in self.running if s.is_decoding]:
            if sequence.row >= 0 and self._hold(sequence, sequence.num_computed + 1, step):
                step.decodes.append(sequence)

    def _next_reads(self, step: Step, room: int) -> int:
        """Slices of given tokens to be scored; returns the room that is left."""
        for sequence in self._by_turn(s for s in self.running if s.is_reading):
            if room < self._plan.slice_tokens:
                break
            step.reads.append(sequence)
            room -= self._plan.slice_tokens
        return room

    def _next_chunks(self, step: Step, room: int) -> None:
        """Chunks of what is known and not computed, in whole shapes that fit into the room."""
        waiting = (s for s in self.running if not s.is_prefilled and not s.lacks_lora)
        for sequence in self._by_turn(waiting):
            sizes = [size for size in self._plan.prefill_buckets if size <= room]
            if not sizes:
                return
            start, target = sequence.num_computed, sequence.prefill_target
            length = min(sizes[-1], target - start)
            if sequence.row >= 0 and self._hold(sequence, start + length, step):
                step.chunks.append(Chunk(sequence, start, length, start + length == target))
                room -= min(size for size in sizes if size >= length)

    def _next_capture(self) -> Chunk | None:
        if not self.capturing:
            return None
        sequence = self.capturing[0]
        if sequence.node is None:
            self.holdings.match(sequence)
        if not self.holdings.grow(sequence, len(sequence.tokens)):
            return None
        start, target = sequence.num_computed, sequence.prefill_target
        length = min(self._plan.slice_tokens, target - start)
        return Chunk(sequence, start, length, is_last=start + length == target)

    def _by_turn(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Least served tenant first, then who is impatient, then by priority, then by age."""
        queue = self.queue

        def rank(s: Sequence) -> tuple[float, bool, int, int]:
            has_patience = not queue.is_impatient(s)
            priority = s.job.priority if has_patience else 0
            return queue.served(s.job.tenant), has_patience, priority, s.number

        return sorted(sequences, key=rank)

    def _hold(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Pages for `num_tokens`, the next one its own to write. False: it lost all it had."""
        while not (self._grow(sequence, num_tokens) and self._own(sequence, step)):
            victim = self._victim()
            step.forget(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _own(self, sequence: Sequence, step: Step) -> bool:
        copy = self.holdings.own(sequence)
        if copy is None and self._take_from_learning():
            copy = self.holdings.own(sequence)
        if copy is not None and copy[0] >= 0:
            step.copies.append(copy)
        return copy is not None

    def _victim(self) -> Sequence:
        """Who gives its pages back: of the tenant that has most, the least important and latest."""
        held = Counter[str]()
        for sequence in self.running:
            held[sequence.job.tenant] += len(sequence.pages)
        ranked = [
            (held[s.job.tenant], s.job.priority, order) for order, s in enumerate(self.running)
        ]
        return self.running[max(ranked)[2]]

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        self.running.remove(sequence)
        sequence.is_returning = True
        self.queue.add(sequence)
        self._preempted.append(sequence)
        self.num_preemptions += 1

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` of a user's sequence; teacher-forced passes yield theirs."""
        if self.holdings.grow(sequence, num_tokens):
            return True
        return self._take_from_learning() and self.holdings.grow(sequence, num_tokens)

    def _take_from_learning(self) -> bool:
        """Whether a teacher-forced pass had pages; it has none any more, and begins again."""
        holders = [sequence for sequence in self.capturing if sequence.pages]
        for sequence in holders:
            self.holdings.give_back(sequence)
        return bool(holders)

    def _give_back(self, sequence: Sequence) -> None:
        self.holdings.give_back(sequence)
        if sequence.row >= 0:
            self._rows.append(sequence.row)
            sequence.row = -1
