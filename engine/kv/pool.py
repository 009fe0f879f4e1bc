"""The arrays of the KV cache: one pair per layer, pages first."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KVPool = tuple[Float[Array, "P C K H"], ...]
"""Keys of layer 0, values of layer 0, keys of layer 1, … Donated to every step that writes."""


def new_pool(
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> KVPool:
    """A pool of zeros. What a page held before belongs to nobody: readers mask by position."""
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    return tuple(jnp.zeros(shape, jnp.dtype(dtype)) for _ in range(2 * num_layers))


def copy_pages(pool: KVPool, source: Int[Array, " Z"], target: Int[Array, " Z"]) -> KVPool:
    """Copy whole pages in every layer. A target outside the pool is padding: nothing is copied."""
    return tuple(pages.at[target].set(pages[source], mode="drop") for pages in pool)
