"""The store's promises: versions never change, form one line, and can be gone back to."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.stores import (
    DIM,
    TABLE_FIELDS,
    assert_same_array,
    assert_same_content,
    draft,
    fill,
    slot,
    state,
)

from adapters.errors import AdapterNotFound, CandidateRejected, StaleCandidate
from adapters.store import AdapterStore, SlotKey, empty_table


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapters.db"


@pytest.fixture
def store(path):
    with AdapterStore(path, clock=lambda: 123.5) as store:
        yield store


def test_a_version_comes_back_bit_by_bit(store, path):
    key = slot(store)
    put = store.put(key, draft(0, 7, is_gated=True))
    assert_same_content(put, 7)
    with AdapterStore(path) as other:
        got = other.get(key, 1)
        assert_same_content(got, 7)
        assert got.info == put.info
        restored = other.solver_state(key, 1)
        assert restored.keys() == state(7).keys()
        for name, array in state(7).items():
            assert_same_array(restored[name], array, name)
    info = got.info
    assert (info.slot, info.number, info.parent, info.kind) == (key, 1, 0, "edit")
    assert (info.created, info.base_hash, info.report) == (1000.0, "base-1", {"p_star": 0.99})
    assert info.is_gated and info.has_arrays and info.restores is None


def test_versions_are_immutable(store, path):
    key = slot(store)
    version = store.put(key, draft(0))
    with pytest.raises(ValueError, match="read-only"):
        version.table.keys[0, 0] = 1.0
    raw = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="never changes"):
        raw.execute("UPDATE versions SET base_hash = 'x'")
    raw.close()


def test_numbers_count_per_slot_and_the_highest_is_live(store):
    first, second = slot(store), slot(store, scope="tenant", owner="")
    assert store.live(first) is None and store.history(first) == ()
    fill(store, first, 3)
    fill(store, second, 1)
    assert (store.live(first).number, store.live(second).number) == (3, 1)
    assert [(v.number, v.parent) for v in store.history(first)] == [(1, 0), (2, 1), (3, 2)]
    assert_same_content(store.get(first, 2), 2)
    ref = store.live(first).head_ref()
    assert (ref.name, ref.version) == (f"pattern-{first.pattern_id}", 3)
    assert ref.slot_key == ("acme", "principal", "ann", str(first.pattern_id))


def test_a_candidate_made_from_an_old_version_is_refused(store):
    key = slot(store)
    fill(store, key, 2)
    for parent in (0, 1, 3):
        with pytest.raises(StaleCandidate, match=f"version {parent}, live is 2"):
            store.put(key, draft(parent))
    assert len(store.history(key)) == 2


def test_racing_writers_make_one_unbroken_line(store):
    key = slot(store)

    def write(seed):
        refused = 0
        for _ in range(5):
            while True:
                live = store.live(key)
                try:
                    store.put(key, draft(0 if live is None else live.number, seed))
                    break
                except StaleCandidate:
                    refused += 1
        return refused

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert [(v.number, v.parent) for v in store.history(key)] == [(n, n - 1) for n in range(1, 21)]
    assert all(store.get(key, n).info.has_arrays for n in range(1, 21))


def test_rollback_is_a_new_version_with_the_old_content(store):
    key = slot(store)
    fill(store, key, 3)
    back = store.rollback(key, 1, report={"why": "worse"})
    info = back.info
    assert (info.number, info.parent, info.restores, info.kind) == (4, 3, 1, "rollback")
    assert (info.created, info.report) == (123.5, {"why": "worse"})
    assert_same_content(store.live(key), 1)
    for name, array in state(1).items():
        assert_same_array(store.solver_state(key, 4)[name], array, name)
    assert_same_content(store.get(key, 3), 3)
    store.put(key, draft(4, 9))
    assert_same_content(store.live(key), 9)


def test_rollback_to_zero_is_the_empty_version(store, path):
    key = slot(store)
    fill(store, key, 2)
    store.rollback(key, 0)
    with AdapterStore(path) as other:
        live = other.live(key, base_hash="base-1")
    assert live is not None
    assert (live.number, live.info.restores, live.info.feedback_seqs) == (3, 0, ())
    assert live.gate is None and store.solver_state(key, 3) == {}
    for name in TABLE_FIELDS:
        assert_same_array(getattr(live.table, name), getattr(empty_table(DIM), name), name)
    assert live.table.keys.shape == (0, DIM)


def test_rollback_names_what_it_cannot_do(store):
    key = slot(store)
    with pytest.raises(AdapterNotFound, match="nothing to roll back"):
        store.rollback(key, 0)
    fill(store, key, 2)
    with pytest.raises(CandidateRejected, match="live already"):
        store.rollback(key, 2)
    with pytest.raises(AdapterNotFound, match="no version 5; it has versions 1 to 2"):
        store.rollback(key, 5)
    assert len(store.history(key)) == 2


def test_old_versions_are_compacted_but_gated_ones_stay(path):
    with AdapterStore(path, keep_versions=3) as store:
        key, other = slot(store), slot(store)
        fill(store, other, 1)
        for number in range(1, 9):
            store.put(key, draft(number - 1, number, is_gated=number == 2))
        kept = [v.number for v in store.history(key) if v.has_arrays]
        assert kept == [2, 6, 7, 8]
        assert store.history(key)[3].feedback_seqs == (0, 1, 2, 3)  # the edit log stays
        assert_same_content(store.get(key, 2), 2)
        with pytest.raises(AdapterNotFound, match="version 5 was compacted"):
            store.get(key, 5)
        with pytest.raises(AdapterNotFound, match="version 5 was compacted"):
            store.solver_state(key, 5)
        assert [v.has_arrays for v in store.history(other)] == [True]


def test_pattern_ids_are_never_given_twice(path):
    with AdapterStore(path) as store:
        first = [store.new_pattern_id() for _ in range(3)]
    raw = sqlite3.connect(path)
    raw.execute("DELETE FROM patterns")
    raw.commit()
    raw.close()
    with AdapterStore(path) as store:
        assert [*first, store.new_pattern_id()] == [1, 2, 3, 4]
        stranger = SlotKey(tenant="acme", scope="tenant", owner="", pattern_id=77)
        with pytest.raises(AdapterNotFound, match="pattern 77 was never created"):
            store.put(stranger, draft(0))
        assert store.slots() == ()


def test_slots_are_listed_by_tenant(store):
    ann, team = slot(store), slot(store, scope="tenant", owner="")
    other = slot(store, tenant="other")
    for key in (other, ann, team):
        fill(store, key, 1)
    assert store.slots() == (ann, team, other)
    assert store.slots("other") == (other,)
    assert store.slots("nobody") == ()
