"""The metric of the edit keys: which directions of the hidden state distinguish prompts.

A key M h answers to h itself and to what is like it, and little to what every prompt has in
common, because M = (C + rho tr(C)/D I)^-1 divides by the energy C = E[h h^T] of generic traffic.
With rho = 1 at least as much is divided by everywhere as an average direction holds: without that
shrinkage the noise directions of C decide, and nothing generalises.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from adapters.errors import AdapterError

_SHRINKAGE = 1.0  # rho


@dataclass(frozen=True, slots=True, eq=False)
class KeyMetric:
    """M as a diagonal plus at most `max_rank` directions; the spectrum's tail is its mean.

    M h = (h - basis (gain * basis^T h)) / floor: 2 D Q multiplications.
    """

    basis: np.ndarray  # [D, Q] float32, orthonormal columns
    gain: np.ndarray  # [Q] float32, in [0, 1)
    floor: float
    mean_norm: float  # mean of h^T M h over the generic states

    @classmethod
    def fit(cls, hidden: Float[np.ndarray, "S D"], *, max_rank: int = 64) -> "KeyMetric":
        """Measure M on generic hidden states.

        Raises:
          AdapterError: no states, or values that are not finite.
        """
        states = np.asarray(hidden, np.float64)
        if len(states) == 0 or not np.isfinite(states).all() or not states.any():
            raise AdapterError(
                f"the key metric got {len(states)} states, or states that are zero or not finite; "
                "give it finite hidden states of generic prompts"
            )
        dim = states.shape[1]
        energies, directions = _leading_directions(states, min(max_rank, dim))
        total = float((states * states).sum()) / len(states)
        ridge = _SHRINKAGE * total / dim
        num_tail = dim - len(energies)
        tail = max(total - float(energies.sum()), 0.0) / num_tail if num_tail else 0.0
        metric = cls(
            basis=directions.astype(np.float32),
            gain=((energies - tail) / (energies + ridge)).astype(np.float32),
            floor=tail + ridge,
            mean_norm=1.0,
        )
        norms = (states * metric.apply(states.astype(np.float32))).sum(1)
        return cls(metric.basis, metric.gain, metric.floor, float(norms.mean()))

    def apply(self, hidden: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """M h for each row, float32."""
        states = np.asarray(hidden, np.float32)
        known = ((states @ self.basis) * self.gain) @ self.basis.T
        return (states - known) / np.float32(self.floor)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The metric as named arrays, for a file."""
        scalars = np.array([self.floor, self.mean_norm], np.float64)
        return {"basis": self.basis, "gain": self.gain, "scalars": scalars}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "KeyMetric":
        """What `to_arrays` gave. Raises AdapterError naming a missing array."""
        missing = {"basis", "gain", "scalars"} - set(arrays)
        if missing:
            raise AdapterError(f"a key metric lacks {sorted(missing)}; compute it again")
        floor, mean_norm = (float(value) for value in arrays["scalars"])
        return cls(arrays["basis"], arrays["gain"], floor, mean_norm)


def _leading_directions(
    states: Float[np.ndarray, "S D"], rank: int
) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, "D Q"]]:
    """The `rank` greatest eigenvalues of C and their vectors, from the smaller Gram matrix."""
    num_states, dim = states.shape
    if num_states >= dim:
        values, vectors = np.linalg.eigh(states.T @ states / num_states)
        return values[::-1][:rank].clip(0.0), vectors[:, ::-1][:, :rank]
    values, weights = np.linalg.eigh(states @ states.T / num_states)
    keep = np.flatnonzero(values > 1e-9 * values[-1])[::-1][:rank]
    vectors = states.T @ weights[:, keep] / np.sqrt(values[keep] * num_states)
    return values[keep], vectors
