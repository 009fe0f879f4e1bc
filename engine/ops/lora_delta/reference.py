"""Low-rank adapters of a batch, each row through its own slot, in XLA.

    y += (x @ A[slot].T) @ B[slot]          A [R, in], B [R, out], every scale in B

Ranks are visited in blocks, as many as the largest rank in the batch needs: what nobody uses is
not read, and one program serves every rank. Slot 0 holds zeros and rank 0.

Follows Hu 2021 (arXiv:2106.09685, section 4.1), batched over adapters as in Chen 2023
(arXiv:2310.18547, section 4).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.model.decoder import Adapt, unadapted

BLOCK_RANKS = 8  # per turn of the loop


class LoraStack(NamedTuple):
    """All LoRA slots on the device, by module name; of the head L is 1."""

    a: Mapping[str, Float[Array, "L S R X"]]
    b: Mapping[str, Float[Array, "L S R Y"]]
    rank: Int[Array, " S"]


def adapter_of(stack: LoraStack, slots: Int[Array, " B"]) -> Adapt:
    """The hook of the decoder for a batch whose rows have these slots."""
    if not stack.a:
        return unadapted
    num_blocks = (jnp.max(stack.rank[slots]) + BLOCK_RANKS - 1) // BLOCK_RANKS

    def adapt(layer: int, module: str, x: Array, y: Array) -> Array:
        if module not in stack.a:
            return y
        return add_lora_delta(y, x, stack.a[module], stack.b[module], layer, slots, num_blocks)

    return adapt


def add_lora_delta(
    y: Float[Array, "B T Y"],
    x: Float[Array, "B T X"],
    a: Float[Array, "L S R X"],
    b: Float[Array, "L S R Y"],
    layer: int,
    slots: Int[Array, " B"],
    num_blocks: Int[Array, ""],
) -> Float[Array, "B T Y"]:
    """The module's output `y` with every row's adapter; sums run in float32."""
    block = min(BLOCK_RANKS, a.shape[2])

    def ranks(stack: Array, index: Array) -> Array:
        size = (1, 1, block, stack.shape[3])
        start = lambda slot: (layer, slot, index * block, 0)  # noqa: E731
        return jax.vmap(lambda slot: jax.lax.dynamic_slice(stack, start(slot), size)[0, 0])(slots)

    def visit(index: Array, total: Array) -> Array:
        wide = {"preferred_element_type": jnp.float32}
        inner = jnp.einsum("BTX,BRX->BTR", x, ranks(a, index), **wide)
        return total + jnp.einsum("BTR,BRY->BTY", inner.astype(x.dtype), ranks(b, index), **wide)

    start = y.astype(jnp.float32)
    return jax.lax.fori_loop(0, num_blocks, visit, start).astype(y.dtype)
