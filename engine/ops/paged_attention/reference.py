"""Attention over a paged KV pool in XLA: decode, prefill chunks and mixtures are one call.

A query is a (page-table row, position) pair. Keys are visited in blocks of pages with an online
softmax, so no score matrix over the context exists and the number of blocks follows the longest
live sequence, not the largest possible one. A block in which a query sees nothing leaves its
sums untouched to the bit; the result of a row does not depend on how long the others are.

Follows Kwon 2023 (arXiv:2309.06180, section 4.1) for the pages and Milakov 2018
(arXiv:1805.02867, section 3) for the running softmax.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engine.errors import ShapeError

_FLOOR = -1e30  # finite stand-in for -inf: keeps rows that see nothing free of NaN
BLOCK_TOKENS = 64  # keys per turn of the loop


def append(
    pages: Float[Array, "P C K H"],
    new: Float[Array, "B T K H"],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
) -> Float[Array, "P C K H"]:
    """Write each new token's row at its position. Position -1 marks padding: not written.

    In place when the caller donates `pages`.
    """
    page_size = pages.shape[1]
    column = jnp.maximum(positions, 0) // page_size
    page = jnp.take_along_axis(page_table, column, axis=1)
    page = jnp.where(positions >= 0, page, pages.shape[0])  # out of range: dropped
    return pages.at[page, positions % page_size].set(new.astype(pages.dtype), mode="drop")


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P C K H"],
    v_pages: Float[Array, "P C K H"],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attend each new token to its own sequence's keys at positions up to its own.

    Args:
      q: queries; any float dtype. Sums run in float32.
      k_pages, v_pages: the pool, new tokens already written. Rows nobody reaches may hold NaN.
      page_table: pool index of each page in order. Unused entries: any value in [0, P).
      positions: absolute position of each query; -1 marks padding.
      scale: logit multiplier, usually H ** -0.5.

    Returns:
      Output in `q.dtype`; zeros for padding.

    Raises:
      ShapeError: N is not a multiple of K.
    """
    batch, num_new, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pages.shape[1], k_pages.shape[2]
    if num_heads % num_kv_heads:
        raise ShapeError(f"{num_heads} query heads do not divide into {num_kv_heads} kv heads")
    group = num_heads // num_kv_heads
    block_pages = max(1, min(BLOCK_TOKENS // page_size, page_table.shape[1]))
    block = block_pages * page_size

    q_BKTGH = (
        (q.astype(jnp.float32) * scale)
        .reshape(batch, num_new, num_kv_heads, group, head_dim)
        .transpose(0, 2, 1, 3, 4)
    )
    last_B = jnp.max(positions, axis=1)
    table_BM = _pad_columns(page_table, block_pages)

    def visit(index: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        columns = jax.lax.dynamic_slice_in_dim(table_BM, index * block_pages, block_pages, 1)
        flat = (batch, block, num_kv_heads, head_dim)
        k_BSKH = k_pages[columns].reshape(flat).astype(jnp.float32)
        v_BSKH = v_pages[columns].reshape(flat).astype(jnp.float32)
        key_S = index * block + jnp.arange(block, dtype=jnp.int32)
        live_BS = key_S[None, :] <= last_B[:, None]
        v_BSKH = jnp.where(live_BS[:, :, None, None], v_BSKH, 0.0)  # 0 * NaN would stay NaN
        seen_BTS = key_S[None, None, :] <= positions[:, :, None]
        return _accumulate(sums, q_BKTGH, k_BSKH, v_BSKH, seen_BTS)

    num_blocks = jnp.max(last_B) // block + 1
    shape = (batch, num_kv_heads, num_new, group)
    start = (jnp.full(shape, _FLOOR), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    _, total, out = jax.lax.fori_loop(0, num_blocks, visit, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def _accumulate(
    sums: tuple[Array, Array, Array],
    q_BKTGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    seen_BTS: Array,
) -> tuple[Array, Array, Array]:
    """One turn of the online softmax: rescale what was summed, add this block."""
    peak, total, out = sums
    mask = seen_BTS[:, None, :, None, :]
    logits = jnp.einsum("BKTGH,BSKH->BKTGS", q_BKTGH, k_BSKH)
    logits = jnp.where(mask, logits, _FLOOR)
    new_peak = jnp.maximum(peak, logits.max(axis=-1))
    weight = jnp.where(mask, jnp.exp(logits - new_peak[..., None]), 0.0)
    shrink = jnp.exp(peak - new_peak)
    total = total * shrink + weight.sum(axis=-1)
    out = out * shrink[..., None] + jnp.einsum("BKTGS,BSKH->BKTGH", weight, v_BSKH)
    return new_peak, total, out


def _pad_columns(table: Int[Array, "B M"], multiple: int) -> Int[Array, "B M2"]:
    """Widen the page table so that blocks divide it; the extra entries are never live."""
    extra = -table.shape[1] % multiple
    return jnp.pad(table, ((0, 0), (0, extra)))
