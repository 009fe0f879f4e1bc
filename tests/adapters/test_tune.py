"""Slices of training on a small random model: their loss, its gradient, what is served of it."""

import numpy as np
import pytest
from reference import decoder as reference
from support.checkpoints import make_checkpoint
from support.engines import running_engine

from adapters.example import padded, spoken, taught
from adapters.fisher import FisherEstimate
from adapters.tune import TuneConfig, Tuner
from engine.api import Capture, Job, LoraRef
from engine.model import load_checkpoint
from engine.slots.lora import module_sizes
from engine.whole import whole_sequences

V = 300
SHAPE = {"length": 32, "num_targets": 8, "num_ids": 64, "no_id": V}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    config, tensors = make_checkpoint(directory, "qwen3")
    return directory, config, tensors


@pytest.fixture(scope="module")
def whole(checkpoint):
    model = load_checkpoint(checkpoint[0])
    return whole_sequences(model), dict(module_sizes(model.config, on_head=False))


@pytest.fixture(scope="module")
def tuner(whole):
    model, modules = whole
    return Tuner(model, modules, TuneConfig(rank=4, alpha=8.0, num_steps=40, learning_rate=1e-2))


def sentence(seed, length):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def lessons(count=4):
    return [spoken(sentence(seed, 12), sentence(100 + seed, 5)) for seed in range(count)]


def reference_nats(checkpoint, example):
    """-log p of every answer token, in float64."""
    _, config, tensors = checkpoint
    hidden = reference.hidden_states(tensors, config, example.tokens.tolist())
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).astype(np.float64)
    logits = hidden @ head.T
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    answer = example.tokens[example.first :]
    return -logits[np.arange(example.first - 1, len(example.tokens) - 1), answer]


def with_lora(tensors, table):
    """The checkpoint's tensors with the LoRA merged in."""
    merged = dict(tensors)
    for module in table.a:
        part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        for layer in range(len(table.a[module])):
            name = f"model.layers.{layer}.{part}.{module}.weight"
            delta = table.b[module][layer].T.astype(np.float64) @ table.a[module][layer]
            merged[name] = tensors[name] + delta
    return merged


def trained(tuner, examples, steps=30, **options):
    state, batch = tuner.start(0), padded(examples, **SHAPE)
    losses = []
    for _ in range(steps):
        state, seen = tuner.slice(state, batch, **options)
        losses.append(float(seen.loss))
        state = tuner.update(state)
    return state, losses


def test_the_loss_is_the_model_s_own_whatever_the_shape(checkpoint, tuner):
    examples = lessons(2)
    nats = tuner.loss(None, padded(examples, **SHAPE))
    for row, example in enumerate(examples):
        np.testing.assert_allclose(nats[row, :5], reference_nats(checkpoint, example), atol=1e-4)
    assert not nats[:, 5:].any()
    wider = tuner.loss(None, padded(examples, **{**SHAPE, "length": 64, "num_targets": 16}))
    np.testing.assert_allclose(wider[:, :5], nats[:, :5], atol=1e-4)


def test_training_lowers_it_and_the_table_says_what_the_training_said(checkpoint, tuner):
    examples = lessons()
    state, losses = trained(tuner, examples)
    assert losses[-1] < 0.5 * losses[0]
    table = tuner.table(state)
    nats = tuner.loss(table, padded(examples, **SHAPE))
    merged = (checkpoint[0], checkpoint[1], with_lora(checkpoint[2], table))
    np.testing.assert_allclose(nats[0, :5], reference_nats(merged, examples[0]), atol=2e-3)


def test_its_gradient_is_the_slope_of_the_reference(checkpoint, tuner):
    """Along the gradient itself, in float64 by differences, at factors that are not 0."""
    example = lessons(1)
    state, _ = trained(tuner, example, steps=3)
    factors = [{m: np.asarray(x, np.float64) for m, x in side.items()} for side in state.factors]
    state, seen = tuner.slice(state, padded(example, **SHAPE))
    slope = [{m: np.asarray(x, np.float64) for m, x in side.items()} for side in state.total]
    norm = np.sqrt(sum((x**2).sum() for side in slope for x in side.values()))
    assert float(seen.norm) == pytest.approx(norm, rel=1e-4)

    def loss(step):
        a, b = (
            {m: x + step * side[m] / norm for m, x in place.items()}
            for place, side in zip(factors, slope, strict=True)
        )
        table = tuner.table(state._replace(factors=(a, b)))
        exact = type(table)(a, {m: 2.0 * x for m, x in b.items()})  # alpha 8, rank 4
        merged = (checkpoint[0], checkpoint[1], with_lora(checkpoint[2], exact))
        return reference_nats(merged, example[0]).mean()

    found = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert found == pytest.approx(norm, rel=1e-2)


def test_a_teacher_s_states_teach_what_the_teacher_would_say(tuner, checkpoint):
    student, note = sentence(1, 10), sentence(2, 6)
    answer = sentence(3, 4)
    config, tensors = checkpoint[1:]
    tokens = [*note, *student, *answer]
    hidden = reference.hidden_states(tensors, config, tokens)[len(tokens) - 5 : -1]
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).astype(np.float64)
    logp = hidden @ head.T
    logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
    ids = np.argsort(-logp, axis=1)[:, :64].astype(np.int32)
    top = np.take_along_axis(logp, ids, axis=1)
    capture = Capture(
        hidden=hidden.astype(np.float32),
        top_ids=ids,
        top_logprobs=top.astype(np.float32),
        rest_logprob=np.log(1 - np.exp(top).sum(axis=1)).astype(np.float32),
    )
    example = taught(student, answer, capture)
    _, losses = trained(tuner, [example])
    assert losses[0] > 0.05
    assert losses[-1] < 0.2 * losses[0]


def test_the_penalty_keeps_what_it_guards(whole, tuner):
    """Retained sentences lose less where their Fisher information is held against the change."""
    model, modules = whole
    guarded = [spoken(sentence(50 + i, 12), sentence(60 + i, 5)) for i in range(4)]
    guard = padded(guarded, **SHAPE)
    known, _ = trained(tuner, guarded)
    below = tuner.table(known)
    tokens = guard.tokens
    counted = np.zeros(tokens.shape, bool)
    counted[:, 11:16] = True
    fisher = FisherEstimate(model, modules)(tokens, counted, seed=0, learned=below).normalised()
    before = tuner.loss(None, guard, learned=below).sum()

    def lost(weight):
        state, losses = trained(tuner, lessons(), learned=below, fisher=fisher, weight=weight)
        now = tuner.loss(tuner.table(state), guard, learned=below).sum()
        return now - before, losses[-1]

    (free, learned_free), (held, learned_held) = lost(0.0), lost(1.0)
    assert held < 0.5 * free
    assert learned_held < 5 * learned_free + 1.0


def test_slices_add_up_to_the_batch(tuner):
    examples = lessons(4)
    whole_state, _ = tuner.slice(tuner.start(0), padded(examples, **SHAPE))
    state = tuner.start(0)
    for example in examples:
        state, _ = tuner.slice(state, padded([example], **SHAPE))
    assert int(state.num_slices) == 4
    for module in ("q_proj", "down_proj"):
        np.testing.assert_allclose(
            state.total[1][module] / 4, whole_state.total[1][module], rtol=1e-3, atol=1e-6
        )


async def test_what_was_trained_is_what_is_served(checkpoint, tuner):
    examples = lessons(1)
    state, _ = trained(tuner, examples)
    table = tuner.table(state)
    nats = tuner.loss(table, padded(examples, **SHAPE))[0, :5]
    lora = LoraRef("tuned", 1, ("tuned",), table)
    async with running_engine(checkpoint[0], max_loras=1) as engine:
        job = Job(request_id="s", prompt_ids=tuple(examples[0].tokens[:12].tolist()), lora=lora)
        scored = await engine.score(job, tuple(examples[0].tokens[12:].tolist()))
    np.testing.assert_allclose([-(one.logprob or 0) for one in scored.tokens], nats, atol=2e-3)
