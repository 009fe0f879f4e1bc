"""The jitted steps. Everything the device runs for a token is in this file's programs.

  forward   new tokens of one prompt, or one of every answer   → hidden states
  sample    rows of hidden states                              → tokens, captures
  decode    both in one, for one token of every answer
  read      rows of hidden states and the tokens they precede  → log-probabilities
  capture   rows of hidden states                              → captures alone
  copy      pages onto pages

Integers and settings of a row travel in two small arrays, so that a call has few arguments.
Base quantities (argmax, the 64 best, log-sum-exps) are taken before head edits, masks or
temperature. On an accelerator a step is forward and then sample, and the host fills in masks
while forward runs; on a CPU a second call costs more than the masks, and a step is decode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engine import sampling
from engine.api import MAX_LOGPROBS, NUM_CAPTURED_LOGITS
from engine.kv.pool import KVPool, copy_pages
from engine.model import Decoder, LoadedModel
from engine.ops.head_delta import HeadStack, add_head_delta
from engine.ops.lora_delta import LoraStack, adapter_of
from engine.ops.paged_attention import append, paged_attention
from engine.sampling import NUM_LOGPROBS, SLOT, Rows

_LOWEST_REST = -1e4  # log of "no mass outside the 64"


class Captured(NamedTuple):
    """Base quantities per row; see `engine.api.Capture`."""

    hidden: Float[Array, "B D"]  # bfloat16
    top_ids: Int[Array, "B Q"]
    top_logprobs: Float[Array, "B Q"]
    rest_logprob: Float[Array, " B"]


class Read(NamedTuple):
    """Log-probabilities per row, of the adapted distribution at temperature 1."""

    logprob: Float[Array, " B"]  # of the row's token
    best_ids: Int[Array, "B 20"]
    best_logprobs: Float[Array, "B 20"]


class Sampled(NamedTuple):
    """What a step hands back per row."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    best_ids: Int[Array, "B 20"]
    best_logprobs: Float[Array, "B 20"]
    captured: Captured


class Batch(NamedTuple):
    """What describes the rows of a batch that are sampled; made on the host."""

    masks: Int[Array, "B W"]
    ints: Int[Array, "B 9"]
    floats: Float[Array, "B 6"]


class Steps(NamedTuple):
    """The compiled entry points. Those that write the pool take it and give it back."""

    forward: Callable[..., tuple[KVPool, Array]]
    sample: Callable[..., Sampled]
    decode: Callable[..., tuple[KVPool, Array, Sampled]]
    read: Callable[..., Read]
    capture: Callable[..., Captured]
    copy: Callable[..., KVPool]

    def num_programs(self) -> int:
        """Compiled variants so far; growth after warm-up is a bug."""
        return sum(step._cache_size() for step in self)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class _Programs:
    """What is compiled, over one model's graph; its weights come as a flat tuple of leaves."""

    graph: nnx.GraphDef
    tree: Any  # jax does not export the type of a tree structure
    scale: float  # of attention scores

    def _decoder(self, leaves: tuple[Array, ...]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))

    def forward(
        self,
        leaves: tuple[Array, ...],
        pool: KVPool,
        loras: LoraStack,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        page_table: Int[Array, "B M"],
        lora_slots: Int[Array, " B"],
    ) -> tuple[KVPool, Float[Array, "B T D"]]:
        """Position -1 marks padding: nothing is written there, and its state means nothing."""
        layers = list(pool)

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            keys, values = 2 * layer, 2 * layer + 1
            layers[keys] = append(layers[keys], k, page_table, positions)
            layers[values] = append(layers[values], v, page_table, positions)
            return paged_attention(
                q, layers[keys], layers[values], page_table, positions, scale=self.scale
            )

        adapt = adapter_of(loras, lora_slots)
        hidden = self._decoder(leaves)(tokens, jnp.maximum(positions, 0), attend, adapt)
        return tuple(layers), hidden

    def sample(
        self,
        leaves: tuple[Array, ...],
        stack: HeadStack,
        loras: LoraStack,
        rows: Rows,
        hidden: Float[Array, "B 1 D"],
        batch: Batch,
        lora_slots: Int[Array, " B"],
    ) -> Sampled:
        base = self._decoder(leaves).logits(hidden, adapter_of(loras, lora_slots))[:, 0]
        captured = _capture(base, hidden[:, 0])
        slots = batch.ints[:, SLOT]
        logits = add_head_delta(base, hidden[:, 0], captured.top_ids[:, 0], slots, stack)
        token = sampling.sample(logits, rows, *batch)
        return Sampled(token, *_read(logits, token, batch.ints[:, NUM_LOGPROBS]), captured)

    def decode(
        self,
        leaves: tuple[Array, ...],
        pool: KVPool,
        stack: HeadStack,
        loras: LoraStack,
        rows: Rows,
        tokens: Int[Array, "B 1"],
        positions: Int[Array, "B 1"],
        page_table: Int[Array, "B M"],
        batch: Batch,
        lora_slots: Int[Array, " B"],
    ) -> tuple[KVPool, Float[Array, "B 1 D"], Sampled]:
        pool, hidden = self.forward(leaves, pool, loras, tokens, positions, page_table, lora_slots)
        return pool, hidden, self.sample(leaves, stack, loras, rows, hidden, batch, lora_slots)

    def read(
        self,
        leaves: tuple[Array, ...],
        stack: HeadStack,
        loras: LoraStack,
        hidden: Float[Array, "B D"],
        tokens: Int[Array, " B"],
        slot: Int[Array, " 2"],
        num_logprobs: Int[Array, " B"],
    ) -> Read:
        """All rows are of one sequence, with its head slot and its LoRA slot."""
        base = self._decoder(leaves).logits(hidden[None], adapter_of(loras, slot[1:]))[0]
        slots = jnp.broadcast_to(slot[0], tokens.shape)
        logits = add_head_delta(base, hidden, sampling.argmax(base), slots, stack)
        return Read(*_read(logits, tokens, num_logprobs))

    def capture(self, leaves: tuple[Array, ...], hidden: Float[Array, "B D"]) -> Captured:
        return _capture(self._decoder(leaves).logits(hidden), hidden)


def make_steps(model: LoadedModel) -> Steps:
    """Build the programs for one model. Weights are arguments, passed as a flat tuple."""
    programs = _Programs(model.graph, jax.tree.structure(model.params), model.config.head_dim**-0.5)
    return Steps(
        jax.jit(programs.forward, donate_argnums=1),
        jax.jit(programs.sample),
        jax.jit(programs.decode, donate_argnums=1),
        jax.jit(programs.read),
        jax.jit(programs.capture),
        jax.jit(copy_pages, donate_argnums=0),
    )


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


def _read(logits: Array, tokens: Array, num_logprobs: Array) -> tuple[Array, Array, Array]:
    """Log-probability of each row's token; the best tokens and theirs where any row asks."""
    total_B = jax.nn.logsumexp(logits, axis=1)
    logprob = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - total_B
    num_best = min(MAX_LOGPROBS, logits.shape[1])
    best, ids = jax.lax.cond(
        jnp.any(num_logprobs > 0),
        lambda: _top_k(logits, num_best),
        lambda: (
            jnp.zeros((logits.shape[0], num_best), logits.dtype),
            jnp.zeros((logits.shape[0], num_best), jnp.int32),
        ),
    )
    return logprob, ids, best - total_B[:, None]
