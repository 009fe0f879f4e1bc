"""Logits to a token, on the device, every row by its own settings in one program.

The order is the field's: form of the answer, single biases, penalties, temperature, top-k, top-p,
min-p, draw. Thresholds are found by bisection on the ordered bit pattern of a float32, so nothing
is sorted; the draw is the Gumbel maximum with a key made of the request's seed and the token's
index, so it does not depend on the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.errors import InvalidJob
from engine.params import SamplingParams

# Columns of `ints` and `floats`, which describe the rows of a batch.
SLOT, SEED, INDEX, TOP_K, NUM_LOGPROBS, ROW, IS_BIASED, IS_PENALISED, IS_MASKED = range(9)
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
NUM_INTS, NUM_FLOATS = 9, 6

IN_PROMPT = 1 << 30  # of a tally: the token occurs in the prompt
_FLOOR = -1e30
_BITS = 32  # of a float32 pattern: turns of a bisection


class Rows(NamedTuple):
    """What a sampled row remembers on the device, by its row of the page table.

    Padding of `bias_ids` is V. Written when a sequence that needs it takes the row.
    """

    tally: Int[Array, "N V"]  # times generated, plus IN_PROMPT
    bias_ids: Int[Array, "N L"]
    bias: Float[Array, "N L"]
    bias_until: Int[Array, "N L"]  # index of the first token that the bias spares


def check(params: SamplingParams) -> None:
    """Refuse settings that mean nothing. Raises InvalidJob naming the first."""
    fault = params.fault()
    if fault is not None:
        name, value, allowed = fault
        raise InvalidJob(f"{name} is {value}; use {allowed}")


def sample(
    logits: Float[Array, "B V"],
    rows: Rows,
    masks: Int[Array, "B W"],
    ints: Int[Array, "B 9"],
    floats: Float[Array, "B 6"],
) -> Int[Array, " B"]:
    """One token per row. Temperature 0 takes the largest logit (the lowest id on a tie).

    `masks` has a bit for every token that the form of the answer allows, the lowest first.
    """
    is_shaped = jnp.any(ints[:, (IS_MASKED, IS_BIASED, IS_PENALISED)] > 0)
    logits = jax.lax.cond(
        is_shaped, lambda x: _shaped(x, rows, masks, ints, floats), lambda x: x, logits
    )
    greedy = argmax(logits)
    is_drawn = floats[:, TEMPERATURE] > 0
    drawn = jax.lax.cond(jnp.any(is_drawn), lambda: _draw(logits, ints, floats), lambda: greedy)
    return jnp.where(is_drawn, drawn, greedy)


def argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Lowest id of the largest logit: two plain reductions, which XLA vectorises on a CPU."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    is_best = logits == jnp.max(logits, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_best, ids, logits.shape[1] - 1), axis=1)


def _shaped(logits: Array, rows: Rows, masks: Array, ints: Array, floats: Array) -> Array:
    """Logits after everything that depends on more than themselves; each part only if asked."""
    for column, shape in (
        (IS_MASKED, lambda x: _masked(x, masks, ints)),
        (IS_BIASED, lambda x: _biased(x, rows, ints)),
        (IS_PENALISED, lambda x: _penalised(x, rows, ints, floats)),
    ):
        logits = jax.lax.cond(jnp.any(ints[:, column] > 0), shape, lambda x: x, logits)
    return logits


def _masked(logits: Array, masks: Array, ints: Array) -> Array:
    token = jnp.arange(logits.shape[1], dtype=jnp.int32)
    is_allowed = (masks[:, token >> 5] >> (token & 31)[None]) & 1 > 0
    return jnp.where((ints[:, IS_MASKED, None] > 0) & ~is_allowed, _FLOOR, logits)


def _biased(logits: Array, rows: Rows, ints: Array) -> Array:
    row, index = ints[:, ROW], ints[:, INDEX, None]
    is_on = (ints[:, IS_BIASED, None] > 0) & (index < rows.bias_until[row])
    ids = jnp.where(is_on, rows.bias_ids[row], logits.shape[1])
    batch_B1 = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[batch_B1, ids].add(rows.bias[row], mode="drop")


def _penalised(logits: Array, rows: Rows, ints: Array, floats: Array) -> Array:
    """Repetition (Keskar 2019, arXiv:1909.05858, section 4.1), presence and frequency."""
    tally = rows.tally[ints[:, ROW]]
    count = (tally & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition = floats[:, REPETITION, None]
    shrunk = jnp.where(logits > 0, logits / repetition, logits * repetition)
    changed = jnp.where(tally != 0, shrunk, logits)
    changed = changed - floats[:, FREQUENCY, None] * count
    changed = changed - jnp.where(count > 0, floats[:, PRESENCE, None], 0.0)
    return jnp.where(ints[:, IS_PENALISED, None] > 0, changed, logits)


def _draw(logits: Array, ints: Array, floats: Array) -> Array:
    scaled = logits / jnp.maximum(floats[:, TEMPERATURE, None], 1e-6)
    top_k, top_p, min_p = ints[:, TOP_K], floats[:, TOP_P], floats[:, MIN_P]
    size = logits.shape[1]
    kept = jax.lax.cond(
        jnp.any((top_k > 0) | (top_p < 1.0)),
        lambda: _nucleus(scaled, jnp.where(top_k > 0, jnp.minimum(top_k, size), size), top_p),
        lambda: scaled,
    )
    least = jnp.max(scaled, axis=1, keepdims=True) + jnp.log(min_p)[:, None]  # log 0 keeps all
    kept = jnp.where(scaled >= least, kept, _FLOOR)
    noise = jax.vmap(lambda s, i: _gumbel(s, i, size))(ints[:, SEED], ints[:, INDEX])
    return argmax(kept + noise)


def _gumbel(seed: Array, index: Array, size: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _nucleus(scaled: Array, top_k: Array, top_p: Array) -> Array:
    """Rows with everything outside top-k, then top-p, at the floor (Holtzman 2020, section 3.1)."""
    ordered = _ordered(scaled)
    rows = scaled.shape[0]
    by_rank = _bisect(lambda t: (ordered >= t[:, None]).sum(axis=1, dtype=jnp.int32) >= top_k, rows)
    kept = jnp.where(ordered >= by_rank[:, None], scaled, _FLOOR)
    probability = jax.nn.softmax(kept, axis=1)
    # A hair below top_p: float sums of a full distribution may fall short of 1.
    wanted = jnp.minimum(top_p, 1.0 - 1e-6)
    by_mass = _bisect(
        lambda t: jnp.where(ordered >= t[:, None], probability, 0.0).sum(axis=1) >= wanted, rows
    )
    return jnp.where(ordered >= by_mass[:, None], kept, _FLOOR)


def _ordered(x: Array) -> Array:
    """Unsigned integers in the same order as the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(holds: Callable[[Array], Array], rows: int) -> Array:
    """Largest threshold [B] per row for which `holds`, built bit by bit from the top."""

    def turn(i: Array, low: Array) -> Array:
        trial = low | (jnp.uint32(1) << (jnp.uint32(_BITS - 1) - i.astype(jnp.uint32)))
        return jnp.where(holds(trial), trial, low)

    return jax.lax.fori_loop(0, _BITS, turn, jnp.zeros((rows,), jnp.uint32))
