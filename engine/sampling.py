"""Logits to a token, on the device, every row by its own settings in one program.

The order is the field's: temperature, top-k, top-p, draw. Thresholds are found by bisection on
the ordered bit pattern of a float32, so nothing is sorted; the draw is the Gumbel maximum with a
key made of the request's seed and the token's index, so it does not depend on the batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.api import SamplingParams
from engine.errors import InvalidJob

_FLOOR = -1e30
_BITS = 32  # of a float32 pattern: turns of a bisection


def check(params: SamplingParams) -> None:
    """Refuse settings that mean nothing. Raises InvalidJob naming the first."""
    fault = params.fault()
    if fault is not None:
        name, value, allowed = fault
        raise InvalidJob(f"{name} is {value}; use {allowed}")


def sample(
    logits: Float[Array, "B V"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    seed: Int[Array, " B"],
    index: Int[Array, " B"],
) -> Int[Array, " B"]:
    """One token per row. Temperature 0 takes the largest logit (the lowest id on a tie)."""
    greedy = argmax(logits)
    drawn = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: _draw(logits, temperature, top_k, top_p, seed, index),
        lambda: greedy,
    )
    return jnp.where(temperature > 0, drawn, greedy)


def argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Lowest id of the largest logit: two plain reductions, which XLA vectorises on a CPU."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    is_best = logits == jnp.max(logits, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_best, ids, logits.shape[1] - 1), axis=1)


def _draw(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, seed: Array, index: Array
) -> Array:
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    size = logits.shape[1]
    limited = (top_k > 0) | (top_p < 1.0)
    kept = jax.lax.cond(
        jnp.any(limited),
        lambda: _nucleus(scaled, jnp.where(top_k > 0, jnp.minimum(top_k, size), size), top_p),
        lambda: scaled,
    )
    noise = jax.vmap(lambda s, i: _gumbel(s, i, size))(seed, index)
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
