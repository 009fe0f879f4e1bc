"""What is said of a learner after a stream of tasks, from one matrix of accuracies.

R[i, j] is the held-out accuracy on task j after stage i, b[j] that of the base. Definitions of
Lopez-Paz 2017 (arXiv:1706.08840, section 2) and Chaudhry 2018 (arXiv:1801.10112, section 4).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One learner's way through K tasks."""

    accuracy: np.ndarray  # R [K, K]
    base: np.ndarray  # [K]
    generic: np.ndarray  # [K], accuracy on base skills after each stage
    generic_base: float

    @property
    def final(self) -> float:
        """ACC: mean over tasks at the end."""
        return float(self.accuracy[-1].mean())

    @property
    def learned(self) -> float:
        """Mean accuracy on each task when it had just been taught."""
        return float(np.diag(self.accuracy).mean())

    @property
    def backward(self) -> float:
        """BWT: what later tasks did to earlier ones; below 0 they were forgotten."""
        if len(self.accuracy) == 1:
            return 0.0
        return float((self.accuracy[-1] - np.diag(self.accuracy))[:-1].mean())

    @property
    def forward(self) -> float:
        """FWT: what earlier tasks did to later ones before those were taught."""
        if len(self.accuracy) == 1:
            return 0.0
        return float((np.diag(self.accuracy, k=1) - self.base[1:]).mean())

    @property
    def forgetting(self) -> float:
        """Mean over tasks but the last of the best before the end less the end."""
        if len(self.accuracy) == 1:
            return 0.0
        return float((self.accuracy[:-1, :-1].max(axis=0) - self.accuracy[-1, :-1]).mean())

    @property
    def retained(self) -> float:
        """GEN: base skills at the end, as a share of those before."""
        return float(self.generic[-1] / self.generic_base)
