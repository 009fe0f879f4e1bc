"""Which requests a pattern answers to: cosine to a centroid, against a calibrated threshold.

A request is its prompt's mean final hidden state, less the mean over generic prompts, at unit
length ("unit"). Centring is what makes the cosine mean something; whitening would undo it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from adapters.errors import AdapterError
from adapters.metric import KeyMetric
from engine import Capture

_FALSE_POSITIVE_RATE = 0.01  # of generic prompts that may fire a pattern
_NUM_CALIBRATED = 8  # prompts from which on a pattern's own similarities count
_OWN_MISS_RATE = 0.05  # of own prompts that the threshold may exclude
# How far from the generic quantile towards the own prompts the threshold goes. Small, because
# unseen wordings lie further from the centroid than the prompts that made it.
_OWN_SHARE = 0.25
_MAX_VECTORS = 64  # newest prompts that a gate remembers


def _unit(vectors: Float[np.ndarray, "*N D"]) -> Float[np.ndarray, "*N D"]:
    """Unit length along the last axis; zero stays zero."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norm, np.float32(1e-12))).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class GenericStats:
    """What generic prompts look like to one base model. Computed once, kept by its hash."""

    centre: np.ndarray  # [D] float32
    units: np.ndarray  # [256, D] float32, the generic prompts themselves
    metric: KeyMetric
    guard: Capture  # positions no pattern should disturb

    @classmethod
    def build(
        cls,
        prompt_vectors: Float[np.ndarray, "G D"],
        hidden: Float[np.ndarray, "S D"],
        guard: Capture,
    ) -> "GenericStats":
        """From the generic prompts' mean hidden states and the hidden states of their tokens.

        Raises:
          AdapterError: fewer than two prompts, or values that are not finite.
        """
        vectors = np.asarray(prompt_vectors, np.float32)
        if len(vectors) < 2 or not np.isfinite(vectors).all():
            raise AdapterError(
                f"{len(vectors)} generic prompt vectors, or some not finite; "
                "give at least 2 finite ones, 256 for a threshold of 1 %"
            )
        centre = vectors.mean(0)
        return cls(centre, _unit(vectors - centre), KeyMetric.fit(hidden), guard)

    def unit(self, prompt_vector: Float[np.ndarray, " D"]) -> Float[np.ndarray, " D"]:
        """A prompt's mean hidden state as the gates compare it."""
        return _unit(np.asarray(prompt_vector, np.float32) - self.centre)

    def quantile(self, centroid: Float[np.ndarray, " D"]) -> float:
        """The least threshold that no more than 1 % of the generic prompts reach."""
        falling = np.sort(self.units @ centroid)[::-1]
        allowed = int(_FALSE_POSITIVE_RATE * len(falling))
        return float(np.nextafter(falling[allowed], np.float32(2), dtype=np.float32))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file. bfloat16 states travel as their bits."""
        arrays = {f"metric.{name}": array for name, array in self.metric.to_arrays().items()}
        arrays |= {"centre": self.centre, "units": self.units}
        arrays |= {
            "guard.hidden": np.asarray(self.guard.hidden, np.float32),
            "guard.top_ids": self.guard.top_ids,
            "guard.top_logprobs": self.guard.top_logprobs,
            "guard.rest_logprob": self.guard.rest_logprob,
        }
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "GenericStats":
        """What `to_arrays` gave. Raises AdapterError naming a missing array."""
        names = ("centre", "units", "guard.hidden", "guard.top_ids", "guard.top_logprobs",
                 "guard.rest_logprob")  # fmt: skip
        missing = [name for name in names if name not in arrays]
        if missing:
            raise AdapterError(f"generic statistics lack {missing}; compute them again")
        prefix = "metric."
        metric = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        guard = Capture(*(arrays[name] for name in names[2:]))
        return cls(arrays["centre"], arrays["units"], KeyMetric.from_arrays(metric), guard)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """One pattern's gate. It fires at similarity >= threshold. A new prompt makes a new gate."""

    centroid: np.ndarray  # [D] float32, unit length
    threshold: float  # cosine
    num_prompts: int
    vectors: np.ndarray  # [n, D] float32, the newest prompts' units; n <= 64

    @classmethod
    def born(cls, unit: Float[np.ndarray, " D"], generic: GenericStats) -> "Gate":
        """The gate of a pattern's first prompt."""
        return cls(
            centroid=unit,
            threshold=generic.quantile(unit),
            num_prompts=1,
            vectors=unit[None, :].astype(np.float32),
        )

    def with_prompt(self, unit: Float[np.ndarray, " D"], generic: GenericStats) -> "Gate":
        """The gate with one more prompt. Beyond 64, the oldest no longer counts."""
        vectors = np.concatenate([self.vectors, unit[None, :]])[-_MAX_VECTORS:]
        centroid = _unit(vectors.sum(0))
        return Gate(
            centroid=centroid,
            threshold=_threshold(vectors, generic.quantile(centroid)),
            num_prompts=self.num_prompts + 1,
            vectors=vectors,
        )

    def similarity(self, unit: Float[np.ndarray, " D"]) -> float:
        """Cosine to the centroid."""
        return float(self.centroid @ unit)

    def fires(self, unit: Float[np.ndarray, " D"]) -> bool:
        """This prompt belongs to the pattern."""
        return self.similarity(unit) >= self.threshold


def _threshold(vectors: Float[np.ndarray, "N D"], generic_quantile: float) -> float:
    """Between the generic quantile and the pattern's own prompts, left out one by one.

    generic ........|q99 - - T - - - - - - |own 5 % ....... own prompts
    """
    if len(vectors) < _NUM_CALIBRATED:
        return generic_quantile
    without_it = _unit(vectors.sum(0)[None, :] - vectors)
    own = float(np.quantile((vectors * without_it).sum(1), _OWN_MISS_RATE))
    raised = generic_quantile + _OWN_SHARE * max(own - generic_quantile, 0.0)
    return float(np.float32(raised))


@dataclass(frozen=True, slots=True, eq=False)
class GateIndex:
    """Many gates as two arrays, for one look-up per request."""

    centroids: np.ndarray  # [G, D] float32
    thresholds: np.ndarray  # [G] float32

    @classmethod
    def of(cls, gates: Sequence[Gate]) -> "GateIndex":
        """The gates in their order. May be empty."""
        if not gates:
            return cls(np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
        return cls(
            np.stack([gate.centroid for gate in gates]),
            np.array([gate.threshold for gate in gates], np.float32),
        )


def route(unit: Float[np.ndarray, " D"], index: GateIndex) -> int | None:
    """The number of the nearest gate that fires; None leaves the request to the base model."""
    if len(index.thresholds) == 0:
        return None
    similarity = index.centroids @ unit
    similarity[~(similarity >= index.thresholds)] = -np.inf  # NaN does not fire
    nearest = int(similarity.argmax())
    return nearest if similarity[nearest] > -np.inf else None
