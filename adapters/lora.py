"""LoRA tables: several made into one."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from adapters.errors import CandidateRejected
from engine import LoraTable


def merge(parts: Sequence[tuple[LoraTable, float]]) -> LoraTable:
    """The table that adds every table's delta times its weight.

    Ranks are laid side by side, so the sum is exact and its rank the sum of ranks. A module that
    one of them does not adapt gets nothing from it.

    Raises CandidateRejected for a weight that is not a finite number, or tables of two models.
    """
    for _, weight in parts:
        if not math.isfinite(weight):
            raise CandidateRejected(f"a LoRA's weight is {weight}; use a finite number")
    a = _side_by_side([table.a for table, _ in parts], [1.0] * len(parts))
    b = _side_by_side([table.b for table, _ in parts], [weight for _, weight in parts])
    return LoraTable(a, b)


def _side_by_side(
    sides: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]
) -> dict[str, np.ndarray]:
    """One side of every table: per module [L, R1 + R2 + …, size]."""
    ranks = [max(array.shape[1] for array in side.values()) for side in sides]
    merged = {}
    for module in sorted({module for side in sides for module in side}):
        sizes = {(side[module].shape[0], side[module].shape[2]) for side in sides if module in side}
        if len(sizes) > 1:
            raise CandidateRejected(
                f"the LoRAs are of different models: {module} has (layers, size) {sorted(sizes)}"
            )
        layers, size = sizes.pop()
        merged[module] = np.concatenate(
            [
                side[module] * np.float32(weight)
                if module in side
                else np.zeros((layers, rank, size), np.float32)
                for side, weight, rank in zip(sides, weights, ranks, strict=True)
            ],
            axis=1,
        )
    return merged
