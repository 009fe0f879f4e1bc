"""What the store refuses: damaged files, foreign models, candidates that nobody could serve."""

import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from support.stores import DIM, assert_same_content, draft, fill, gate, slot, table

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    CandidateRejected,
    IncompatibleAdapter,
    SnapshotCorrupt,
)
from adapters.store import AdapterStore, LoadFailure, SlotKey, sqlite


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapters.db"


@pytest.fixture
def store(path):
    with AdapterStore(path, clock=lambda: 123.5) as store:
        yield store


def damage(path, key, number, part):
    raw = sqlite3.connect(path)
    where = "WHERE number = ? AND part = ? AND slot_id = "
    where += "(SELECT slot_id FROM slots WHERE pattern_id = ?)"
    values = (number, part, key.pattern_id)
    (data,) = raw.execute(f"SELECT bytes FROM contents {where}", values).fetchone()
    torn = data[:-1] + bytes([data[-1] ^ 0x40])
    raw.execute(f"UPDATE contents SET bytes = ? {where}", (torn, *values))
    raw.commit()
    raw.close()


def spoiled(**changes):
    return {"table": replace(table(), **changes)}


NAN = np.full((2, 2), np.nan, np.float32)


@pytest.mark.parametrize("part", ["table", "gate"])
def test_a_damaged_version_is_named_and_never_served(store, path, part):
    bad, good = slot(store), slot(store)
    fill(store, bad, 2)
    fill(store, good, 1)
    damage(path, bad, 2, part)
    words = rf"{part} of pattern-{bad.pattern_id} \(tenant 'acme'.*version 2.*roll"
    with pytest.raises(SnapshotCorrupt, match=words):
        store.live(bad)
    failure, version = store.all_live("base-1")
    assert isinstance(failure, LoadFailure) and isinstance(failure.error, SnapshotCorrupt)
    assert (failure.slot, failure.number) == (bad, 2)
    assert (version.slot, version.number) == (good, 1)
    store.rollback(bad, 1)  # the message's advice works
    assert_same_content(store.live(bad), 1)


def test_a_damaged_solver_state_is_noticed_and_does_not_stop_serving(store, path):
    key = slot(store)
    fill(store, key, 1)
    damage(path, key, 1, "state")
    assert_same_content(store.live(key), 1)
    with pytest.raises(SnapshotCorrupt, match="the state of"):
        store.solver_state(key, 1)


@pytest.mark.parametrize("part", ["table", "state"])
def test_a_missing_part_is_not_taken_for_an_empty_one(store, path, part):
    key = slot(store)
    fill(store, key, 1)
    raw = sqlite3.connect(path)
    raw.execute("DELETE FROM contents WHERE part = ?", (part,))
    raw.commit()
    raw.close()
    with pytest.raises(SnapshotCorrupt, match=f"the {part} of .* is missing"):
        store.get(key, 1) if part == "table" else store.solver_state(key, 1)


def test_a_version_of_another_base_model_is_not_loaded(store):
    old, new = slot(store), slot(store)
    fill(store, old, 1, base_hash="base-0")
    fill(store, new, 1)
    with pytest.raises(IncompatibleAdapter, match="base model base-0, served is base-1"):
        store.live(old, base_hash="base-1")
    with pytest.raises(IncompatibleAdapter):
        store.get(old, 1, base_hash="base-1")
    failure, version = store.all_live("base-1")
    assert isinstance(failure.error, IncompatibleAdapter) and version.slot == new
    assert store.live(old).info.base_hash == "base-0"  # still there for whom it fits


@pytest.mark.parametrize("scope,owner", [("principal", ""), ("tenant", "ann"), ("global", "")])
def test_a_scope_that_does_not_fit_its_owner_is_refused(scope, owner):
    with pytest.raises(AdapterError, match="use scope"):
        SlotKey(tenant="acme", scope=scope, owner=owner, pattern_id=1)


@pytest.mark.parametrize(
    "changes,words",
    [
        (spoiled(values=NAN), "values holds NaN"),
        (spoiled(values=np.zeros((2, 3), np.float32)), r"values is float32 \(2, 3\)"),
        (spoiled(keys=np.zeros((2, DIM))), "keys is float64"),
        (spoiled(row_ids=np.array([5, 5], np.int32)), "row_ids .* distinct"),
        (spoiled(token_ids=np.array([4, 2, 9])), "token_ids is int64"),
        ({"gate": replace(gate(), centroid=np.zeros(2, np.float32))}, "gate centroid"),
        ({"gate": replace(gate(), threshold=float("nan"))}, "threshold is nan"),
        ({"solver_state": {"x": np.zeros(2, complex)}}, "x is complex128"),
        ({"report": {"gain": float("nan")}}, "report is not JSON"),
    ],
)
def test_a_candidate_nobody_could_serve_leaves_nothing_behind(store, changes, words):
    key = slot(store)
    with pytest.raises(CandidateRejected, match=words):
        store.put(key, draft(0, **changes))
    assert store.live(key) is None and store.slots() == ()
    assert store.put(key, draft(0)).number == 1


def test_a_closed_store_says_so(path):
    store = AdapterStore(path)
    key = slot(store)
    store.close()
    store.close()
    for attempt in (
        store.new_pattern_id,
        lambda: store.live(key),
        lambda: store.put(key, draft(0)),
    ):
        with pytest.raises(AdapterError, match="closed"):
            attempt()


def test_every_connection_syncs_its_commits(store, path):
    connection = sqlite.connect(path)
    pragmas = [
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    ]
    connection.close()
    assert pragmas == ["wal", 2, 1]  # 2 is FULL


def test_a_file_that_is_no_store_is_refused(path):
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(SnapshotCorrupt, match="restore it from a backup"):
        AdapterStore(path)


def test_only_the_owner_can_read_the_files(store, path):
    fill(store, slot(store), 1)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(("adapters.db", "adapters.db-wal", "adapters.db-shm"), 0o600)


@pytest.mark.parametrize("number", [0, 3, 2**70])
def test_a_version_that_never_was_is_refused_by_what_there_is(store, number):
    key = slot(store)
    fill(store, key, 2)
    with pytest.raises(AdapterNotFound, match=f"no version {number}; it has versions 1 to 2"):
        store.get(key, number)


def test_a_damaged_version_can_be_listed_and_left(store, path):
    key = slot(store)
    fill(store, key, 2)
    damage(path, key, 2, "table")
    assert store.num_bytes(key, 2) == store.num_bytes(key, 1) > 0
    assert store.rollback(key, 1).number == 3
