"""Who is admitted next, who is refused, and for how long anybody may have to wait."""

import pytest
from support.plans import small_plan

from engine.admission import WaitingQueue
from engine.api import Job, SamplingParams
from engine.errors import DeadlinePassed, QueueFull
from engine.pace import Pace
from engine.sequence import Kind, Sequence


class Door:
    """A queue, a clock that is set by hand, and a note of who went through."""

    def __init__(self, **plan):
        self.now, self.count, self.num_free = 100.0, 0, 0
        self.pace = Pace((4, 16))
        self.queue = WaitingQueue(small_plan(**plan), self.pace, clock=lambda: self.now)

    def arrive(self, tenant="a", *, priority=0, length=10, deadline_s=None, **sampling):
        self.count += 1
        job = Job(
            request_id=f"{tenant}{self.count}",
            prompt_ids=(1,) * length,
            tenant=tenant,
            priority=priority,
            deadline_s=deadline_s,
            sampling=SamplingParams(**sampling),
        )
        sequence = Sequence(
            kind=Kind.GENERATE, job=job, tokens=[1] * length, num_prompt=length, created_s=self.now
        )
        self.queue.check(sequence, num_free=self.num_free)
        self.queue.enter(sequence)
        return sequence

    def admit(self, cost=10.0):
        sequence = self.queue.first()
        if sequence is not None:
            self.queue.admit(sequence)
            self.queue.charge(sequence.job.tenant, cost)
        return sequence


def test_alone_a_tenant_is_served_by_priority_then_by_age():
    door = Door()
    waiting = [door.arrive(priority=p) for p in (0, 5, -1, 0)]
    assert [door.admit() for _ in range(4)] == [waiting[i] for i in (2, 0, 3, 1)]
    assert door.admit() is None
    assert door.queue.num_waiting == 0


def test_a_flood_of_one_tenant_does_not_hold_another_up():
    door = Door()
    for _ in range(50):
        door.arrive("flood")
    for _ in range(10):
        door.admit()
    light = door.arrive("light")  # starts level with the flood, and is not ahead of it either
    assert light in [door.admit(), door.admit()]


def test_two_tenants_that_always_wait_get_equal_work():
    door, work = Door(), {"a": 0.0, "b": 0.0}
    for _ in range(200):
        door.arrive("a")
        door.arrive("b")
    for _ in range(100):
        sequence = door.queue.first()
        assert sequence is not None
        cost = 30.0 if sequence.job.tenant == "a" else 10.0
        door.queue.admit(sequence)
        door.queue.charge(sequence.job.tenant, cost)
        work[sequence.job.tenant] += cost
    assert abs(work["a"] - work["b"]) <= 30.0


def test_nobody_saves_up_while_away_and_nobody_pays_for_an_idle_past():
    door = Door()
    for _ in range(20):
        door.arrive("a")
    served = [door.admit(100.0) for _ in range(20)]
    late = [door.arrive("b") for _ in range(3)]
    more = [door.arrive("a") for _ in range(3)]
    order = [door.admit(100.0) for _ in range(6)]
    assert {order[0], order[1]} == {late[0], more[0]}  # b begins level, not 2,000 ahead
    for sequence in (*served, *order):
        assert sequence is not None
        door.queue.leave(sequence)
    first = door.arrive("a")  # everybody had gone: old counters mean nothing
    door.arrive("b")
    assert door.queue.first() is first


def test_a_low_priority_job_waits_no_longer_than_stated():
    door = Door(priority_patience_s=10.0)
    low = door.arrive(priority=9)
    door.now += 11.0
    admitted = 0
    while True:
        for _ in range(3):
            door.arrive(priority=0)
        admitted += 1
        if door.admit() is low:
            break
    assert admitted <= 4  # 4 (m + 1) with none before it


def test_one_that_lost_its_pages_comes_before_its_tenant_s_others():
    door = Door()
    first = door.arrive()
    door.arrive()
    assert door.admit() is first
    first.is_returning = True
    door.queue.add(first)
    assert door.admit() is first


def test_the_queue_is_bounded_by_jobs_and_by_tokens_and_says_when_to_come_back():
    door = Door(max_waiting=3, max_waiting_tokens=100)
    door.pace.prefilled(14, 3.0)  # 3 s for every 16 tokens; 30 wait
    for _ in range(3):
        door.arrive()
    with pytest.raises(QueueFull, match=r"3 requests with 30 tokens wait; at most 3 and 100") as e:
        door.arrive()
    assert e.value.retry_s == pytest.approx(6.0)
    door = Door(max_waiting=10, max_waiting_tokens=100)
    door.arrive(length=90)
    with pytest.raises(QueueFull):
        door.arrive(length=20)
    assert Door(max_waiting_tokens=100).arrive(length=500)  # alone it always may
    door = Door(max_waiting=1)
    door.num_free = 2
    for _ in range(3):
        door.arrive()  # two are about to be admitted
    with pytest.raises(QueueFull):
        door.arrive()


def test_a_full_queue_has_room_for_a_tenant_below_its_share():
    door = Door(max_waiting=4)
    for _ in range(4):
        door.arrive("flood")
    for _ in range(2):
        door.arrive("light")
    with pytest.raises(QueueFull):
        door.arrive("light")
    with pytest.raises(QueueFull):
        door.arrive("flood")
    door.arrive("third")


def test_a_job_that_cannot_end_in_time_is_late():
    door = Door()
    with pytest.raises(DeadlinePassed, match="was not begun"):
        door.arrive(deadline_s=99.0)
    door.pace.decoded(0.5)
    with pytest.raises(DeadlinePassed):
        door.arrive(deadline_s=104.0, min_tokens=9)
    waiting = door.arrive(deadline_s=104.0, min_tokens=7)
    assert not door.queue.is_late(waiting)
    door.now = 101.5  # 7 steps of .4 s, as the refusal doubts the .5
    assert door.queue.is_late(waiting)
    waiting.is_returning = True
    assert not door.queue.is_late(waiting)  # what was begun goes on


def test_tenants_that_have_gone_are_forgotten(monkeypatch):
    monkeypatch.setattr("engine.admission._MOST_KEPT", 10)
    door = Door()
    stays = door.arrive("stays")
    door.admit(1000.0)
    for index in range(50):
        gone = door.arrive(f"t{index}")  # level with the one that stays
        door.admit(0.0)
        door.queue.leave(gone)
    assert len(door.queue._served) <= 11
    assert door.queue.served("stays") == 1000.0
    door.queue.leave(stays)


def test_leaving_is_counted_once_and_for_good():
    door = Door()
    sequences = [door.arrive("a"), door.arrive("b")]
    for sequence in sequences:
        door.queue.leave(sequence)
        door.queue.discard(sequence)
    assert (door.queue.num_waiting, door.queue.num_tokens) == (0, 0)
    assert door.queue.first() is None


def test_the_pace_is_the_least_of_late_by_bucket():
    pace = Pace((16, 256))
    assert pace.least_s(1000, 10) == 0.0  # nothing was measured
    for _ in range(300):
        pace.prefilled(2, 0.004)  # what a cached prefix left over
    assert pace.least_s(256) == 0.0  # says nothing of a whole chunk
    pace.prefilled(256, 0.1)
    pace.prefilled(200, 5.0)  # a hiccup
    assert pace.least_s(516) == pytest.approx(2 * 0.105 + 0.004)
    for _ in range(100):
        pace.prefilled(256, 5.0)  # no hiccup
    assert pace.least_s(256) == pytest.approx(5.0)
    pace.prefilled(256, 0.2)
    assert pace.least_s(256) == 0.2


def test_an_estimate_that_refuses_gives_way():
    """What is refused is never measured: without this, one slow hour would refuse for ever."""
    door = Door()
    door.pace.decoded(60.0)
    refusals = 0
    while refusals < 100:
        try:
            door.arrive(deadline_s=101.0, min_tokens=1)
            break
        except DeadlinePassed as error:
            assert "has 1 s until its deadline and needs" in str(error)
            refusals += 1
    assert 10 < refusals < 25
