"""Head edits of a batch, each row through its own slot, in XLA.

Slot 0 means no edit and is selected with `where`, never by multiplying with a gate: 0 * inf would
be NaN, and a row without edits must keep its logits to the bit. The delta enters after everything
that shapes base logits; the embedding table is never touched.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMALL_ROWS = 256  # most slots touch fewer vocabulary rows; the rest is then not even read


class HeadStack(NamedTuple):
    """All head slots on the device. Padding: id -1 in `token_ids`, id V in `row_ids`."""

    keys: Float[Array, "A R D"]
    token_ids: Int[Array, "A E"]
    token_keys: Float[Array, "A R E"]
    const_keys: Float[Array, "A R"]
    row_ids: Int[Array, "A J"]
    values: Float[Array, "A R J"]
    num_rows: Int[Array, " A"]


def add_head_delta(
    logits: Float[Array, "B V"],
    hidden: Float[Array, "B D"],
    base_argmax: Int[Array, " B"],
    slots: Int[Array, " B"],
    stack: HeadStack,
) -> Float[Array, "B V"]:
    """Base logits plus each row's head edits, in float32.

    u[r] = keys[r] . h + token_keys[r, t] where token_ids[t] is the base argmax + const_keys[r];
    vocabulary row row_ids[j] is shifted by sum_r u[r] * values[r, j].
    """
    widths = [0, *(w for w in (SMALL_ROWS,) if w < stack.row_ids.shape[1]), stack.row_ids.shape[1]]
    most = jnp.max(stack.num_rows[slots])
    size = jnp.sum(most > jnp.array(widths[:-1], jnp.int32), dtype=jnp.int32)
    branches = [lambda: logits] + [
        functools.partial(_shifted, logits, hidden, base_argmax, slots, stack, width)
        for width in widths[1:]
    ]
    shifted = jax.lax.switch(size, branches)
    return jnp.where((slots > 0)[:, None], shifted, logits)


def _shifted(
    logits: Array, hidden: Array, base_argmax: Array, slots: Array, stack: HeadStack, width: int
) -> Array:
    with_edits = slots > 0
    hit_BE = stack.token_ids[slots] == base_argmax[:, None]
    token_BRE = jnp.where(hit_BE[:, None, :], stack.token_keys[slots], 0.0)
    u_BR = jnp.einsum("BD,BRD->BR", hidden.astype(jnp.float32), stack.keys[slots])
    u_BR = u_BR + token_BRE.sum(axis=-1) + stack.const_keys[slots]
    delta_BJ = jnp.einsum("BR,BRJ->BJ", u_BR, _first_rows(stack.values, slots, width))
    row_ids_BJ = stack.row_ids[slots][:, :width]
    rows_BJ = jnp.where(with_edits[:, None], row_ids_BJ, logits.shape[1])
    batch_B1 = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[batch_B1, rows_BJ].add(delta_BJ, mode="drop")


def _first_rows(
    values: Float[Array, "A R J"], slots: Int[Array, " B"], width: int
) -> Float[Array, "B R W"]:
    """The first `width` columns of each slot in use, as one gather: no slot beyond is read."""
    size = (1, values.shape[1], width)
    zero = jnp.int32(0)
    return jax.vmap(lambda slot: jax.lax.dynamic_slice(values, (slot, zero, zero), size)[0])(slots)
