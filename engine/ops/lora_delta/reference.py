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

    def adapt(layer: int, x: Array, outputs: dict[str, Array]) -> tuple[Array, ...]:
        modules = tuple(module for module in outputs if module in stack.a)
        factors = tuple((stack.a[module], stack.b[module]) for module in modules)
        ys = tuple(outputs[module] for module in modules)
        adapted = add_lora_delta(ys, x, factors, layer, slots, num_blocks)
        return tuple((outputs | dict(zip(modules, adapted, strict=True))).values())

    return adapt


def add_lora_delta(
    ys: tuple[Float[Array, "B T _"], ...],
    x: Float[Array, "B T X"],
    factors: tuple[tuple[Float[Array, "L S R X"], Float[Array, "L S R _"]], ...],
    layer: int,
    slots: Int[Array, " B"],
    num_blocks: Int[Array, ""],
) -> tuple[Float[Array, "B T _"], ...]:
    """Outputs of the modules that read `x`, with every row's adapter; sums run in float32."""
    if not ys:
        return ys
    block = min(BLOCK_RANKS, factors[0][0].shape[2])

    def ranks(stack: Array, index: Array) -> Array:
        size = (1, 1, block, stack.shape[3])
        start = index * block
        return jax.vmap(
            lambda slot: jax.lax.dynamic_slice(stack, (layer, slot, start, 0), size)[0, 0]
        )(slots)

    def visit(index: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        added = []
        for total, (a, b) in zip(totals, factors, strict=True):
            inner = jnp.einsum(
                "BTX,BRX->BTR", x, ranks(a, index), preferred_element_type=jnp.float32
            )
            outer = ranks(b, index).astype(jnp.float32)
            # Rank by rank: XLA:CPU fuses and vectorises it, a batch of thin products it does not.
            for rank in range(block):
                total = total + inner[:, :, rank, None] * outer[:, None, rank]
            added.append(total)
        return tuple(added)

    wide_ys = tuple(y.astype(jnp.float32) for y in ys)
    totals = jax.lax.fori_loop(0, num_blocks, visit, wide_ys)
    return tuple(total.astype(y.dtype) for total, y in zip(totals, ys, strict=True))
