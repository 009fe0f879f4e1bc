import numpy as np
import pytest
from reference.head_edits import World, log_softmax
from support.captures import capture_of, rows_of

from adapters.base_rows import BaseRows, log_odds

# bfloat16 keeps 8 bits: a gathered logit of size 10 is off by about 10 * 2^-9 = 0.02.
GATHERED = 0.06


@pytest.fixture(scope="module")
def world():
    return World(seed=3)


def bf16(states):
    """States that bfloat16 holds exactly, so that nothing but float32 rounding is left."""
    return capture_of(states, np.ones((65, states.shape[1]))).hidden.astype(np.float64)


def shuffled_rows(world, states, count):
    """Rows of all sorts: the strongest, some within the captured 64, some far outside."""
    logprobs = log_softmax(states @ world.head.T)
    order = np.argsort(-logprobs[0])
    ids = np.unique(np.concatenate([order[:8], order[50:80], order[-10:]]))[:count]
    return world.rng.permutation(ids).astype(np.int32)


@pytest.mark.parametrize("few_rows", [0, 10**9], ids=["searched", "compared"])
@pytest.mark.parametrize("is_rounded", [True, False], ids=["exact-h", "bf16-h"])
def test_every_token_is_counted_once(world, is_rounded, few_rows, monkeypatch):
    monkeypatch.setattr("adapters.base_rows._FEW_ROWS", few_rows)
    states = world.generic(12)
    states = bf16(states) if is_rounded else states
    ids = shuffled_rows(world, states, 40)
    rows = BaseRows.empty(world.dim).extended(
        ids, capture_of(states, world.head), rows_of(world.head), (12, 64)
    )
    want = log_softmax(states @ world.head.T)
    tolerance = 2e-4 if is_rounded else GATHERED
    np.testing.assert_allclose(rows.logits[:, : len(ids)], want[:, ids], atol=tolerance)
    outside = np.delete(want, ids, axis=1)
    np.testing.assert_allclose(
        rows.rest, np.log(np.exp(outside).sum(1)), atol=5e-3 if is_rounded else GATHERED
    )


def test_growing_in_any_order_ends_the_same(world):
    states = bf16(world.generic(10))
    capture, gather = capture_of(states, world.head), rows_of(world.head)
    ids = shuffled_rows(world, states, 30)

    def part(first, last):
        return capture_of(states[first:last], world.head)

    at_once = BaseRows.empty(world.dim).extended(ids, capture, gather, (10, 30))
    grown = BaseRows.empty(world.dim).extended(ids[:3], part(0, 4), gather, (4, 8))
    grown = grown.extended(ids[3:11], part(4, 4), gather, (8, 16))
    grown = grown.extended(ids[11:11], part(4, 9), gather, (16, 16))
    grown = grown.extended(ids[11:], part(9, 10), gather, (32, 64))
    np.testing.assert_array_equal(grown.row_ids, at_once.row_ids)
    np.testing.assert_allclose(grown.logits[:10, :30], at_once.logits, atol=1e-5)
    np.testing.assert_allclose(grown.rest, at_once.rest, atol=1e-4)


def test_rest_stays_finite_when_the_rows_hold_nearly_everything(world):
    # All but five tokens are rows: the gathered mass is the uncaptured mass but for rounding.
    states = world.generic(6)
    ids = np.arange(world.vocab - 5, dtype=np.int32)
    rows = BaseRows.empty(world.dim).extended(
        ids, capture_of(states, world.head), rows_of(world.head), (6, len(ids))
    )
    assert np.isfinite(rows.rest).all()
    assert (rows.rest < 0).all()


def test_no_uncaptured_mass_at_all(world):
    capture = capture_of(world.generic(3), world.head)
    emptied = type(capture)(
        capture.hidden, capture.top_ids, capture.top_logprobs, np.full(3, -np.inf, np.float32)
    )
    rows = BaseRows.empty(world.dim).extended(
        emptied.top_ids[0, :2], emptied, rows_of(world.head), (3, 2)
    )
    assert np.isfinite(rows.rest).all()


def test_columns_finds_rows_in_order_of_arrival(world):
    rows = BaseRows.empty(world.dim).extended(
        np.array([70, 3, 11], np.int32),
        capture_of(world.generic(1), world.head), rows_of(world.head), (1, 3),
    )  # fmt: skip
    np.testing.assert_array_equal(rows.columns(np.array([11, 70, 3])), [2, 0, 1])


def test_log_odds_do_not_lose_a_probability_near_one():
    # p = 1 - 1e-20 in float64 is 1; its odds are 1e20.
    logits = np.array([[0.0, -46.0517018598809]])
    odds = log_odds(logits, np.array([-80.0]), np.array([0]))
    assert odds[0] == pytest.approx(46.0517018598809, abs=1e-6)
