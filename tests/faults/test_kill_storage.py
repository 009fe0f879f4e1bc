"""kill -9 at random points: every acknowledged write is there, whole, and none is there twice.

This file is also the program that gets killed: a few threads write feedback and adapter versions
and say so after each acknowledgement. KILLS_OF_STORAGE sets the number of kills (default 25), in
rounds of 25 with a data directory each. (The program starts often, so pytest stays out of it.)
"""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from adapters.gate import Gate
from adapters.store import AdapterStore, SlotKey, VersionDraft
from engine import Capture, HeadTable
from sona.datadir import DataDir
from sona.journal import (
    Choice,
    Correction,
    FeedbackDraft,
    FeedbackState,
    Journal,
    PositionKind,
    Positions,
    RequestRecord,
    StateChange,
)

NUM_THREADS = 3  # that write feedback; one more writes versions
KILLS_PER_ROUND = 25
# When a run is killed, by its number modulo five: mostly soon after its first words, once while
# files may still be made, opened or recovered, once when logs have grown and are moved.
KILL_WINDOW_S = {0: 0.3, 1: 0.5, 2: 0.05, 3: 0.05, 4: 0.05}
DIM = 32
NUM_ROWS = 4_000


# What is written follows from its number alone, so that the reader knows it without the writer.


def request_of(name):
    return RequestRecord(
        tenant="t",
        principal="p",
        request_id=f"request-{name}",
        model="m",
        base_hash="b",
        created=time.time(),
        prompt_ids=tuple(name.encode()),
        prompt_text=f"prompt {name}",
        prompt_vector=None,
        choices=(Choice(text=f"answer {name}", token_ids=(1, 2)),),
    )


def feedback_of(name):
    return FeedbackDraft(
        tenant="t",
        principal="p",
        feedback_id=name,
        request_id=f"request-{name}",
        signal=Correction(f"better {name}"),
        created=1.0,
    )


def positions_of(name):
    rng = np.random.default_rng(list(name.encode()))
    num = 1 + len(name) % 3
    capture = Capture(
        hidden=rng.normal(size=(num, DIM)).astype(ml_dtypes.bfloat16),
        top_ids=rng.integers(0, 99, (num, 64)).astype(np.int32),
        top_logprobs=rng.normal(size=(num, 64)).astype(np.float32),
        rest_logprob=rng.normal(size=num).astype(np.float32),
    )
    return Positions(
        indices=tuple(range(num)),
        target_ids=tuple(range(10, 10 + num)),
        kinds=(PositionKind.EDIT,) * num,
        capture=capture,
    )


def values_of(pattern_id, number):
    return np.random.default_rng([pattern_id, number]).normal(size=(4, NUM_ROWS)).astype(np.float32)


def version_of(pattern_id, number):
    return VersionDraft(
        kind="edit",
        parent=number - 1,
        created=1.0,
        base_hash="b",
        feedback_seqs=(number,),
        table=HeadTable(
            keys=np.zeros((4, DIM), np.float32),
            token_ids=np.zeros(0, np.int32),
            token_keys=np.zeros((4, 0), np.float32),
            const_keys=np.zeros(4, np.float32),
            row_ids=np.arange(NUM_ROWS, dtype=np.int32),
            values=values_of(pattern_id, number),
        ),
        gate=Gate(
            centroid=np.full(DIM, number, np.float32),
            threshold=0.5,
            num_prompts=number,
            vectors=np.zeros((2, DIM), np.float32),
        ),
        solver_state={"number": np.array([number])},
    )


def slot_of(pattern_id):
    return SlotKey(tenant="t", scope="tenant", owner="", pattern_id=pattern_id)


# The program that gets killed.


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())  # one write: never torn


def write_feedback(journal, run, thread):
    number = 0
    while True:
        name = f"{run}-{thread}-{number}"
        journal.record_request(request_of(name))
        seq = journal.add_feedback(feedback_of(name), positions_of(name)).result().record.seq
        say("feedback", name, seq)
        if number % 4 == 3:
            journal.set_state([seq], StateChange(state=FeedbackState.LEARNED)).result()
            say("learned", name)
        number += 1


def write_versions(store):
    pattern_id = store.new_pattern_id()
    say("pattern", pattern_id)
    number = 0
    while True:
        number += 1
        store.put(slot_of(pattern_id), version_of(pattern_id, number))
        say("version", pattern_id, number)


def main(directory, run):
    data = DataDir(Path(directory))
    journal, store = Journal(data.journal_path), AdapterStore(data.adapters_path)
    for thread in range(NUM_THREADS):
        arguments = (journal, run, thread)
        threading.Thread(target=write_feedback, args=arguments, daemon=True).start()
    write_versions(store)


# The test.


@dataclass
class Acknowledged:
    """What runs on one data directory were told is on disk."""

    seqs: dict[str, int] = field(default_factory=dict)
    learned: set[str] = field(default_factory=set)
    patterns: dict[int, int] = field(default_factory=dict)  # id: highest version

    def read(self, lines):
        """Take in one run's words; its feedback."""
        fresh = []
        for line in lines:
            match line.split():
                case ["feedback", name, seq]:
                    assert name not in self.seqs
                    assert int(seq) not in self.seqs.values(), "a number was used twice"
                    self.seqs[name] = int(seq)
                    fresh.append(name)
                case ["learned", name]:
                    self.learned.add(name)
                case ["pattern", number]:
                    assert int(number) > max(self.patterns, default=0), "a pattern id came back"
                    self.patterns[int(number)] = 0
                case ["version", pattern, number]:
                    self.patterns[int(pattern)] = int(number)
                case other:
                    raise AssertionError(f"the child said {other}")
        return fresh


def kill_one_run(directory, run, rng):
    """Start a writer, kill it at a random moment, and return what it had said."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(directory), str(run)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        # In four runs of five the moment counts from the first acknowledgement.
        first = child.stdout.readline() if run % 5 else ""
        time.sleep(rng.uniform(0, KILL_WINDOW_S[run % 5]))
        child.send_signal(signal.SIGKILL)
        rest, complaints = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL, complaints
    return [line for line in (first + rest).splitlines() if line]


def check_journal(journal, path, told, names):
    for name in names:
        record = journal.feedback("t", name)
        assert record.seq == told.seqs[name]
        assert record.signal == Correction(f"better {name}")
        assert (record.prompt_text, record.answer.text) == (f"prompt {name}", f"answer {name}")
        got, want = journal.positions(record.seq), positions_of(name)
        assert got.indices == want.indices and got.target_ids == want.target_ids
        assert got.capture.hidden.tobytes() == want.capture.hidden.tobytes()
        assert got.capture.top_logprobs.tobytes() == want.capture.top_logprobs.tobytes()
    raw = sqlite3.connect(path)
    rows = raw.execute("SELECT feedback_id, seq, state FROM feedback").fetchall()
    half = raw.execute(
        "SELECT count(*) FROM feedback LEFT JOIN positions USING (seq) WHERE target_id IS NULL"
    ).fetchone()
    raw.close()
    stored = {name: seq for name, seq, _ in rows}
    assert len(stored) == len(rows), "a feedback is there twice"
    assert stored.items() >= told.seqs.items(), "an acknowledged feedback is lost"
    assert {name for name, _, state in rows if state == "LEARNED"} >= told.learned
    assert half == (0,), "a feedback came without its positions"


def check_retries(journal, run, names):
    """Clients that saw no answer send again: stored once, whatever had happened."""
    for thread in range(NUM_THREADS):
        sent = [name for name in names if name.startswith(f"{run}-{thread}-")]
        for name in [*sent[-1:], f"{run}-{thread}-{len(sent)}"]:
            recorded = journal.record_request(request_of(name))
            outcome = journal.add_feedback(feedback_of(name), positions_of(name)).result(10)
            recorded.exception(10)  # it may have been there already
            assert outcome.is_duplicate or name not in sent
            again = journal.add_feedback(feedback_of(name)).result(10)
            assert again.is_duplicate and again.record.seq == outcome.record.seq


def check_store(store, patterns):
    """Each pattern's versions form an unbroken line of whole versions; none told of is missing."""
    for pattern_id, acknowledged in patterns.items():
        history = store.history(slot_of(pattern_id))
        assert [v.number for v in history] == list(range(1, len(history) + 1))
        assert acknowledged <= len(history) <= acknowledged + 1
        oldest = max(1, len(history) - 99)  # those before have been compacted
        assert [v.number for v in history if v.has_arrays] == list(range(oldest, len(history) + 1))
        for number in range(oldest, len(history) + 1):
            version = store.get(slot_of(pattern_id), number)
            want = values_of(pattern_id, number)
            assert version.table.values.tobytes() == want.tobytes()
            assert version.gate.num_prompts == number
        if history:
            number = len(history)
            assert store.solver_state(slot_of(pattern_id), number)["number"].tolist() == [number]


def check_files(*paths):
    for path in paths:
        raw = sqlite3.connect(path)
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        raw.close()


def pytest_generate_tests(metafunc):
    kills = int(os.environ.get("KILLS_OF_STORAGE", "25"))
    metafunc.parametrize("first", range(0, kills, KILLS_PER_ROUND))


def test_every_acknowledged_write_survives_kill_9(tmp_path, first):
    rng = random.Random(first)
    told = Acknowledged()
    for run in range(first, first + KILLS_PER_ROUND):
        known = set(told.patterns)
        names = told.read(kill_one_run(tmp_path, run, rng))
        with (
            DataDir(tmp_path) as data,
            Journal(data.journal_path) as journal,
            AdapterStore(data.adapters_path) as store,
        ):
            check_journal(journal, data.journal_path, told, names)
            check_retries(journal, run, names)
            check_store(store, {p: n for p, n in told.patterns.items() if p not in known})
    check_files(tmp_path / "journal.db", tmp_path / "adapters.db")
    num_versions = sum(told.patterns.values())
    print(f"{KILLS_PER_ROUND} kills: {len(told.seqs)} feedback, {num_versions} versions survived")
    assert min(len(told.seqs), num_versions) > KILLS_PER_ROUND  # the kills did hit work


if __name__ == "__main__":
    main(*sys.argv[1:])
