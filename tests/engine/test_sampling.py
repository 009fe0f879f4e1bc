"""Sampling against sorted float64 distributions, and its independence of the batch."""

import math

import jax
import numpy as np
import pytest
from reference.sampling import distribution
from support.plans import small_plan

from engine import sampling
from engine.api import Job, SamplingParams
from engine.errors import InvalidJob
from engine.rows import SamplingRows
from engine.sampling import argmax, check, sample
from engine.sequence import Kind, Sequence

VOCAB = 40
draw = jax.jit(sample)


class Batch:
    """Rows of a batch through the engine's own tables, and what they should be drawn from."""

    def __init__(self, num_rows=4, vocab=VOCAB):
        self.rows = SamplingRows(small_plan(max_num_seqs=num_rows), vocab_size=vocab)
        self.vocab = vocab

    def sequence(self, params, *, row=0, prompt=(1, 2), answer=(), stop_ids=()):
        job = Job(request_id="r", prompt_ids=tuple(prompt), sampling=params)
        tokens = [*prompt, *answer]
        return Sequence(
            kind=Kind.GENERATE, job=job, tokens=tokens, num_prompt=len(prompt), row=row,
            stop_ids=frozenset(stop_ids),
        )  # fmt: skip

    def draw(self, logits, sequences, *, masks=None):
        size = len(logits)
        ints, floats = self.rows.settings(sequences, size)
        words = np.zeros((size, -(-self.vocab // 32)), np.int32)
        if masks is not None:
            ints[: len(sequences), sampling.IS_MASKED] = 1
            for row, allowed in enumerate(masks):
                for token in allowed:
                    words[row, token >> 5] |= np.uint32(1 << (token & 31)).astype(np.int32)
        return np.asarray(draw(logits, self.rows.device, words, ints, floats))

    def shares(self, logits, sequence, count, *, allowed=None):
        """How often each token is drawn over `count` indices of one sequence's row."""
        ints, floats = self.rows.settings([sequence], 1)
        ints, floats = np.repeat(ints, count, axis=0), np.repeat(floats, count, axis=0)
        words = np.zeros((count, -(-self.vocab // 32)), np.int32)
        if allowed is not None:
            ints[:, sampling.IS_MASKED] = 1
            for token in allowed:
                words[:, token >> 5] |= np.uint32(1 << (token & 31)).astype(np.int32)
        ints[:, sampling.SEED] = np.arange(count)  # the index sets how far min_tokens is
        many = np.tile(logits, (count, 1))
        drawn = draw(many, self.rows.device, words, ints, floats)
        return np.bincount(np.asarray(drawn), minlength=self.vocab) / count


def random_logits(seed, count=VOCAB):
    return (np.random.default_rng(seed).standard_normal(count) * 2).astype(np.float32)


def assert_shares(got, want, count):
    assert not got[want == 0].any()
    # Five standard deviations of a binomial share.
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / count) + 1e-9).all()


def test_greedy_takes_the_largest_and_the_lowest_id_on_a_tie():
    batch = Batch(vocab=3)
    logits = np.array([[0.0, 3.0, 3.0], [-np.inf, -5.0, -6.0]], np.float32)
    greedy = SamplingParams(temperature=0.0)
    sequences = [
        batch.sequence(greedy, row=0, prompt=[1]),
        batch.sequence(greedy, row=1, prompt=[1]),
    ]
    assert batch.draw(logits, sequences).tolist() == [1, 1]
    assert jax.jit(argmax)(logits).tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.6},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.5},
        {"top_k": 1},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5, "frequency_penalty": -0.7},
        {"frequency_penalty": 2.0, "temperature": 0.7, "top_k": 12},
        {"logit_bias": {3: 4.0, 39: -100.0, 0: 2.5}},
        {"min_tokens": 9},
        {"min_tokens": 3},  # the answer is as long already
        {"logit_bias": {5: 3.0}, "min_tokens": 9, "repetition_penalty": 1.3, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("allowed", [None, (0, 5, 7, 31, 32, 39)], ids=["free", "masked"])
def test_frequencies_match_the_distribution(settings, allowed):
    batch, count, logits = Batch(), 20_000, random_logits(0)
    params = SamplingParams(**settings)
    prompt, answer, stop_ids = (7, 7, 12, 31), (5, 9, 9, 32), (5, 8)
    sequence = batch.sequence(params, prompt=prompt, answer=answer, stop_ids=stop_ids)
    got = batch.shares(logits, sequence, count, allowed=allowed)
    want = distribution(
        logits, params, prompt=prompt, answer=answer, allowed=allowed, stop_ids=stop_ids
    )
    assert_shares(got, want, count)


def test_penalties_follow_the_answer_as_it_grows_and_a_row_forgets_its_last_guest():
    batch = Batch()
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.2)
    logits = random_logits(3)
    sequence, other = batch.sequence(params, row=1), batch.sequence(params, row=2, prompt=(4,))
    for _ in range(100):  # more than are counted in one call
        want = distribution(
            logits, params, prompt=sequence.job.prompt_ids, answer=sequence.tokens[2:]
        ).argmax()
        token = int(batch.draw(np.tile(logits, (2, 1)), [sequence, other])[0])
        assert token == want
        sequence.tokens.append(token)
    sequence.tokens += [3] * 70  # taken without being sampled
    batch.draw(np.tile(logits, (2, 1)), [sequence, other])
    tally = np.asarray(batch.rows.device.tally)[1] & (sampling.IN_PROMPT - 1)
    assert tally.tolist() == np.bincount(sequence.tokens[2:], minlength=VOCAB).tolist()
    guest = batch.sequence(params, row=1, prompt=(9,))
    fresh = Batch()
    assert (
        batch.draw(logits[None], [guest])
        == fresh.draw(logits[None], [fresh.sequence(params, row=1, prompt=(9,))])
    ).all()


def test_a_row_with_every_setting_does_not_touch_its_neighbours():
    busy = SamplingParams(
        temperature=0.9, top_k=7, top_p=0.8, min_p=0.01, repetition_penalty=1.4, seed=5,
        presence_penalty=0.5, frequency_penalty=0.5, logit_bias={1: 5.0}, min_tokens=5,
    )  # fmt: skip
    plain = SamplingParams(temperature=1.0, seed=9)
    logits = np.stack([random_logits(i) for i in range(4)])
    for neighbour in (busy, plain):
        batch = Batch()
        sequences = [
            batch.sequence(params, row=row, answer=(3,), stop_ids=(0,))
            for row, params in enumerate([plain, neighbour, plain, neighbour])
        ]
        together = batch.draw(logits, sequences)
        for row, sequence in enumerate(sequences):
            assert batch.draw(logits[row : row + 1], [sequence])[0] == together[row]
    nobody = Batch().draw(logits, [])  # padding rows are greedy
    assert nobody.tolist() == logits.argmax(axis=1).tolist()


def test_seed_index_and_choice_change_the_draw():
    batch = Batch(vocab=1000)
    logits = np.zeros((1, 1000), np.float32)

    def drawn(seed, index, answer=()):
        sequence = batch.sequence(SamplingParams(seed=seed), prompt=(1,), answer=answer)
        sequence.index = index
        return int(batch.draw(logits, [sequence])[0])

    assert len({drawn(seed, 0) for seed in range(40)}) > 30
    assert len({drawn(7, 0, (1,) * length) for length in range(40)}) > 30
    assert [drawn(7, index) for index in range(5)] == [drawn(7 + index, 0) for index in range(5)]


def test_full_nucleus_keeps_everything_that_has_mass():
    batch = Batch(vocab=3)
    logits = np.array([[0.0, -1.0, -2.0]], np.float32)
    drawn = {
        int(batch.draw(logits, [batch.sequence(SamplingParams(top_p=1.0, seed=s), prompt=[1])])[0])
        for s in range(200)
    }
    assert drawn == {0, 1, 2}


def num_programs(batch):
    return draw._cache_size() + batch.rows.num_programs()  # pyright: ignore


def test_settings_of_any_mix_compile_once():
    batch = Batch()
    batch.draw(random_logits(0)[None], [batch.sequence(SamplingParams())])
    before = num_programs(batch)
    for params in (
        SamplingParams(temperature=0.0), SamplingParams(top_k=3, min_p=0.1),
        SamplingParams(logit_bias={1: 1.0}, min_tokens=2), SamplingParams(presence_penalty=1.0),
    ):  # fmt: skip
        batch.draw(random_logits(0)[None], [batch.sequence(params, stop_ids=(1,))], masks=[(1, 2)])
    assert num_programs(batch) == before


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
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; use 0 to max_tokens"),
        ({"min_p": 1.5}, r"min_p is 1\.5"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2\.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {1: math.nan}}, "logit_bias is .*; use up to 300 numbers"),
        ({"logit_bias": {1: 101.0}}, "logit_bias is .* from -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "up to 300"),
        ({"n": 0}, "n is 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"stop_token_ids": tuple(range(65))}, "at most 64 token ids"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ("",)}, "stop is .*; use texts of one character"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_meaningless_settings_are_refused(change, message):
    with pytest.raises(InvalidJob, match=message):
        check(SamplingParams(**change))
    check(SamplingParams())
