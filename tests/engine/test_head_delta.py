"""Head edits in a batch and their residency, against the table's own definition in float64."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from engine.api import HeadRef, HeadTable
from engine.config import EngineConfig, plan_engine
from engine.errors import ShapeError
from engine.model.config import ModelConfig
from engine.ops import head_delta
from engine.slots import HeadSlots

add_head_delta = jax.jit(head_delta.add_head_delta)
D, V = 12, 700
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=V,
    hidden_size=D,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_size=4,
    max_len=64,
    rms_eps=1e-6,
    rope_theta=1e4,
)


def make_slots(count=4):
    config = EngineConfig(max_learned_slots=count, head_rank=6, head_rows=2048)
    return HeadSlots(plan_engine(config, MODEL, platform="cpu"), hidden_size=D, vocab_size=V)


def make_table(seed, rank=3, tokens=5, rows=40):
    rng = np.random.default_rng(seed)
    return HeadTable(
        keys=rng.standard_normal((rank, D)).astype(np.float32),
        token_ids=rng.permutation(V)[:tokens].astype(np.int32),
        token_keys=rng.standard_normal((rank, tokens)).astype(np.float32),
        const_keys=rng.standard_normal(rank).astype(np.float32),
        row_ids=rng.permutation(V)[:rows].astype(np.int32),
        values=rng.standard_normal((rank, rows)).astype(np.float32),
    )


def test_a_table_that_does_not_fit_costs_no_slot():
    slots = make_slots()
    wrong = make_table(1)
    wrong = replace(wrong, keys=wrong.keys[:, :-1])
    for index in range(5):
        with pytest.raises(ShapeError, match="states have 12 numbers"):
            slots.acquire(HeadRef(f"w{index}", 1, ("t", str(index)), wrong))
    assert [slots.acquire(make_ref(name)) is not None for name in "abc"] == [True] * 3


def make_ref(name, version=1, **shape):
    return HeadRef(name, version, ("t", name), make_table(hash(name) % 1000, **shape))


def expected(table, logits, hidden, base):
    u = table.keys.astype(np.float64) @ hidden + table.const_keys
    for column, token in enumerate(table.token_ids):
        if token == base:
            u = u + table.token_keys[:, column]
    out = logits.astype(np.float64)
    for column, row in enumerate(table.row_ids):
        out[row] += u @ table.values[:, column]
    return out


@pytest.mark.parametrize("rows", [1, 256, 257, 700], ids=["one", "small", "past-small", "all"])
def test_each_row_gets_its_own_slot(rows):
    slots, rng = make_slots(), np.random.default_rng(0)
    refs = [make_ref("a", rows=rows), make_ref("b", rank=6, tokens=64, rows=3)]
    taken = [slots.acquire(ref) for ref in refs]
    logits = rng.standard_normal((3, V)).astype(np.float32)
    hidden = rng.standard_normal((3, D)).astype(np.float32)
    base = np.array([refs[0].table.token_ids[2], 5, 9], np.int32)
    got = np.asarray(
        add_head_delta(
            logits, hidden, base, np.array([taken[0], taken[1], 0], np.int32), slots.stack
        )
    )
    for row, ref in enumerate(refs):
        want = expected(ref.table, logits[row], hidden[row], base[row])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[2], logits[2])


def test_infinite_values_of_another_slot_do_not_leak():
    slots = make_slots()
    bad = make_table(1)
    bad.values[:] = np.inf
    slot = slots.acquire(HeadRef("bad", 1, ("t", "bad"), bad))
    logits = np.ones((2, V), np.float32)
    got = add_head_delta(
        logits,
        np.ones((2, D), np.float32),
        np.zeros(2, np.int32),
        np.array([0, slot], np.int32),
        slots.stack,
    )
    np.testing.assert_array_equal(got[0], logits[0])


def test_slots_in_use_stay_and_the_least_recently_used_goes():
    slots = make_slots(count=4)  # three besides "no edit"
    a, b, c, d, e = (make_ref(name) for name in "abcde")
    first = [slots.acquire(ref) for ref in (a, b, c)]
    assert len(set(first)) == 3 and 0 not in first
    assert slots.acquire(d) is None
    slots.release(b)
    slots.release(a)
    assert slots.acquire(d) == first[0]  # a was used before b
    assert slots.acquire(b) == first[1]  # still resident
    slots.release(d)
    assert slots.acquire(e) == first[0]
    assert slots.acquire(HeadRef("b", 2, b.slot_key, b.table)) is None  # a version is a resident


def test_uploads_do_not_compile_again():
    slots = make_slots()
    before = slots.num_programs()
    for index, name in enumerate("abcdefgh"):
        ref = make_ref(name, rank=1 + index % 6, rows=1 + 80 * index)
        assert slots.acquire(ref) is not None
        slots.release(ref)
    assert slots.num_programs() == before == 1


def test_a_table_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="rank 7, 5 token keys and 40 rows exceed a slot of 6, 64"):
        make_slots().acquire(make_ref("a", rank=7))
