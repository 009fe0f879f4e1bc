"""A measured number with its bound, and pairs measured in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. Bound None: reported."""

    name: str
    value: float
    bound: float | None = None
    is_least: bool = False  # the bound is a least value, not a largest

    @property
    def is_held(self) -> bool:
        """Whether the bound is kept."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def __str__(self) -> str:
        if self.bound is None:
            return f"  {self.name:66} {self.value:8.3f}"
        sign, told = "≥" if self.is_least else "≤", "held" if self.is_held else "MISSED"
        return f"  {self.name:66} {self.value:8.3f}  ({sign} {self.bound:g}: {told})"

    def as_dict(self) -> dict[str, object]:
        """For a file."""
        return {"value": self.value, "bound": self.bound, "held": self.is_held}


def ratio_in_turn(one: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """Median of the time of `other` over that of `one` just before, after three of each."""
    ratios = []
    for round_ in range(-3, rounds):
        started = time.perf_counter()
        one()
        between = time.perf_counter()
        other()
        ended = time.perf_counter()
        if round_ >= 0:
            ratios.append((ended - between) / (between - started))
    return statistics.median(ratios)
