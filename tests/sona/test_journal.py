"""The journal's promises: what is stored, what is refused, what outlives what."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.journals import HOUR, NOW, Clock, add, assert_same_positions, draft, positions, request

from adapters.store import sqlite
from sona.errors import (
    FeedbackConflict,
    ForeignRequest,
    InvalidRequest,
    JournalCorrupt,
    JournalError,
    RequestExists,
    RequestNotFound,
)
from sona.journal import (
    AdapterSpan,
    Choice,
    Correction,
    FeedbackState,
    Journal,
    Score,
    StateChange,
)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def journal(tmp_path, clock):
    with Journal(tmp_path / "journal.db", retention_s=24 * HOUR, clock=clock) as journal:
        yield journal


def test_request_comes_back_as_it_was(journal):
    want = request()
    journal.record_request(want).result(10)
    got = journal.request("acme", "r1")
    for name in ("tenant", "principal", "request_id", "model", "base_hash", "created"):
        assert getattr(got, name) == getattr(want, name)
    assert got.prompt_ids == (1, 2, 250_000)
    assert got.prompt_text == "When?"
    assert got.choices == want.choices
    assert got.adapter_versions == (AdapterSpan("pattern-3", 4, 0, 2),)
    assert got.prompt_vector.tolist() == [0.5, -1.25, 3.0]
    assert journal.has_request("acme", "r1") and not journal.has_request("acme", "r2")
    with pytest.raises(RequestNotFound, match="learn=false"):
        journal.request("other tenant", "r1")


def test_request_id_is_unique_per_tenant_within_retention(journal, clock):
    journal.record_request(request(prompt="first")).result(10)
    with pytest.raises(RequestExists, match="'r1'"):
        journal.record_request(request(prompt="second")).result(10)
    journal.record_request(request(tenant="other")).result(10)
    assert journal.request("acme", "r1").prompt_text == "first"
    clock.now += 25 * HOUR  # expired, though nobody has purged it
    journal.record_request(request(created=clock.now, prompt="third")).result(10)
    assert journal.request("acme", "r1").prompt_text == "third"


def test_expired_requests_are_gone_at_once_and_purged_in_portions(journal, clock):
    for number in range(5):
        journal.record_request(request(f"r{number}", created=NOW + number * HOUR)).result(10)
    clock.now += 26.5 * HOUR  # r0 to r2 are older than 24 h
    with pytest.raises(RequestNotFound):
        journal.request("acme", "r2")
    assert journal.request("acme", "r3").request_id == "r3"
    assert [journal.purge(limit=2).result(10) for _ in range(3)] == [2, 1, 0]
    assert journal.counts().num_requests == 2


def test_feedback_takes_its_request_along_and_outlives_it(journal, clock):
    journal.record_request(request()).result(10)
    change = {"comment": "please", "metadata": {"ui": "web"}, "choice_index": 1, "pattern_id": 5}
    record = add(journal, positions=positions(), **change)
    clock.now += 25 * HOUR
    assert journal.purge().result(10) == 1
    got = journal.feedback("acme", "f1")
    assert got.seq == record.seq
    assert got.signal == Correction("on Monday")
    assert (got.comment, got.metadata, got.choice_index, got.pattern_id) == tuple(change.values())
    assert (got.prompt_text, got.prompt_ids) == ("When?", (1, 2, 250_000))
    assert got.answer == Choice(text="never", token_ids=(9,))
    assert got.prompt_vector.tolist() == [0.5, -1.25, 3.0]
    assert (got.model, got.base_hash) == ("sona-nano", "base-1")
    assert got.adapter_versions == (AdapterSpan("pattern-3", 4, 0, 2),)
    assert (got.state, got.adapter, got.version) == (FeedbackState.ACCEPTED, None, None)
    assert_same_positions(journal.positions(got.seq), positions())


def test_same_feedback_again_is_a_duplicate_with_the_present_state(journal, clock):
    journal.record_request(request()).result(10)
    seq = add(journal).seq
    journal.set_state([seq], StateChange(state=FeedbackState.LEARNED, version=2)).result(10)
    clock.now += 25 * HOUR
    journal.purge().result(10)  # a late retry needs its request no more
    again = journal.add_feedback(draft(created=clock.now)).result(10)
    assert again.is_duplicate
    assert (again.record.seq, again.record.state, again.record.version) == (seq, "LEARNED", 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"signal": Correction("on Tuesday")},
        {"signal": Score(1.0)},
        {"request_id": "r2"},
        {"choice_index": 1},
        {"comment": "x"},
        {"metadata": {"a": "b"}},
        {"principal": "bob"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_feedback_id_with_other_content_is_a_conflict(journal, changed):
    for request_id in ("r1", "r2"):
        journal.record_request(request(request_id)).result(10)
    seq = add(journal).seq
    with pytest.raises(FeedbackConflict, match="'f1'"):
        journal.add_feedback(draft(**changed), positions()).result(10)
    assert journal.feedback("acme", "f1").signal == Correction("on Monday")
    assert journal.positions(seq) is None


def test_feedback_needs_a_request_of_the_same_tenant_and_principal(journal):
    journal.record_request(request()).result(10)
    journal.record_request(request("r2", tenant="other")).result(10)
    refused = [
        (draft(request_id="r2"), RequestNotFound, "r2"),
        (draft(principal="bob"), ForeignRequest, "another principal"),
        (draft(choice_index=2), InvalidRequest, "2 choices"),
        (draft(choice_index=-1), InvalidRequest, "choice_index is -1"),
    ]
    for attempt, error, words in refused:
        with pytest.raises(error, match=words):
            journal.add_feedback(attempt, positions()).result(10)
    assert sum(journal.counts().num_feedback.values()) == 0
    assert add(journal, tenant="other", request_id="r2").seq > 0  # ids are per tenant


def test_racing_submissions_of_one_id_store_it_once(journal):
    journal.record_request(request()).result(10)
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(journal.add_feedback, draft(), positions()) for _ in range(64)]
        outcomes = [future.result(10).result(10) for future in futures]
    assert sum(not outcome.is_duplicate for outcome in outcomes) == 1
    assert len({outcome.record.seq for outcome in outcomes}) == 1


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "journal.db"
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(JournalCorrupt, match="restore it from a backup"):
        Journal(path)


def test_a_journal_of_a_newer_release_is_refused(tmp_path):
    path = tmp_path / "journal.db"
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(JournalError, match="schema 99"):
        Journal(path)


def test_only_the_owner_can_read_the_files(journal, tmp_path):
    journal.record_request(request()).result(10)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("journal.db", "journal.db-wal", "journal.db-shm"), 0o600)


def test_storage_needs_no_jax():
    code = "import sys, sona.journal, adapters.store, sona.datadir; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


def test_every_connection_syncs_its_commits(journal, tmp_path):
    connection = sqlite.connect(tmp_path / "journal.db")
    pragmas = [
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    ]
    connection.close()
    assert pragmas == ["wal", 2, 1]  # 2 is FULL
