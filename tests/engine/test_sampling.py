"""Sampling against sorted float64 distributions, and its independence of the batch."""

import math

import jax
import numpy as np
import pytest

from engine.api import SamplingParams
from engine.errors import InvalidJob
from engine.sampling import argmax, check, sample

draw = jax.jit(sample)


def rows(count, *, temperature=1.0, top_k=0, top_p=1.0, seed=7):
    return (
        np.full(count, temperature, np.float32),
        np.full(count, top_k, np.int32),
        np.full(count, top_p, np.float32),
        np.full(count, seed, np.int32),
        np.arange(count, dtype=np.int32),
    )


def nucleus(logits, temperature, top_k, top_p):
    """Probabilities after top-k, then top-p, by sorting."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits.astype(np.float64) / temperature
    kept = order[:top_k] if top_k else order
    weights = np.exp(scaled[kept] - scaled[kept].max())
    weights /= weights.sum()
    cut = np.searchsorted(np.cumsum(weights), top_p - 1e-9) + 1
    out = np.zeros(len(logits))
    out[kept[:cut]] = weights[:cut] / weights[:cut].sum()
    return out


def test_greedy_takes_the_largest_and_the_lowest_id_on_a_tie():
    logits = np.array([[0.0, 3.0, 3.0], [-np.inf, -5.0, -6.0]], np.float32)
    assert draw(logits, *rows(2, temperature=0.0)).tolist() == [1, 1]
    assert jax.jit(argmax)(logits).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.8, 9, 0.5), (1.0, 1, 1.0)],
)
def test_frequencies_match_the_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal(24).astype(np.float32) * 2
    count = 20_000
    settings = rows(count, temperature=temperature, top_k=top_k, top_p=top_p)
    got = np.bincount(draw(np.tile(logits, (count, 1)), *settings), minlength=24) / count
    want = nucleus(logits, temperature, top_k, top_p)
    assert not got[want == 0].any()
    # Five standard deviations of a binomial share.
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / count) + 1e-9).all()


def test_a_row_draws_the_same_whoever_shares_the_batch():
    logits = np.random.default_rng(1).standard_normal((8, 50)).astype(np.float32)
    together = draw(logits, *rows(8))
    for row in range(8):
        one = tuple(setting[row : row + 1] for setting in rows(8))
        assert draw(logits[row : row + 1], *one)[0] == together[row]


def test_seed_and_index_change_the_draw():
    logits = np.zeros((40, 1000), np.float32)
    by_index = draw(logits, *rows(40))
    settings = list(rows(40))
    settings[4] = np.zeros(40, np.int32)
    assert len(set(by_index.tolist())) > 30
    assert len(set(draw(logits, *settings).tolist())) == 1


def test_full_nucleus_keeps_everything_that_has_mass():
    logits = np.array([[0.0, -1.0, -2.0]], np.float32)
    drawn = {int(draw(logits, *rows(1, top_p=1.0, seed=s))[0]) for s in range(200)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ("",)}, "stop is .*; use texts of one character"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_meaningless_settings_are_refused(change, message):
    with pytest.raises(InvalidJob, match=message):
        check(SamplingParams(**change))
    check(SamplingParams())
