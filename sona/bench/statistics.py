"""Means with t-intervals over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured quantity over independent seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % t-interval of the mean; one value has none and gives itself twice."""
        count, mean = len(self.values), self.mean
        if count < 2:
            return mean, mean
        variance = sum((value - mean) ** 2 for value in self.values) / (count - 1)
        half = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
        return mean - half, mean + half

    def __str__(self) -> str:
        low, high = self.interval
        spread = f"{min(self.values):.3f} to {max(self.values):.3f}"
        return f"{self.mean:.3f}  [{low:.3f}, {high:.3f}]  {spread}"


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, by linear interpolation."""
    ordered = sorted(values)
    at = fraction * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
