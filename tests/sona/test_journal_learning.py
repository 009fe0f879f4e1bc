"""What the learner reads and leaves in the journal: positions, states, patterns, removal."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.journals import HOUR, NOW, Clock, add, assert_same_positions, positions, request

from engine import Capture, ShapeError
from sona.errors import FeedbackNotFound, InvalidRequest, JournalCorrupt
from sona.journal import (
    Choice,
    Correction,
    FeedbackState,
    Journal,
    Positions,
    Preference,
    Score,
    StateChange,
    Verdict,
)

SECRET = "the launch code is zebra"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def journal(tmp_path, clock):
    with Journal(tmp_path / "journal.db", retention_s=24 * HOUR, clock=clock) as journal:
        yield journal


def scalar(path, sql, *values):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql, values).fetchone()[0]
    finally:
        connection.close()


def test_positions_of_any_layout_come_back_bit_by_bit(journal):
    journal.record_request(request()).result(10)
    plain = positions(range(6), dim=6, num_top=6)
    c = plain.capture
    turned = Positions(
        indices=plain.indices,
        target_ids=plain.target_ids,
        kinds=plain.kinds,
        capture=Capture(c.hidden.T, c.top_ids.T, c.top_logprobs.T, c.rest_logprob[::-1]),
    )
    seq = add(journal, positions=turned).seq
    assert_same_positions(journal.positions(seq), turned)


def test_positions_are_added_and_renewed_later(journal):
    journal.record_request(request()).result(10)
    seq = add(journal, positions=positions((2, 3), seed=1)).seq
    later = positions((0, 3), seed=2)
    journal.add_positions(seq, later, base_hash="base-1").result(10)
    got = journal.positions(seq)
    assert got.indices == (0, 2, 3)
    assert got.capture.hidden[2].tobytes() == later.capture.hidden[1].tobytes()
    with pytest.raises(FeedbackNotFound, match="99"):
        journal.add_positions(99, later, base_hash="base-1").result(10)


def test_positions_of_another_base_model_replace_all(journal):
    journal.record_request(request()).result(10)
    seq = add(journal, positions=positions((0, 1, 2))).seq
    fresh = positions((1,), dim=16)
    vector = np.array([9.0, 8.0], np.float32)
    journal.add_positions(seq, fresh, base_hash="base-2", prompt_vector=vector).result(10)
    assert_same_positions(journal.positions(seq), fresh)
    got = journal.feedback("acme", "f1")
    assert (got.base_hash, got.prompt_vector.tolist()) == ("base-2", [9.0, 8.0])


def test_rows_that_do_not_match_are_refused_before_anything_is_stored():
    good = positions()
    with pytest.raises(ShapeError, match="every one needs 1 rows"):
        Positions(indices=(0,), target_ids=(1,), kinds=good.kinds[:1], capture=good.capture)
    with pytest.raises(ShapeError, match="repeat"):
        Positions(
            indices=(3, 3),
            target_ids=good.target_ids,
            kinds=good.kinds,
            capture=good.capture,
        )


@pytest.mark.parametrize(
    "signal,waits",
    [
        (Correction("x"), True),
        (Verdict(is_pass=True), True),
        (Score(1.0), True),
        (Score(0.99), False),
        (Score(0.0), False),
        (Verdict(is_pass=False), False),
        (Preference("a", "b"), False),
    ],
    ids=str,
)
def test_only_learnable_signals_are_pending(journal, signal, waits):
    journal.record_request(request()).result(10)
    seq = add(journal, signal=signal).seq
    assert [r.seq for r in journal.pending()] == ([seq] if waits else [])
    assert journal.feedback("acme", "f1").signal == signal
    assert journal.counts().num_pending == waits


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_score_outside_its_range_is_refused(value):
    with pytest.raises(InvalidRequest, match="from 0 to 1"):
        Score(value)


def test_pending_is_read_by_cursor(journal):
    journal.record_request(request()).result(10)
    seqs = [add(journal, f"f{n}").seq for n in range(5)]
    journal.set_state(seqs[1:2], StateChange(state=FeedbackState.LEARNED)).result(10)
    idle = StateChange(state=FeedbackState.ACCEPTED, reason="no gate", is_learnable=False)
    journal.set_state(seqs[3:4], idle).result(10)
    assert [r.seq for r in journal.pending(limit=2)] == [seqs[0], seqs[2]]
    assert [r.seq for r in journal.pending(after_seq=seqs[2])] == [seqs[4]]
    assert journal.feedback("acme", "f3").reason == "no gate"


def test_state_change_sets_what_it_names_and_keeps_the_rest(journal):
    journal.record_request(request()).result(10)
    seqs = [add(journal, f"f{n}").seq for n in range(2)]
    learned = StateChange(
        state=FeedbackState.LEARNED,
        adapter="pattern-7",
        version=3,
        reason="edit",
        conflicts_with=("f0", "older"),
        pattern_id=7,
    )
    assert journal.set_state([*seqs, 999], learned).result(10) == 2
    assert (
        journal.set_state([seqs[1]], StateChange(state=FeedbackState.ROLLED_BACK)).result(10) == 1
    )
    first, second = journal.feedback_by_seq(reversed([*seqs, 999]))
    assert (first.state, second.state) == (FeedbackState.LEARNED, FeedbackState.ROLLED_BACK)
    for got in (first, second):
        assert (got.adapter, got.version, got.reason) == ("pattern-7", 3, "edit")
        assert (got.conflicts_with, got.pattern_id) == (("f0", "older"), 7)


def test_pattern_feedback_is_what_the_solver_needs(journal):
    journal.record_request(request()).result(10)
    states = [
        FeedbackState.LEARNED,
        FeedbackState.ACCEPTED,
        FeedbackState.ROLLED_BACK,
        FeedbackState.LEARNED,
    ]
    seqs = [add(journal, f"f{n}", positions=positions(seed=n)).seq for n in range(3)]
    seqs.append(add(journal, "f3").seq)
    add(journal, "f4", pattern_id=8)
    for seq, state in zip(seqs, states, strict=True):
        journal.set_state([seq], StateChange(state=state, pattern_id=7)).result(10)
    found = journal.pattern_feedback(7)
    assert [f.record.seq for f in found] == [seqs[0], seqs[1], seqs[3]]
    assert_same_positions(found[1].positions, positions(seed=1))
    assert found[2].positions is None
    undone = journal.pattern_feedback(7, [FeedbackState.ROLLED_BACK])
    assert [f.record.seq for f in undone] == [seqs[2]]


def test_removal_erases_the_content_for_good(journal, tmp_path):
    journal.record_request(request(prompt=f"prompt: {SECRET}")).result(10)
    marked = positions(dim=64)
    trace = marked.capture.hidden.tobytes()
    seq = add(journal, signal=Correction(f"no: {SECRET}"), positions=marked, comment=SECRET).seq
    journal.purge(NOW + 25 * HOUR).result(10)
    assert journal.remove([seq], reason="asked for").result(10) == 1
    assert journal.remove([seq], reason="again").result(10) == 0
    late = StateChange(state=FeedbackState.LEARNED, version=9)  # a solver that was under way
    assert journal.set_state([seq], late).result(10) == 0
    got = journal.feedback("acme", "f1")
    assert (got.state, got.reason, got.signal) == ("REMOVED", "asked for", Correction(""))
    assert (got.prompt_text, got.prompt_ids, got.prompt_vector) == (None, (), None)
    assert (got.answer, got.comment) == (Choice(text="", token_ids=()), "")
    assert journal.positions(seq) is None
    with pytest.raises(FeedbackNotFound, match="removed"):
        journal.add_positions(seq, marked, base_hash="base-1").result(10)
    journal.close()
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"asked for" in on_disk
    assert SECRET.encode() not in on_disk and trace[:64] not in on_disk


def test_a_feedbacks_number_is_never_used_again(journal, tmp_path):
    journal.record_request(request()).result(10)
    seq = add(journal, positions=positions()).seq
    raw = sqlite3.connect(tmp_path / "journal.db")
    raw.execute("PRAGMA foreign_keys = ON")
    raw.execute("DELETE FROM feedback")
    raw.commit()
    raw.close()
    assert scalar(tmp_path / "journal.db", "SELECT count(*) FROM positions") == 0
    assert add(journal).seq > seq


def test_a_damaged_position_is_named_and_never_returned(journal, tmp_path):
    journal.record_request(request()).result(10)
    seq = add(journal, positions=positions()).seq
    raw = sqlite3.connect(tmp_path / "journal.db")
    raw.execute("UPDATE positions SET target_id = target_id + 1 WHERE position_index = 1")
    raw.commit()
    raw.close()
    with pytest.raises(JournalCorrupt, match=f"position 1 of feedback {seq}.*backup"):
        journal.positions(seq)


def test_damaged_ids_and_vectors_are_noticed(journal, tmp_path):
    journal.record_request(request()).result(10)
    raw = sqlite3.connect(tmp_path / "journal.db")
    (vector,) = raw.execute("SELECT prompt_vector FROM requests").fetchone()
    raw.execute("UPDATE requests SET prompt_vector = ?", (vector[:-1] + bytes([vector[-1] ^ 1]),))
    raw.commit()
    raw.close()
    with pytest.raises(JournalCorrupt, match="'r1'"):
        journal.request("acme", "r1")


def test_readers_on_many_threads_see_whole_feedback_while_it_is_written(journal):
    journal.record_request(request()).result(10)
    stop = threading.Event()

    def read():
        longest = 0
        while not stop.is_set():
            seqs = [record.seq for record in journal.pending(limit=1000)]
            assert seqs == sorted(set(seqs)) and len(seqs) >= longest
            longest = len(seqs)
        return longest

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(6)]
        for number in range(30):
            add(journal, f"f{number}")
        stop.set()
        assert all(reader.result(10) <= 30 for reader in readers)
    assert len(journal.pending(limit=1000)) == 30
