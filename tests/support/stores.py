"""Slots, tables, gates and drafts for an adapter store, each known by a seed."""

import ml_dtypes
import numpy as np

from adapters.gate import Gate
from adapters.store import Scope, SlotKey, VersionDraft
from engine import HeadTable

DIM = 6
TABLE_FIELDS = ("keys", "token_ids", "token_keys", "const_keys", "row_ids", "values")


def slot(store, *, tenant="acme", scope: Scope = "principal", owner="ann"):
    pattern_id = store.new_pattern_id()
    return SlotKey(tenant=tenant, scope=scope, owner=owner, pattern_id=pattern_id)


def table(seed=0, *, rank=2):
    rng = np.random.default_rng(seed)
    return HeadTable(
        keys=rng.normal(size=(rank, DIM)).astype(np.float32),
        token_ids=np.array([4, 2, 9], np.int32),
        token_keys=rng.normal(size=(3, rank)).astype(np.float32).T,  # not contiguous
        const_keys=rng.normal(size=rank).astype(np.float32),
        row_ids=np.array([300_000, 1], np.int32),
        values=rng.normal(size=(rank, 2)).astype(np.float32),
    )


def gate(seed=0):
    rng = np.random.default_rng(seed + 1000)
    return Gate(
        centroid=rng.normal(size=DIM).astype(np.float32),
        threshold=0.1 + seed,  # 0.1 is no float32: it must not be rounded
        num_prompts=5,
        vectors=rng.normal(size=(3, DIM)).astype(np.float32),
    )


def state(seed=0):
    return {
        "gram": np.random.default_rng(seed).normal(size=(3, 3)),
        "hidden": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16).T,
        "mask": np.array([True, False]),
        "step": np.array(seed, np.int64),
        "none": np.zeros((0, 4), np.float32),
    }


def draft(parent, seed=0, **changes):
    fields = {
        "kind": "edit",
        "parent": parent,
        "created": 1000.0 + parent,
        "base_hash": "base-1",
        "feedback_seqs": tuple(range(seed)),
        "table": table(seed),
        "gate": gate(seed),
        "solver_state": state(seed),
        "report": {"p_star": 0.99},
    }
    return VersionDraft(**(fields | changes))


def fill(store, key, num, **changes):
    for number in range(1, num + 1):
        store.put(key, draft(number - 1, number, **changes))


def assert_same_array(got, want, name):
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), name


def assert_same_content(version, seed):
    for name in TABLE_FIELDS:
        assert_same_array(getattr(version.table, name), getattr(table(seed), name), name)
    for name in ("centroid", "vectors"):
        assert_same_array(getattr(version.gate, name), getattr(gate(seed), name), name)
    assert (version.gate.threshold, version.gate.num_prompts) == (0.1 + seed, 5)
    assert version.info.feedback_seqs == tuple(range(seed))
