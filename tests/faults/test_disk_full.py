"""A disk that takes no more: a refusal that says so, nothing half stored, and service afterwards.

The parts marked "child" run in a process of their own, as this file's main program: there the
kernel itself refuses, by a file size limit or because a small file system is full.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import ml_dtypes
import numpy as np

from adapters.errors import StoreUnwritable
from adapters.store import AdapterStore, SlotKey, VersionDraft
from engine import Capture, HeadTable
from sona.errors import DiskFull, JournalError
from sona.journal import (
    Choice,
    Correction,
    FeedbackDraft,
    Journal,
    PositionKind,
    Positions,
    RequestRecord,
)

ATTEMPTS = 60  # about 4 MB
ROOM = 300_000  # bytes that a limit leaves: enough for some attempts, not for all


# child: refusing kernels


@contextlib.contextmanager
def file_size_limit(directory):
    largest = max(file.stat().st_size for file in directory.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def full_file_system(directory):
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    os.truncate(ballast, ballast.stat().st_size - ROOM)
    yield
    ballast.unlink()


# child: the two databases under them


def feedback(number):
    return FeedbackDraft(
        tenant="t",
        principal="p",
        feedback_id=f"f{number}",
        request_id="r",
        signal=Correction(f"answer {number}"),
        created=time.time(),
    )


def positions():
    num, dim = 16, 2048
    capture = Capture(
        hidden=np.ones((num, dim), ml_dtypes.bfloat16),
        top_ids=np.zeros((num, 4), np.int32),
        top_logprobs=np.zeros((num, 4), np.float32),
        rest_logprob=np.zeros(num, np.float32),
    )
    kinds = (PositionKind.CONSTRAINT,) * num
    return Positions(indices=tuple(range(num)), target_ids=(0,) * num, kinds=kinds, capture=capture)


def fill_journal(directory, refusing):
    request = RequestRecord(
        tenant="t",
        principal="p",
        request_id="r",
        model="m",
        base_hash="b",
        created=time.time(),
        prompt_ids=(1,),
        prompt_text=None,
        prompt_vector=None,
        choices=(Choice(text="a", token_ids=(1,)),),
    )
    accepted, messages = [], []
    with Journal(directory / "journal.db") as journal:
        journal.record_request(request).result(30)
        with refusing(directory):
            # The first alone, so that it is accepted; the others share commits that fail.
            calls = [journal.add_feedback(feedback(0), positions())]
            wait(calls, timeout=30)
            calls += [journal.add_feedback(feedback(n), positions()) for n in range(1, ATTEMPTS)]
            for number, call in enumerate(calls):
                try:
                    accepted.append((number, call.result(30).record.seq))
                except JournalError as error:
                    messages.append(f"{type(error).__name__}: {error}")
            readable = [record.feedback_id for record in journal.pending(limit=ATTEMPTS)]
        retried = [
            journal.add_feedback(feedback(n), positions()).result(30).is_duplicate
            for n in range(ATTEMPTS)
        ]
        whole = [journal.positions(r.seq) is not None for r in journal.pending(limit=2 * ATTEMPTS)]
    return {
        "accepted": [f"f{number}" for number, _ in accepted],
        "messages": messages,
        "readable": readable,
        "duplicates": [f"f{n}" for n, is_duplicate in enumerate(retried) if is_duplicate],
        "num_whole": sum(whole),
    }


def version(number, seed):
    values = np.full((32, 600), seed, np.float32)
    return VersionDraft(
        kind="edit",
        parent=number,
        created=0.0,
        base_hash="b",
        feedback_seqs=(seed,),
        table=HeadTable(
            keys=np.zeros((32, 8), np.float32),
            token_ids=np.zeros(0, np.int32),
            token_keys=np.zeros((32, 0), np.float32),
            const_keys=np.zeros(32, np.float32),
            row_ids=np.arange(600, dtype=np.int32),
            values=values,
        ),
        gate=None,
    )


def fill_store(directory, refusing):
    with AdapterStore(directory / "adapters.db") as store:
        key = SlotKey(tenant="t", scope="tenant", owner="", pattern_id=store.new_pattern_id())
        stored, messages = 0, []
        with refusing(directory):
            for seed in range(ATTEMPTS):
                try:
                    stored = store.put(key, version(stored, seed)).number
                except StoreUnwritable as error:
                    messages.append(str(error))
                    break
            history = [v.number for v in store.history(key)]
            kept = store.get(key, stored).table.values
        after = store.put(key, version(stored, 999))
        values = store.get(key, after.number).table.values
    return {
        "stored": stored,
        "messages": messages,
        "kept": [float(kept.min()), float(kept.max())],
        "history": history,
        "after": [after.number, float(values.min()), float(values.max())],
    }


def child(directory, kind, limit):
    refusing = {"size": file_size_limit, "space": full_file_system}[limit]
    fill = {"journal": fill_journal, "store": fill_store}[kind]
    print(json.dumps(fill(directory, refusing)))


# the tests


def run_child(*command, directory, kind, limit):
    script = [sys.executable, __file__, str(directory), kind, limit]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*command, *script], env=environment, capture_output=True, text=True, timeout=120
    )


def on_small_file_system(directory, kind):
    """Run the child on 24 MB that vanish with it; None where mounting is forbidden."""
    if shutil.which("unshare") is None:
        return None
    mount = f'mount -t tmpfs -o size=24m tmpfs {directory} || exit 77; exec "$@"'
    command = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    done = run_child(*command, directory=directory, kind=kind, limit="space")
    return done if done.returncode == 0 or "Traceback" in done.stderr else None


def outcomes(directory, kind):
    """What the child saw under each limit that this machine lets us set."""
    done = [run_child(directory=directory, kind=kind, limit="size")]
    small = directory / "small"
    small.mkdir()
    if (other := on_small_file_system(small, kind)) is not None:
        done.append(other)
    for result in done:
        assert result.returncode == 0, result.stderr
        yield json.loads(result.stdout)


def test_journal_refuses_what_the_disk_refuses_and_goes_on(tmp_path):
    for seen in outcomes(tmp_path, "journal"):
        assert 0 < len(seen["accepted"]) < ATTEMPTS
        assert len(seen["accepted"]) + len(seen["messages"]) == ATTEMPTS
        for message in seen["messages"]:
            assert message.startswith(f"{DiskFull.__name__}: the disk refused")
            assert "journal.db" in message and "free space" in message
        assert seen["readable"] == seen["accepted"]
        assert seen["duplicates"] == seen["accepted"]
        assert seen["num_whole"] == ATTEMPTS


def test_store_refuses_what_the_disk_refuses_and_goes_on(tmp_path):
    for seen in outcomes(tmp_path, "store"):
        assert 0 < seen["stored"] < ATTEMPTS
        (message,) = seen["messages"]
        assert "adapters.db" in message and "free space" in message
        assert seen["kept"] == [seen["stored"] - 1] * 2
        assert seen["history"] == list(range(1, seen["stored"] + 1))
        assert seen["after"] == [seen["stored"] + 1, 999.0, 999.0]


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
