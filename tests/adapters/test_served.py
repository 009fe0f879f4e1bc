import numpy as np
import pytest
from reference.head_edits import World, log_softmax
from support.captures import capture_of, rows_of
from support.patterns import bf16

from adapters.served import apply_table, disturbance, reactions, served_logprobs
from engine import HeadTable


@pytest.fixture(scope="module")
def world():
    return World(seed=5)


@pytest.fixture(scope="module")
def table(world):
    """Three ranks, two token keys, rows inside and outside anybody's top 64."""
    rng = np.random.default_rng(0)
    return HeadTable(
        keys=rng.standard_normal((3, world.dim)).astype(np.float32) * 0.1,
        token_ids=np.array([7, 40], np.int32),
        token_keys=rng.standard_normal((3, 2)).astype(np.float32),
        const_keys=np.array([0.0, 0.5, 0.0], np.float32),
        row_ids=rng.permutation(world.vocab)[:20].astype(np.int32),
        values=rng.standard_normal((3, 20)).astype(np.float32) * 2,
    )


def full_shift(table, hidden, argmax, vocab):
    """The formula of HeadTable, in loops."""
    shift = np.zeros((len(hidden), vocab))
    for n in range(len(hidden)):
        for r in range(len(table.keys)):
            u = float(table.keys[r].astype(np.float64) @ hidden[n]) + float(table.const_keys[r])
            for t, token in enumerate(table.token_ids):
                u += float(table.token_keys[r, t]) * (argmax[n] == token)
            for j, row in enumerate(table.row_ids):
                shift[n, row] += float(table.values[r, j]) * u
    return shift


def test_apply_table_is_the_formula(world, table):
    hidden = world.generic(6)
    argmax = np.array([7, 40, 1, 7, 2, 40], np.int32)
    base = hidden @ world.head.T
    want = base + full_shift(table, hidden, argmax, world.vocab)
    before = base.copy()
    # float32 factors of a few dozen terms.
    np.testing.assert_allclose(apply_table(table, hidden, argmax, base), want, atol=1e-4)
    np.testing.assert_array_equal(base, before)
    assert reactions(table, hidden, argmax).shape == (6, 3)


def test_served_logprobs_equal_the_whole_vocabulary(world, table):
    hidden = bf16(world.generic(150))  # more than one chunk
    base = hidden @ world.head.T
    argmax = base.argmax(1)
    served = log_softmax(base + full_shift(table, hidden, argmax, world.vocab))
    rng = np.random.default_rng(1)
    for targets in (rng.integers(0, world.vocab, 150), rng.choice(table.row_ids, 150), argmax):
        got = served_logprobs(
            table, capture_of(hidden, world.head), targets.astype(np.int32), rows_of(world.head)
        )
        np.testing.assert_allclose(got, served[np.arange(150), targets], atol=2e-3)


def test_disturbance_is_the_divergence_over_the_whole_vocabulary(world, table):
    hidden = bf16(world.generic(90))
    base = log_softmax(hidden @ world.head.T)
    argmax = base.argmax(1)
    served = log_softmax(base + full_shift(table, hidden, argmax, world.vocab))
    divergence = (np.exp(base) * (base - served)).sum(1)
    got = disturbance(table, capture_of(hidden, world.head), rows_of(world.head))
    assert got.mean_kl == pytest.approx(divergence.mean(), rel=1e-2)
    assert got.max_kl == pytest.approx(divergence.max(), rel=1e-2)
    assert got.flip_fraction == (served.argmax(1) != argmax).mean()
    assert 0 < got.flip_fraction < 1


def test_an_empty_table_disturbs_nothing(world):
    empty = HeadTable(
        np.zeros((0, world.dim), np.float32), np.zeros(0, np.int32), np.zeros((0, 0), np.float32),
        np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros((0, 0), np.float32),
    )  # fmt: skip
    capture = capture_of(world.generic(5), world.head)
    got = disturbance(empty, capture, rows_of(world.head))
    assert got.max_kl < 1e-5
    assert got.flip_fraction == 0.0
    logprobs = served_logprobs(empty, capture, capture.top_ids[:, 3], rows_of(world.head))
    np.testing.assert_allclose(logprobs, capture.top_logprobs[:, 3], atol=1e-5)
