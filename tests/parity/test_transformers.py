"""Logits and greedy tokens against transformers, in float32, on small sharpened checkpoints."""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoints import make_checkpoint
from support.engines import final, greedy, running_engine

from engine.model import causal_attend, load_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = ["llama", "llama3", "qwen2", "qwen3"]
MARGIN = 1e-3  # below this top-2 margin, float32 sums in another order may choose the other token
TOKENS = 64


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A checkpoint directory and the same model in transformers."""
    directory = tmp_path_factory.mktemp(request.param)
    make_checkpoint(directory, request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return directory, model.eval()


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(3, 120, count)]


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def their_greedy(model, ids, answer):
    """Their greedy token and its top-2 margin after each beginning of the answer, in one pass.

    As long as every one equals ours, greedy generation of theirs would have been this answer.
    """
    logits = their_logits(model, [*ids, *answer])[len(ids) - 1 : -1]
    best = np.sort(logits, axis=1)[:, -2:]
    return logits.argmax(axis=1).tolist(), best[:, 1] - best[:, 0]


def test_logits_differ_by_less_than_1e_4(pair):
    directory, model = pair
    ours = load_checkpoint(directory).merge()
    for ids in prompts(4, seed=1):
        positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
        hidden = ours(jnp.asarray([ids], jnp.int32), positions, causal_attend)
        difference = np.asarray(ours.logits(hidden))[0] - their_logits(model, ids)
        assert np.abs(difference).max() <= 1e-4


@pytest.mark.parametrize("pages", [0, 80], ids=["plenty", "scarce"])
async def test_greedy_tokens_are_equal(pair, pages):
    """Compared up to the first near-tie; at least 90 % of all tokens must be compared."""
    directory, model = pair
    asked = prompts(16, seed=2)
    settings = {"max_num_seqs": 16, "max_model_len": 256, "num_pages": pages}
    async with running_engine(directory, **settings) as engine:
        jobs = [greedy(f"r{i}", ids, TOKENS, logprobs=2) for i, ids in enumerate(asked)]
        answers = await asyncio.gather(*(final(engine, job) for job in jobs))
        stats = engine.stats()
    assert (stats.num_preemptions > 0) == bool(pages)
    assert stats.num_recompiles == 0
    num_compared = 0
    for ids, answer in zip(asked, answers, strict=True):
        assert len(answer.token_ids) == TOKENS
        want, margins = their_greedy(model, ids, answer.token_ids)
        until = next((i for i, m in enumerate(margins) if m < MARGIN), TOKENS)
        assert list(answer.token_ids[:until]) == want[:until]
        num_compared += until
    assert num_compared >= 0.9 * TOKENS * len(asked)


async def test_deterministic_tokens_equal_the_request_alone_to_the_bit(pair):
    directory, _ = pair
    asked = prompts(16, seed=3)
    settings = {
        "max_num_seqs": 16, "max_model_len": 256, "num_pages": 80, "deterministic": True
    }  # fmt: skip
    async with running_engine(directory, **settings) as engine:
        jobs = [greedy(f"r{i}", ids, TOKENS, logprobs=2) for i, ids in enumerate(asked)]
        alone = [await final(engine, job) for job in jobs]
        together = await asyncio.gather(*(final(engine, job) for job in jobs))
        assert engine.stats().num_preemptions > 0
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.capture is not None and other.capture is not None
        np.testing.assert_array_equal(one.capture.top_logprobs, other.capture.top_logprobs)
        np.testing.assert_array_equal(one.capture.rest_logprob, other.capture.rest_logprob)


def test_chat_ids_match(tmp_path):
    from engine.text import Tokenizer

    make_checkpoint(tmp_path, "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path, vocab_size=300)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo\n"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    want = theirs.encode(rendered, add_special_tokens=False)
    assert ours.chat_ids(messages) == want
