"""LoRA tables: applied to a model, several made into one, one made smaller."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from adapters.errors import CandidateRejected
from engine import LoraTable

Factors = tuple[Mapping[str, Any], Mapping[str, Any]]
"""First [L, R, X] and second [L, R, Y] factors by module, on the host or on a device."""


def adapted_by(*tables: Factors) -> Callable[[int, Array, dict[str, Array]], tuple[Array, ...]]:
    """The decoder's hook: y + (x A^T) B for every table, computed in the precision of x."""

    def adapt(layer: int, x: Array, outputs: dict[str, Array]) -> tuple[Array, ...]:
        adapted = dict(outputs)
        for a, b in tables:
            for module in outputs:
                if module in a:
                    inner = x @ a[module][layer].astype(x.dtype).T
                    adapted[module] = adapted[module] + inner @ b[module][layer].astype(x.dtype)
        return tuple(adapted.values())

    return adapt


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


def compressed(
    table: LoraTable, rank: int, traffic: Mapping[str, np.ndarray] | None = None
) -> tuple[LoraTable, float]:
    """The nearest table of a rank, and the share of its weight that is lost.

    The distance is that of outputs on traffic: inputs have the second moments `traffic`, by module
    [L, X]; without them all directions count alike. QR of both factors, then the singular values
    of the small product, so no matrix of the model's size is made.

    Raises CandidateRejected for a rank below 1.
    """
    if rank < 1:
        raise CandidateRejected(f"a LoRA of rank {rank} says nothing; use 1 or more")
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    kept = lost = 0.0
    for module, first in table.a.items():
        layers, has, size = first.shape
        small = min(rank, has)
        a[module] = np.zeros((layers, small, size), np.float32)
        b[module] = np.zeros((layers, small, table.b[module].shape[2]), np.float32)
        for layer in range(layers):
            weight = np.ones(size)
            if traffic is not None:
                weight = np.sqrt(np.maximum(traffic[module][layer].astype(np.float64), 1e-12))
            q_in, r_in = np.linalg.qr((first[layer] * weight).T)  # [X, R] [R, R]
            q_out, r_out = np.linalg.qr(table.b[module][layer].astype(np.float64).T)
            left, scales, right = np.linalg.svd(r_in @ r_out.T)
            kept += float((scales[:small] ** 2).sum())
            lost += float((scales[small:] ** 2).sum())
            root = np.sqrt(scales[:small])
            a[module][layer] = ((q_in @ left[:, :small]) * root).T / weight
            b[module][layer] = (q_out @ right[:small].T * root).T
    return LoraTable(a, b), lost / (kept + lost) if kept + lost else 0.0
