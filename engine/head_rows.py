"""Rows of the served head on the host, for logits outside a capture."""

import jax
import jax.numpy as jnp
import numpy as np

from engine.model import LoadedModel

_SIZES = (16, 128, 1024)  # ids per compiled gather; more are taken in pieces


class HeadRows:
    """Rows of the head matrix, for any thread. What it compiles, it compiles on construction.

    Where the device is the host, its memory is read in place; elsewhere rows are gathered there.
    """

    def __init__(self, model: LoadedModel) -> None:
        decoder = model.merge()
        if decoder.head is None:
            self._weights, axis = decoder.embedding[...], 0
        else:
            self._weights, axis = decoder.head.kernel[...], 1
        self._in_place: np.ndarray | None = None
        if jax.default_backend() == "cpu":
            in_place = np.asarray(self._weights)
            self._in_place = in_place if axis == 0 else in_place.T
            return

        def gather(weights: jax.Array, ids: jax.Array) -> jax.Array:
            rows = jnp.take(weights, ids, axis=axis)
            return (rows if axis == 0 else rows.T).astype(jnp.float32)

        self._gather = jax.jit(gather)
        for size in _SIZES:
            self._gather(self._weights, np.zeros(size, np.int32))

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Rows [len(ids), D] float32 of these token ids."""
        if self._in_place is not None:
            return self._in_place[ids].astype(np.float32)
        pieces = [self._piece(ids[at : at + _SIZES[-1]]) for at in range(0, len(ids), _SIZES[-1])]
        return np.concatenate(pieces) if pieces else self._piece(ids)

    def _piece(self, ids: np.ndarray) -> np.ndarray:
        size = next(size for size in _SIZES if size >= len(ids))
        padded = np.zeros(size, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(self._gather(self._weights, padded))[: len(ids)]
