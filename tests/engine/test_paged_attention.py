"""Attention over pages against contiguous float64 attention. Rows nobody owns hold NaN."""

import jax
import numpy as np
import pytest
from reference.decoder import attend_one

from engine.errors import ShapeError
from engine.ops import paged_attention as op

paged_attention = jax.jit(op.paged_attention, static_argnames="scale")
append = jax.jit(op.append)

# float32 sums over at most 300 terms of magnitude 1; 2e-5 is about 170 ulp.
RTOL = ATOL = 2e-5
PAGE, H = 8, 16


def scatter_into_pages(rng, seqs_SKH, num_pages, max_pages):
    """Lay sequences out on shuffled pages; one page stays all NaN and fills unused entries."""
    pool_PCKH = np.full((num_pages, PAGE, *seqs_SKH[0].shape[1:]), np.nan, np.float32)
    free = list(rng.permutation(num_pages))
    table_BM = np.full((len(seqs_SKH), max_pages), free.pop(), np.int32)
    for row, seq_SKH in enumerate(seqs_SKH):
        for column, start in enumerate(range(0, len(seq_SKH), PAGE)):
            table_BM[row, column] = page = free.pop()
            chunk = seq_SKH[start : start + PAGE]
            pool_PCKH[page, : len(chunk)] = chunk
    return pool_PCKH, table_BM


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"]
)
@pytest.mark.parametrize(
    "lengths",
    [(1,), (8, 9), (0, 3, 300), (128, 129)],
    ids=["one", "page-edge", "empty-slot-and-long", "block-edge"],
)
def test_decode_matches_contiguous_reference(num_heads, num_kv_heads, lengths):
    rng = np.random.default_rng(0)
    keys = [rng.standard_normal((n, num_kv_heads, H)).astype(np.float32) for n in lengths]
    values = [rng.standard_normal((n, num_kv_heads, H)).astype(np.float32) for n in lengths]
    k_pages, table = scatter_into_pages(np.random.default_rng(1), keys, 60, 40)
    v_pages, _ = scatter_into_pages(np.random.default_rng(1), values, 60, 40)
    q = rng.standard_normal((len(lengths), 1, num_heads, H)).astype(np.float32)
    positions = np.array([[n - 1] for n in lengths], np.int32)
    got = paged_attention(q, k_pages, v_pages, table, positions, scale=H**-0.5)
    for row, length in enumerate(lengths):
        want = attend_one(q[row, 0], keys[row], values[row], H**-0.5) if length else 0.0
        np.testing.assert_allclose(got[row, 0], want, rtol=RTOL, atol=ATOL, err_msg=f"row {row}")


def test_prefill_chunk_sees_the_past_and_itself_but_not_the_future():
    rng = np.random.default_rng(2)
    length, start, chunk = 150, 130, 16  # the chunk ends before the cached future does
    keys = rng.standard_normal((length, 2, H)).astype(np.float32)
    values = rng.standard_normal((length, 2, H)).astype(np.float32)
    k_pages, table = scatter_into_pages(np.random.default_rng(3), [keys], 30, 20)
    v_pages, _ = scatter_into_pages(np.random.default_rng(3), [values], 30, 20)
    q = rng.standard_normal((1, chunk, 4, H)).astype(np.float32)
    positions = (start + np.arange(chunk, dtype=np.int32))[None]
    got = paged_attention(q, k_pages, v_pages, table, positions, scale=0.2)
    for i in range(chunk):
        seen = start + i + 1
        want = attend_one(q[0, i], keys[:seen], values[:seen], 0.2)
        np.testing.assert_allclose(got[0, i], want, rtol=RTOL, atol=ATOL)


def test_row_does_not_depend_on_how_long_the_others_are():
    rng = np.random.default_rng(4)
    short, long = (rng.standard_normal((n, 2, H)).astype(np.float32) for n in (20, 300))
    q = rng.standard_normal((2, 1, 4, H)).astype(np.float32)
    positions = np.array([[19], [299]], np.int32)
    pages, table = scatter_into_pages(np.random.default_rng(5), [short, long], 60, 40)
    both = paged_attention(q, pages, pages, table, positions, scale=0.3)
    alone = paged_attention(q, pages, pages, table, np.array([[19], [-1]], np.int32), scale=0.3)
    np.testing.assert_array_equal(both[0], alone[0])
    np.testing.assert_array_equal(alone[1], 0.0)


def test_append_writes_live_positions_only():
    pages = np.full((4, PAGE, 1, 2), np.nan, np.float32)
    new = np.arange(12, dtype=np.float32).reshape(2, 3, 1, 2)
    table = np.array([[2, 0], [1, 3]], np.int32)
    positions = np.array([[6, 7, 8], [0, -1, -1]], np.int32)
    got = np.asarray(append(pages, new, table, positions))
    want = pages.copy()
    want[2, 6], want[2, 7], want[0, 0] = new[0]
    want[1, 0] = new[1, 0]
    np.testing.assert_array_equal(got, want)


def test_append_is_in_place_when_donated():
    step = jax.jit(op.append, donate_argnums=0)
    pages = jax.numpy.zeros((4, PAGE, 1, 2))
    address = pages.unsafe_buffer_pointer()
    args = (np.ones((1, 1, 1, 2), np.float32), np.zeros((1, 1), np.int32))
    assert step(pages, *args, np.zeros((1, 1), np.int32)).unsafe_buffer_pointer() == address


def test_heads_that_do_not_divide_are_refused():
    q, pages = np.zeros((1, 1, 3, H), np.float32), np.zeros((2, PAGE, 2, H), np.float32)
    table, positions = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32)
    with pytest.raises(ShapeError, match="3 query heads do not divide into 2"):
        paged_attention(q, pages, pages, table, positions, scale=1.0)
