"""Group commit: nothing is acknowledged before it is on disk, and one call cannot hurt another."""

import asyncio
import contextlib
import itertools
import sqlite3
import threading
import time
from concurrent.futures import CancelledError, wait

import ml_dtypes
import numpy as np
import pytest

from engine import Capture
from sona.errors import JournalError, Overloaded, RequestNotFound, ShuttingDown
from sona.journal import (
    Choice,
    Correction,
    FeedbackDraft,
    Journal,
    PositionKind,
    Positions,
    RequestRecord,
)
from sona.journal.writer import Writer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path):
    with Journal(path, max_queued=8) as journal:
        journal.record_request(request("r0")).result(10)
        yield journal


def request(request_id, *, prompt_ids=(1,)):
    return RequestRecord(
        tenant="acme",
        principal="ann",
        request_id=request_id,
        model="m",
        base_hash="b",
        created=time.time(),
        prompt_ids=prompt_ids,
        prompt_text=None,
        prompt_vector=None,
        choices=(Choice(text="yes", token_ids=(2,)),),
    )


def feedback(feedback_id, request_id="r0"):
    return FeedbackDraft(
        tenant="acme",
        principal="ann",
        feedback_id=feedback_id,
        request_id=request_id,
        signal=Correction("no"),
        created=time.time(),
    )


def one_position(index):
    capture = Capture(
        hidden=np.zeros((1, 4), ml_dtypes.bfloat16),
        top_ids=np.zeros((1, 4), np.int32),
        top_logprobs=np.zeros((1, 4), np.float32),
        rest_logprob=np.zeros(1, np.float32),
    )
    return Positions(indices=(index,), target_ids=(1,), kinds=(PositionKind.EDIT,), capture=capture)


@contextlib.contextmanager
def busy_disk(path):
    """Hold SQLite's write lock, as a slow disk would hold the writer."""
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()


def until_taken(journal):
    """Wait until the writer has taken what was queued and waits for the lock itself."""
    deadline = time.monotonic() + 10
    while journal.counts().num_queued and time.monotonic() < deadline:
        time.sleep(0.001)
    assert journal.counts().num_queued == 0


def stored_ids(path):
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT feedback_id FROM feedback ORDER BY seq").fetchall()
    connection.close()
    return [feedback_id for (feedback_id,) in rows]


def test_acknowledged_is_visible_to_every_other_connection(journal, path):
    for number in range(20):
        journal.add_feedback(feedback(f"f{number}")).result(10)
        assert stored_ids(path)[-1] == f"f{number}"


def test_nothing_is_acknowledged_before_its_commit(journal, path):
    with busy_disk(path):
        future = journal.add_feedback(feedback("f1"))
        assert not wait([future], timeout=0.2).done
        assert stored_ids(path) == []
    assert future.result(10).record.feedback_id == "f1"
    assert stored_ids(path) == ["f1"]


def test_an_answers_feedback_may_overtake_the_commit_of_its_request(journal, path):
    with busy_disk(path):
        journal.record_request(request("r1", prompt_ids=(5, 6)))
        assert journal.request("acme", "r1").prompt_ids == (5, 6)
        assert journal.has_request("acme", "r1")
        future = journal.add_feedback(feedback("f1", "r1"))
    assert future.result(10).record.prompt_ids == (5, 6)


def test_what_waits_shares_one_commit_and_a_refused_call_harms_nobody(journal, path):
    before = journal.counts()
    with busy_disk(path):
        first = journal.add_feedback(feedback("f0"))
        until_taken(journal)
        good = [journal.add_feedback(feedback(f"f{n}")) for n in (1, 2)]
        bad = journal.add_feedback(feedback("f3", "unknown"))
        good.append(journal.add_feedback(feedback("f4")))
    assert [f.result(10).record.feedback_id for f in (first, *good)] == ["f0", "f1", "f2", "f4"]
    with pytest.raises(RequestNotFound):
        bad.result(10)
    assert stored_ids(path) == ["f0", "f1", "f2", "f4"]
    after = journal.counts()
    assert after.num_committed_calls - before.num_committed_calls == 5
    assert after.num_commits - before.num_commits == 1


def test_fifty_clients_of_one_event_loop_need_fewer_commits_than_calls(path):
    async def submit(journal):
        calls = [journal.add_feedback(feedback(f"f{n}")) for n in range(50)]
        return await asyncio.gather(*(asyncio.wrap_future(call) for call in calls))

    with Journal(path) as journal:
        journal.record_request(request("r0")).result(10)
        before = journal.counts().num_commits
        outcomes = asyncio.run(submit(journal))
        assert sorted(o.record.feedback_id for o in outcomes) == sorted(stored_ids(path))
        assert len(outcomes) == 50
        assert journal.counts().num_commits - before < 50


def test_a_full_queue_refuses_at_once_and_recovers(journal, path):
    with busy_disk(path):
        taken = [journal.add_feedback(feedback("f0"))]
        until_taken(journal)
        taken += [journal.add_feedback(feedback(f"f{n}")) for n in range(1, 9)]
        with pytest.raises(Overloaded, match=r"8 calls .* retry"):
            journal.add_feedback(feedback("late"))
        with pytest.raises(Overloaded):
            journal.record_request(request("late"))
        assert not journal.has_request("acme", "late")
        counts = journal.counts()
        assert (counts.num_queued, counts.num_refused_calls) == (8, 2)
    assert len(wait(taken, timeout=10).done) == 9
    assert journal.add_feedback(feedback("late")).result(10).record.feedback_id == "late"
    assert stored_ids(path) == [*(f"f{n}" for n in range(9)), "late"]


def test_the_queue_is_bounded_in_bytes_but_never_refuses_a_lone_call(path):
    large = request("large", prompt_ids=(7,) * 1000)
    with Journal(path, max_queued_bytes=1000) as journal:
        journal.record_request(large).result(10)
        with busy_disk(path):
            journal.record_request(request("r1"))
            until_taken(journal)
            journal.record_request(request("r2"))
            with pytest.raises(Overloaded, match="1000 bytes"):
                journal.record_request(request("r3", prompt_ids=(7,) * 1000))


def test_a_call_cancelled_while_it_waits_is_withdrawn(journal, path):
    with busy_disk(path):
        first = journal.add_feedback(feedback("f0"))
        until_taken(journal)
        second, third = (journal.add_feedback(feedback(f"f{n}")) for n in (1, 2))
        assert second.cancel()
    assert first.result(10) and third.result(10)
    assert stored_ids(path) == ["f0", "f2"]
    with pytest.raises(CancelledError):
        second.result(10)


def test_close_commits_what_waits_and_refuses_what_comes(path):
    journal = Journal(path)
    journal.record_request(request("r0"))
    with busy_disk(path):
        calls = [journal.add_feedback(feedback(f"f{n}")) for n in range(100)]
        closing = threading.Thread(target=journal.close)
        closing.start()
    closing.join(10)
    assert all(call.done() for call in calls)
    assert stored_ids(path) == [f"f{n}" for n in range(100)]
    journal.close()
    for attempt in (
        lambda: journal.add_feedback(feedback("late")),
        lambda: journal.record_request(request("late")),
        lambda: journal.feedback("acme", "f0"),
    ):
        with pytest.raises(ShuttingDown):
            attempt()


def test_a_foreign_lock_is_reported_and_the_writer_goes_on(path, monkeypatch):
    monkeypatch.setattr("adapters.store.sqlite._BUSY_TIMEOUT_S", 0.05)
    with Journal(path) as journal:
        journal.record_request(request("r0")).result(10)
        with busy_disk(path), pytest.raises(JournalError, match="no other program"):
            journal.add_feedback(feedback("f0")).result(10)
        assert journal.counts().num_failed_commits == 1
        assert journal.add_feedback(feedback("f1")).result(10).record.feedback_id == "f1"
        assert stored_ids(path) == ["f1"]


def test_a_call_that_breaks_halfway_leaves_nothing_and_harms_nobody(journal, path):
    no_integer = one_position(2**70)
    with busy_disk(path):
        good = [journal.add_feedback(feedback("f0"))]
        until_taken(journal)
        broken = journal.add_feedback(feedback("f1"), no_integer)  # fails after its feedback row
        good.append(journal.add_feedback(feedback("f2")))
    with pytest.raises(OverflowError):
        broken.result(10)
    assert len([call.result(10) for call in good]) == 2
    assert stored_ids(path) == ["f0", "f2"]


def test_a_failed_group_is_undone_and_the_writer_goes_on(journal, path):
    def rename(old, new):
        connection = sqlite3.connect(path)
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
        connection.close()

    rename("positions", "away")
    with pytest.raises(JournalError, match="no such table"):
        journal.add_feedback(feedback("f0"), one_position(0)).result(10)
    rename("away", "positions")
    outcome = journal.add_feedback(feedback("f0"), one_position(0)).result(10)
    assert not outcome.is_duplicate and stored_ids(path) == ["f0"]
    assert journal.positions(outcome.record.seq).indices == (0,)


def test_the_writer_survives_a_connection_that_cannot_be_opened():
    attempts = iter([sqlite3.connect, None, sqlite3.connect])

    def connect():
        if (attempt := next(attempts)) is None:
            raise OSError("no more files")
        return attempt(":memory:", isolation_level=None, check_same_thread=False)

    writer = Writer(
        connect, lambda error: JournalError(str(error)), max_queued=9, max_queued_bytes=9
    )
    try:
        for words in ("no such table", "no more files"):
            with pytest.raises(JournalError, match=words):
                writer.submit(lambda db: db.execute("SELECT * FROM absent")).result(10)
        assert writer.submit(lambda db: db.execute("SELECT 7").fetchone()).result(10) == (7,)
        assert writer.counts().num_failed_commits == 2
    finally:
        writer.close()


def test_an_idle_journal_moves_its_log_into_the_database(journal, path):
    journal.add_feedback(feedback("f0")).result(10)
    moved, deadline = None, time.monotonic() + 10
    while moved != ("f0",) and time.monotonic() < deadline:
        time.sleep(0.01)
        without_log = sqlite3.connect(f"file:{path}?immutable=1", uri=True)
        with contextlib.suppress(sqlite3.DatabaseError):  # caught in the middle of the move
            moved = without_log.execute("SELECT feedback_id FROM feedback").fetchone()
        without_log.close()
    assert moved == ("f0",)


def forever(monkeypatch):
    """Patient calls wait until something makes them go."""
    monkeypatch.setattr("sona.journal.writer.PATIENCE_S", 3600.0)


def test_requests_are_committed_with_the_feedback_that_follows(path, monkeypatch):
    forever(monkeypatch)
    monkeypatch.setattr("sona.journal.writer._GROUP_S", 60.0)  # one group, however slow
    with Journal(path) as journal:
        requests = [journal.record_request(request(f"r{number}")) for number in range(5)]
        assert journal.request("acme", "r4").prompt_ids == (1,)  # found before its commit
        journal.add_feedback(feedback("f", "r4")).result(10)
        assert all(future.done() for future in requests)
        assert journal.counts().num_commits == 1


def test_requests_alone_are_committed_soon(path):
    with Journal(path) as journal:
        journal.record_request(request("r")).result(10)
        assert journal.counts().num_requests == 1


def test_a_full_queue_does_not_wait(path, monkeypatch):
    forever(monkeypatch)
    with Journal(path, max_queued=3) as journal:
        first, until = journal.record_request(request("r0")), time.monotonic() + 10
        for number in itertools.count(1):
            if first.done() or time.monotonic() > until:
                break
            with contextlib.suppress(Overloaded):
                journal.record_request(request(f"r{number}"))
        assert first.done()


def test_closing_commits_what_waits(path, monkeypatch):
    forever(monkeypatch)
    with Journal(path) as journal:
        waiting = [journal.record_request(request(f"r{number}")) for number in range(3)]
    assert all(future.result(0) is None for future in waiting)
    with Journal(path) as journal:
        assert journal.counts().num_requests == 3
