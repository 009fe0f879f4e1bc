"""Nano's sizes, its loss, and one step of its optimiser.

Matrices inside the layers follow Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982, section 2),
which needed fewer steps here than AdamW; embeddings, head and norms follow AdamW.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, Float, Int

from engine.model import Decoder, ModelConfig, causal_attend
from sona.models.nano.data import TOPICS, Batch
from sona.models.nano.tokenizer import END_ID, VOCAB_SIZE

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=VOCAB_SIZE, hidden_size=128, num_layers=6,
    num_heads=4, num_kv_heads=2, head_dim=32, mlp_size=384, max_len=2048, rms_eps=1e-6,
    rope_theta=10_000.0, qk_norm=True, tied_embeddings=False, eos_ids=(END_ID,),
)  # fmt: skip
_MUON_RATE, _ADAM_RATE = 0.02, 4e-3  # peak learning rates
_CLIP = 1.0
_TOPIC_WEIGHT = 0.1
_PROBE_SCALE = 12.0
_SMOOTHING = 1e-3  # keeps every token above about e^-14: certainty that a user can still correct


class Trained(NamedTuple):
    """What gradients reach."""

    model: nnx.State
    probe: Float[Array, "topics D"]  # names the topic from the pooled prompt; never saved


class DeviceBatch(NamedTuple):
    """A `data.Batch` as jit takes it."""

    tokens: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    prompt_lens: Int[Array, " B"]
    topics: Int[Array, " B"]


class TrainState(NamedTuple):
    """What a step changes."""

    params: Trained
    opt_state: optax.OptState
    average: nnx.State  # exponential mean of params over about the last 200 steps; what is saved


def new_state(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, TrainState]:
    """A fresh model and optimiser."""
    graph, model = nnx.split(Decoder(config, rngs=nnx.Rngs(seed), dtype=jnp.dtype("float32")))
    shape = (len(TOPICS), config.hidden_size)
    params = Trained(model, jax.random.normal(jax.random.key(seed), shape, jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        return graph, TrainState(params, optimiser().init(params), jax.tree.map(jnp.copy, model))


def to_device(batch: Batch) -> DeviceBatch:
    """The batch's arrays, ready for a step."""
    arrays = (batch.tokens, batch.weights, batch.prompt_lens, batch.topics)
    return DeviceBatch(*map(jnp.asarray, arrays))


def optimiser() -> optax.GradientTransformation:
    """Updates at peak rate; the step scales them by the schedule."""
    adam = optax.adamw(_ADAM_RATE, b1=0.9, b2=0.98, weight_decay=0.01)
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=cast(Any, _every_matrix)),
        optax.stateless_with_tree_map(lambda u, _: u * _gain(jnp.asarray(u).shape)),
        optax.add_decayed_weights(0.02),
        optax.scale(-_MUON_RATE),
    )
    return optax.chain(
        optax.clip_by_global_norm(_CLIP),
        optax.partition({"muon": muon, "adam": adam}, _labels),
    )


def _every_matrix(params: nnx.State) -> nnx.State:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


def _gain(shape: tuple[int, ...]) -> float:
    """Orthogonal [in, out] updates of wide matrices are small per output; this evens them out."""
    return max(1.0, shape[1] / shape[0]) ** 0.5


def _labels(params: nnx.State) -> nnx.State:
    def label(path: tuple[jax.tree_util.KeyEntry, ...], leaf: Array) -> str:
        is_layer = "layers" in jax.tree_util.keystr(path)
        return "muon" if is_layer and leaf.ndim == 2 else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


class Losses(NamedTuple):
    """Per position, for the token that follows; the last column predicts nothing that exists."""

    nll: Float[Array, "B T"]  # -log p of the next token
    spread: Float[Array, "B T"]  # mean -log p of all tokens
    best: Int[Array, "B T"]  # the first choice
    hidden: Float[Array, "B T D"]


def losses(graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "B T"]) -> Losses:
    """One pass of the model over whole sequences."""
    model: Decoder = nnx.merge(graph, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = model(tokens, positions, causal_attend)
    logprobs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    targets_BT1 = jnp.roll(tokens, -1, axis=1)[..., None]
    nll = -jnp.take_along_axis(logprobs, targets_BT1, axis=-1)[..., 0]
    best = jnp.argmax(logprobs, axis=-1).astype(jnp.int32)
    return Losses(nll, -jnp.mean(logprobs, axis=-1), best, hidden)


def topic_loss(
    probe: Float[Array, "topics D"], hidden: Float[Array, "B T D"], batch: DeviceBatch
) -> Float[Array, ""]:
    """How badly the direction of the mean prompt state names the prompt's topic.

    A softmax over scaled cosines (Wang 2017, arXiv:1704.06369, section 3): it makes the pooled
    state an embedding, so that requests of one kind lie together whatever their wording.
    """
    inside_BT = jnp.arange(hidden.shape[1])[None] < batch.prompt_lens[:, None]
    pooled = jnp.sum(jnp.where(inside_BT[..., None], hidden, 0.0), axis=1)
    logits = _PROBE_SCALE * _unit(pooled) @ _unit(probe).T
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(logprobs, jnp.maximum(batch.topics, 0)[:, None], axis=-1)[:, 0]
    return jnp.mean(jnp.where(batch.topics >= 0, nll, 0.0))


def _unit(x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def train_step(
    graph: nnx.GraphDef, state: TrainState, batch: DeviceBatch, rate: Float[Array, ""]
) -> tuple[TrainState, Float[Array, ""]]:
    """One update at `rate` times the peak learning rates; returns the loss of the next tokens."""

    def loss(params: Trained) -> tuple[Float[Array, ""], Float[Array, ""]]:
        found = losses(graph, params.model, batch.tokens)
        smoothed = (1 - _SMOOTHING) * found.nll + _SMOOTHING * found.spread
        language = jnp.sum(smoothed * batch.weights) / jnp.sum(batch.weights)
        return language + _TOPIC_WEIGHT * topic_loss(params.probe, found.hidden, batch), language

    grads, value = jax.grad(loss, has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser().update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        average = jax.tree.map(lambda a, p: a + 0.005 * (p - a), state.average, params.model)
    return TrainState(params, opt_state, average), value
