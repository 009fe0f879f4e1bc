"""The jitted steps. Everything the device runs for a token is in this file's programs.

  prefill   one sequence, one chunk of its prompt     → hidden states, their sum
  sample    rows of hidden states                     → tokens, captures
  decode    one token of every sequence, both at once → tokens, captures
  capture   rows of hidden states                     → captures alone (teacher-forced passes)

Integers and settings of a row travel in two small arrays, so that a call has few arguments.
Base quantities (argmax, the 64 best, log-sum-exps) are taken before edits, masks or temperature.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engine import sampling
from engine.api import MAX_LOGPROBS, NUM_CAPTURED_LOGITS
from engine.kv.pool import KVPool
from engine.model import Decoder, LoadedModel
from engine.ops.head_delta import HeadStack, add_head_delta
from engine.ops.paged_attention import append, paged_attention

# Columns of `ints` [B, 7] and `floats` [B, 2].
TOKEN, POSITION, SLOT, SEED, INDEX, TOP_K, NUM_LOGPROBS = range(7)
TEMPERATURE, TOP_P = range(2)
_LOWEST_REST = -1e4  # log of "no mass outside the 64"


class Captured(NamedTuple):
    """Base quantities per row; see `engine.api.Capture`."""

    hidden: Float[Array, "B D"]  # bfloat16
    top_ids: Int[Array, "B Q"]
    top_logprobs: Float[Array, "B Q"]
    rest_logprob: Float[Array, " B"]


class Sampled(NamedTuple):
    """What a step hands back per row. Log-probabilities are of the adapted distribution."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    best_ids: Int[Array, "B 20"]
    best_logprobs: Float[Array, "B 20"]
    captured: Captured


class Steps(NamedTuple):
    """The compiled entry points. `pool` and `stack` buffers are donated where they are written."""

    prefill: Callable[..., tuple[KVPool, Array, Array]]
    sample: Callable[..., Sampled]
    decode: Callable[..., tuple[KVPool, Sampled]]
    capture: Callable[..., Captured]

    def num_programs(self) -> int:
        """Compiled variants so far; growth after warm-up is a bug."""
        return sum(step._cache_size() for step in self)  # pyright: ignore


def make_steps(model: LoadedModel) -> Steps:
    """Build the four programs for one model. Weights are arguments, passed as a flat tuple."""
    graph = model.graph
    tree = jax.tree.structure(model.params)
    scale = model.config.head_dim**-0.5

    def decoder(leaves: tuple[Array, ...]) -> Decoder:
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))

    def prefill(
        leaves: tuple[Array, ...],
        pool: KVPool,
        tokens: Int[Array, " T"],
        span: Int[Array, " 2"],
        page_table: Int[Array, " M"],
    ) -> tuple[KVPool, Float[Array, "T D"], Float[Array, " D"]]:
        start, length = span[0], span[1]
        offset_T = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        live_T = offset_T < length
        positions = jnp.where(live_T, start + offset_T, -1)[None]
        pool, hidden = _forward(
            decoder(leaves), pool, tokens[None], positions, page_table[None], scale
        )
        hidden = hidden[0]
        total = jnp.where(live_T[:, None], hidden.astype(jnp.float32), 0.0).sum(axis=0)
        return pool, hidden, total

    def sample(
        leaves: tuple[Array, ...],
        stack: HeadStack,
        hidden: Float[Array, "B D"],
        ints: Int[Array, "B 7"],
        floats: Float[Array, "B 2"],
    ) -> Sampled:
        return _sample(decoder(leaves).logits(hidden), hidden, stack, ints, floats)

    def decode(
        leaves: tuple[Array, ...],
        pool: KVPool,
        stack: HeadStack,
        ints: Int[Array, "B 7"],
        floats: Float[Array, "B 2"],
        page_table: Int[Array, "B M"],
    ) -> tuple[KVPool, Sampled]:
        model = decoder(leaves)
        tokens, positions = ints[:, TOKEN, None], ints[:, POSITION, None]
        pool, hidden = _forward(model, pool, tokens, positions, page_table, scale)
        hidden = hidden[:, 0]
        return pool, _sample(model.logits(hidden), hidden, stack, ints, floats)

    def capture(leaves: tuple[Array, ...], hidden: Float[Array, "B D"]) -> Captured:
        return _capture(decoder(leaves).logits(hidden), hidden)

    return Steps(
        jax.jit(prefill, donate_argnums=1),
        jax.jit(sample),
        jax.jit(decode, donate_argnums=1),
        jax.jit(capture),
    )


def _forward(
    model: Decoder, pool: KVPool, tokens: Array, positions: Array, page_table: Array, scale: float
) -> tuple[KVPool, Array]:
    """Append the new tokens' keys and values, attend over the pages, return final states."""
    layers = list(pool)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        keys, values = 2 * layer, 2 * layer + 1
        layers[keys] = append(layers[keys], k, page_table, positions)
        layers[values] = append(layers[values], v, page_table, positions)
        return paged_attention(q, layers[keys], layers[values], page_table, positions, scale=scale)

    hidden = model(tokens, jnp.maximum(positions, 0), attend)
    return tuple(layers), hidden


def _capture(logits: Float[Array, "B V"], hidden: Float[Array, "B D"]) -> Captured:
    size = min(NUM_CAPTURED_LOGITS, logits.shape[1])
    total_B1 = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    best, ids = _top_k(logits, size)
    rows_B1 = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    rest = logits.at[rows_B1, ids].set(-jnp.inf)
    rest_logprob = jax.nn.logsumexp(rest, axis=1) - total_B1[:, 0]
    return Captured(
        hidden.astype(jnp.bfloat16), ids, best - total_B1, jnp.maximum(rest_logprob, _LOWEST_REST)
    )


def _top_k(x: Float[Array, "B V"], size: int) -> tuple[Array, Array]:
    """Largest values and their ids. The barrier keeps a later slice of the ids from hiding the
    pattern that XLA:CPU turns into a partial sort; without it 16 x 1,100 take 2.2 ms, not 0.1."""
    best, ids = jax.lax.optimization_barrier(jax.lax.top_k(x, size))
    return best, ids


def _sample(
    base: Float[Array, "B V"],
    hidden: Float[Array, "B D"],
    stack: HeadStack,
    ints: Int[Array, "B 7"],
    floats: Float[Array, "B 2"],
) -> Sampled:
    captured = _capture(base, hidden)
    logits = add_head_delta(base, hidden, captured.top_ids[:, 0], ints[:, SLOT], stack)
    token = sampling.sample(
        logits,
        floats[:, TEMPERATURE],
        ints[:, TOP_K],
        floats[:, TOP_P],
        ints[:, SEED],
        ints[:, INDEX],
    )
    total_B = jax.nn.logsumexp(logits, axis=1)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - total_B
    num_best = min(MAX_LOGPROBS, logits.shape[1])
    best, ids = jax.lax.cond(
        jnp.any(ints[:, NUM_LOGPROBS] > 0),
        lambda: _top_k(logits, num_best),
        lambda: (
            jnp.zeros((logits.shape[0], num_best), logits.dtype),
            jnp.zeros((logits.shape[0], num_best), jnp.int32),
        ),
    )
    return Sampled(token, logprob, ids, best - total_B[:, None], captured)
