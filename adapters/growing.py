"""Append-only matrices that versions of a state share instead of copying."""

from dataclasses import dataclass
from typing import Self

import numpy as np

_MIN_CAPACITY = 256  # rows; memory that nobody wrote to costs nothing, copying it does


@dataclass(slots=True)
class _Storage:
    """The rows behind all versions of one matrix. Rows past `num_filled` hold garbage."""

    buffer: np.ndarray
    num_filled: int


@dataclass(frozen=True, slots=True, eq=False)
class Growing:
    """The first `num_rows` rows of a shared buffer; they never change once written.

    Appending to the newest version writes behind it, which older versions cannot see; appending
    to an older one copies first. One thread at a time.

        version 1   [a b]          storage [a b c . .]
        version 2   [a b c]        append to version 1 again: copy, so that c survives
    """

    _storage: _Storage
    num_rows: int

    @classmethod
    def empty(cls, num_columns: int, dtype: type[np.generic]) -> Self:
        """No rows yet."""
        return cls(_Storage(np.empty((_MIN_CAPACITY, num_columns), dtype), 0), 0)

    @property
    def rows(self) -> np.ndarray:
        """A view of the rows of this version. Do not write to it."""
        return self._storage.buffer[: self.num_rows]

    def append(self, rows: np.ndarray) -> "Growing":
        """This version followed by `rows`."""
        end = self.num_rows + len(rows)
        storage = self._storage
        if storage.num_filled != self.num_rows or end > len(storage.buffer):
            capacity = max(_MIN_CAPACITY, 2 * self.num_rows, end)
            buffer = np.empty((capacity, storage.buffer.shape[1]), storage.buffer.dtype)
            buffer[: self.num_rows] = self.rows
            storage = _Storage(buffer, self.num_rows)
        storage.buffer[self.num_rows : end] = rows
        storage.num_filled = end
        return Growing(storage, end)
