"""The scheduler alone, against a model of the pages: what they hold, and who may write to them."""

import random
from collections import Counter

import numpy as np
import pytest
from support.plans import small_plan

from engine.admission import GENERATED_COST
from engine.api import Job, LoraRef, LoraTable, SamplingParams
from engine.errors import DeadlinePassed, QueueFull
from engine.pace import Pace, Slack
from engine.scheduler import Scheduler
from engine.sequence import Kind, Sequence
from engine.slots.residency import Residency

SIZE = 16
LORAS = [LoraRef(f"l{i}", 1, ("l", str(i)), LoraTable({}, {})) for i in range(4)]


class Seats:
    """LoRA slots without a device."""

    def __init__(self, count):
        self._residency = Residency(count + 1)

    @property
    def num_available(self):
        return self._residency.num_available

    def find(self, lora):
        return self._residency.find(lora.identity)

    def take(self, lora):
        if self.find(lora) is None:
            slot = self._residency.vacate()
            if slot is None:
                return 0
            self._residency.settle(lora.identity, slot)
        self._residency.use(lora.identity)
        return self.find(lora) or 0

    def leave(self, lora):
        self._residency.release(lora.identity)


class Yard:
    """A scheduler, a clock set by hand, and what every page would hold on a device.

    A position holds the whole text up to it: reading anything else there is an error.
    """

    def __init__(self, *, seats=4, **plan):
        self.now = 0.0
        self.plan = small_plan(**{"num_pages": 64, "prefill_buckets": (16, 64), **plan})
        self.pace = Pace(self.plan.prefill_buckets)
        self.seats = Seats(seats)
        self.scheduler = Scheduler(self.plan, self.pace, seats=self.seats, clock=lambda: self.now)
        self.held: dict[tuple[int, int], object] = {}
        self.live: list[Sequence] = []
        self.late: list[Sequence] = []
        self.count = 0

    def arrive(self, tokens, *, kind=Kind.GENERATE, n=1, more=(), max_tokens=50, **fields):
        self.count += 1
        job = Job(
            request_id=str(self.count),
            prompt_ids=tuple(tokens),
            sampling=SamplingParams(n=n, max_tokens=max_tokens),
            **{"salt": "s", **fields},
        )
        group = [
            Sequence(
                kind=kind, job=job, tokens=[*tokens, *more], num_prompt=len(tokens), index=index,
                replays_by_decode=self.plan.is_deterministic, created_s=self.now,
            )
            for index in range(n)
        ]  # fmt: skip
        group[0].siblings = tuple(group[1:])
        self.scheduler.add(group[0])
        self.live.append(group[0])
        return group[0]

    def turn(self, draw=lambda: 7, *, may_learn=True):
        """One turn as the worker would carry it out. Returns the step."""
        step = self._begin(may_learn)
        for sequence in step.decodes:
            is_new = not sequence.is_replaying
            self._compute(sequence, 1, cost=GENERATED_COST)
            if is_new:
                self._say(sequence, draw())
        for chunk in step.chunks:
            sequence = chunk.sequence
            self._compute(sequence, chunk.length)
            if chunk.is_last and not sequence.num_generated:
                self._prefilled(sequence, draw)
        if step.capture is not None:
            chunk = step.capture
            self._compute(chunk.sequence, chunk.length)
            if chunk.is_last:
                self.end(chunk.sequence)
        self.check()
        return step

    def _begin(self, may_learn):
        for sequence in list(self.scheduler.running):
            if sequence.lacks_lora:
                sequence.lora_slot = self.seats.take(sequence.job.lora)
        step = self.scheduler.next(may_learn=may_learn)
        for sequence in self.scheduler.take_preempted():
            self._unseat(sequence)
        for sequence in self.scheduler.take_late():
            self.late.append(sequence)
            self.end(sequence)
        self._copy(step.copies)
        self._check_room(step)
        return step

    def run(self, turns=200, **options):
        for _ in range(turns):
            if not self.live:
                return
            self.turn(**options)
        raise AssertionError(f"{len(self.live)} jobs did not end in {turns} turns")

    def end(self, sequence):
        self.scheduler.remove(sequence)
        self._unseat(sequence)
        self.live.remove(sequence)

    def check(self):
        """Every page is free, idle or held; rows are given once."""
        pages, scheduler = self.scheduler.holdings.pages, self.scheduler
        assert pages.num_free + pages.num_idle + pages.num_used == pages.num_pages
        assert pages.num_used == len({page for s in self.live for page in s.pages})
        rows = Counter(s.row for s in scheduler.running)
        assert max(rows.values(), default=1) == 1
        assert all(0 <= row < self.plan.max_num_seqs for row in rows)
        waiting = [s for s in self.live if s.row < 0 and s.kind is not Kind.CAPTURE]
        assert scheduler.queue.num_waiting == len(waiting)
        assert scheduler.queue.num_tokens == sum(len(s.tokens) for s in waiting)

    def _unseat(self, sequence):
        if sequence.lora_slot:
            self.seats.leave(sequence.job.lora)
        sequence.lora_slot = 0

    def _copy(self, pairs):
        before = {
            source: [self.held.get((source, at)) for at in range(SIZE)] for source, _ in pairs
        }
        assert len({target for _, target in pairs}) == len(pairs)
        for source, target in pairs:
            self.held |= {(target, at): text for at, text in enumerate(before[source])}

    def _check_room(self, step):
        buckets = self.plan.prefill_buckets
        padded = sum(min(b for b in buckets if b >= chunk.length) for chunk in step.chunks)
        assert len(step.decodes) + SIZE * len(step.reads) + padded <= self.plan.step_tokens

    def _text(self, sequence, at):
        lora = sequence.job.lora
        space = (sequence.job.salt, None if lora is None else lora.identity)
        return space, tuple(sequence.tokens[: at + 1])

    def _compute(self, sequence, count, **cost):
        """Read everything before the next tokens, write them, and hand their states over."""
        first = sequence.num_computed
        for at in range(first):
            found = self.held.get((sequence.pages[at // SIZE], at % SIZE))
            assert found == self._text(sequence, at), (sequence.request_id, at)
        states = np.empty((count, 1), np.float32)
        for at in range(first, first + count):
            page = sequence.pages[at // SIZE]
            assert not self.scheduler.holdings.pages.is_shared(page), "somebody reads this page"
            self.held[page, at % SIZE] = self._text(sequence, at)
            states[at - first] = sum(sequence.tokens[: at + 1]) % 101
        self.scheduler.computed(sequence, states, **cost)

    def _prefilled(self, sequence, draw):
        sums = np.cumsum(sequence.tokens[: sequence.num_prompt]) % 101
        assert sequence.prompt_vector[0] == pytest.approx(np.mean(sums), rel=1e-5)
        if sequence.kind is not Kind.GENERATE:
            self.end(sequence)
            return
        siblings, sequence.siblings = sequence.siblings, ()
        for sibling in siblings:
            self.live.append(sibling)
            if self.scheduler.fork(sequence, sibling):
                if sibling.job.lora is not None:
                    sibling.lora_slot = self.seats.take(sibling.job.lora)
                self._say(sibling, draw())
        self._say(sequence, draw())

    def _say(self, sequence, token):
        sequence.tokens.append(token)
        if sequence.num_generated >= sequence.job.sampling.max_tokens:
            self.end(sequence)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_mix_reads_what_it_wrote_and_comes_to_rest(seed, is_deterministic):
    rng = random.Random(seed)
    yard = Yard(
        seats=rng.choice([1, 2, 4]), num_pages=rng.choice([18, 24, 40]),
        max_num_seqs=rng.choice([2, 4, 8]), session_pages=rng.choice([0, 8]),
        session_idle_s=3.0, max_waiting=30, is_deterministic=is_deterministic,
        prefill_buckets=(64,) if is_deterministic else (16, 64), step_tokens=72,
    )  # fmt: skip
    refused = 0
    for _ in range(600):
        yard.now += rng.random() * 0.2
        if rng.random() < 0.35 and len(yard.live) < 20:
            refused += not _arrive_by_chance(yard, rng)
        if yard.live and rng.random() < 0.05:
            yard.end(rng.choice(yard.live))
        yard.turn(draw=lambda: rng.randint(2, 60), may_learn=rng.random() < 0.5)
    yard.run(2_000, draw=lambda: rng.randint(2, 60))
    pages = yard.scheduler.holdings.pages
    assert pages.num_used == 0
    # What is cached can be given up: one job may have every page that a context needs.
    whole = yard.arrive([99] * 200, max_tokens=50)
    yard.run(100)
    assert whole.num_generated == 50
    assert is_deterministic or yard.scheduler.num_cached_tokens > 0


def _arrive_by_chance(yard, rng):
    beginning = [rng.choice([5, 6])] * rng.choice([0, 16, 48, 100])
    tokens = beginning + [rng.randint(2, 60) for _ in range(rng.choice([1, 15, 16, 17, 60]))]
    kinds = [Kind.GENERATE, Kind.EMBED, Kind.CAPTURE]
    kind = rng.choices(kinds, [7, 1, 1])[0]
    users = kind is not Kind.CAPTURE
    n = rng.choice([1, 1, 1, 2]) if kind is Kind.GENERATE and yard.plan.max_num_seqs > 1 else 1
    try:
        yard.arrive(
            tokens, kind=kind, n=n, more=[9] * 20 if not users else (),
            max_tokens=rng.randint(1, 60), tenant=rng.choice("abc"), salt=rng.choice("xy"),
            priority=rng.choice([0, 0, 5]), session=rng.choice([None, None, "u", "v"]),
            lora=rng.choice([None, None, *LORAS]) if users else None,
            deadline_s=rng.choice([None, None, yard.now + 2.0]),
        )  # fmt: skip
    except (QueueFull, DeadlinePassed):
        return False
    return True


def test_a_prefix_given_up_while_its_twin_runs_leaves_nothing_behind():
    """Two compute the same page at once; the cached one goes while the other's owner is below."""
    yard = Yard(num_pages=32, step_tokens=272)
    yard.arrive([1] * 32, max_tokens=1)
    yard.run()
    twins = [yard.arrive([1] * 32 + [2] * 20, max_tokens=100) for _ in range(2)]
    yard.turn()
    yard.end(twins[0])
    large = yard.arrive([3] * 250, max_tokens=5)
    for _ in range(40):
        yard.turn()
    for sequence in list(yard.live):
        yard.end(sequence)
    del large
    alone = yard.arrive([4] * 255, max_tokens=1)
    yard.run(20)
    assert alone.num_generated == 1


def test_a_turn_serves_the_least_served_tenant_then_priority_then_age():
    yard = Yard(max_num_seqs=4, step_tokens=68, priority_patience_s=10.0)
    yard.arrive([1] * 60, tenant="busy", max_tokens=30)
    for _ in range(10):
        yard.turn()
    late = yard.arrive([2] * 200, tenant="busy", priority=5)
    first = yard.arrive([3] * 200, tenant="busy", priority=1)
    other = yard.arrive([4] * 60, tenant="new")
    order = []
    for _ in range(8):
        order += [chunk.sequence for chunk in yard.turn().chunks]
    assert order[0] is other
    assert order.index(first) < order.index(late)


def test_who_has_lost_patience_is_computed_before_the_important():
    """Else one that was admitted would hold its row and pages for ever."""
    yard = Yard(max_num_seqs=4, step_tokens=68, priority_patience_s=10.0, num_pages=100)
    low = yard.arrive([1] * 200, priority=9, max_tokens=1)
    seen = 0
    for at in range(200):
        yard.now += 1.0
        if len(yard.live) < 4:
            yard.arrive([2] * 100 + [at % 60] * 20, priority=0, max_tokens=1)
        yard.turn()
        if low not in yard.live:
            break
        seen = at
    assert 5 < seen < 20


def test_the_victim_is_of_the_largest_tenant_the_least_important_and_the_latest():
    yard = Yard(num_pages=20)
    early = yard.arrive([3] * 60, tenant="large", priority=1, max_tokens=150)
    latest = yard.arrive([4] * 60, tenant="large", priority=1, max_tokens=150)
    important = yard.arrive([2] * 60, tenant="large", priority=0, max_tokens=150)
    small = yard.arrive([1] * 60, tenant="small", max_tokens=150)
    preempted = []
    while not preempted:
        yard.turn()
        preempted = [s for s in yard.live if s.is_returning]
    assert preempted == [latest]
    assert {small, important, early} <= set(yard.scheduler.running)


def test_a_generated_token_costs_its_tenant_twice_a_prompt_token():
    yard = Yard()
    yard.arrive([1] * 20, tenant="a", max_tokens=5)
    yard.arrive([2] * 60, tenant="b", max_tokens=2)
    yard.turn()
    yard.turn()
    served = yard.scheduler.queue.served
    assert (served("a"), served("b")) == (20 + 2, 60.0)


def test_what_became_late_while_it_waited_is_not_begun():
    yard = Yard(max_num_seqs=1)
    yard.pace.prefilled(64, 1.0)
    yard.pace.prefilled(16, 1.0)
    yard.arrive([1] * 16, max_tokens=5)
    waiting = yard.arrive([2] * 128, deadline_s=3.0)  # 2 s for its prompt
    yard.turn()
    yard.now = 1.5
    yard.run()
    assert yard.late == [waiting]
    assert not waiting.pages


def test_deterministic_hits_end_with_whole_chunks_and_learning_fills_nothing():
    yard = Yard(is_deterministic=True, prefill_buckets=(64,), num_pages=64)
    yard.arrive([1] * 120, more=[2] * 30, kind=Kind.CAPTURE)
    yard.run()
    first = yard.arrive([1] * 120, max_tokens=1)
    yard.run()
    assert first.num_cached == 0
    second = yard.arrive([1] * 120, max_tokens=1)
    yard.run()
    assert second.num_cached == 64


def test_a_session_s_last_turn_outlives_newer_prompts():
    yard = Yard(num_pages=30, session_pages=10, session_idle_s=60.0)
    yard.arrive([1] * 64, session="talk", max_tokens=1)
    yard.arrive([2] * 64, max_tokens=1)
    yard.run()
    for at in range(10, 16):
        yard.arrive([at] * 200, max_tokens=1)
        yard.run()
    kept = yard.arrive([1] * 64, session="talk", max_tokens=1)
    gone = yard.arrive([2] * 64, max_tokens=1)
    yard.run()
    assert (kept.num_cached, gone.num_cached) == (48, 0)


def test_jobs_without_a_lora_slot_wait_outside_unless_they_lost_patience():
    yard = Yard(seats=1, max_num_seqs=4, priority_patience_s=10.0)
    running = yard.arrive([1] * 20, lora=LORAS[0], max_tokens=100)
    yard.turn()
    others = [yard.arrive([2] * 20, lora=LORAS[1], max_tokens=1) for _ in range(5)]
    plain = yard.arrive([3] * 20, max_tokens=1)
    same = yard.arrive([4] * 20, lora=LORAS[0], max_tokens=1)
    for _ in range(4):
        yard.turn()
    assert plain not in yard.live
    assert same not in yard.live
    assert yard.scheduler.running == [running]
    yard.now = 11.0
    yard.turn()
    assert set(yard.scheduler.running) == {running, *others[:3]}
    yard.run()


def test_a_page_to_copy_is_taken_from_learning_before_any_user_loses_its_own():
    yard = Yard(num_pages=16, max_num_seqs=2)
    yard.arrive([1] * 20, n=2, max_tokens=40)
    learner = yard.arrive([2] * 200, more=[3] * 24, kind=Kind.CAPTURE)
    yard.turn()
    assert yard.scheduler.holdings.pages.num_free == 0
    yard.turn()  # both answers write into the prompt's last page
    assert yard.scheduler.num_preemptions == 0
    assert len(learner.pages) < 14
    yard.run()


def test_a_full_queue_is_shared_by_tokens_too():
    yard = Yard(max_num_seqs=1, max_waiting=1_000, max_waiting_tokens=1_000)
    yard.arrive([1] * 20, tenant="a")
    yard.turn()
    yard.arrive([1] * 200, tenant="b")  # its first
    for _ in range(20):
        try:
            yard.arrive([1] * 200, tenant="a")
        except QueueFull:
            break
    assert yard.scheduler.queue.num_tokens <= 1_000
    yard.arrive([1] * 200, tenant="c")  # whoever filled the rest


def test_the_least_recently_used_of_the_idle_slots_goes():
    residency = Residency(4)
    for key in "abc":
        slot = residency.vacate()
        assert slot is not None
        residency.settle(key, slot)
        residency.use(key)
    assert (residency.vacate(), residency.num_available) == (None, 0)
    residency.use("a")  # once more: now b is the least recent
    for key in "aabc":
        residency.release(key)
    assert residency.num_available == 3
    gone = residency.find("b")
    assert residency.vacate() == gone
    assert residency.find("b") is None
    assert residency.find("a") is not None


def test_learning_has_its_share_of_what_users_take_and_saves_up_one_slice():
    slack = Slack(0.2)
    assert not slack.may_learn
    slack.spent(0.4, 0.0)  # users
    assert slack.may_learn
    slack.spent(0.1, 0.1)
    assert not slack.may_learn  # 0.05 at most is saved up
    users = learning = 0.0
    for _ in range(10_000):
        if slack.may_learn:
            learning += 0.004
            slack.spent(0.014, 0.004)
        else:
            slack.spent(0.01, 0.0)
        users += 0.01
    assert learning / (users + learning) == pytest.approx(0.2, rel=0.05)
