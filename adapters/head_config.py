"""Settings of the head edits. The defaults are the ones every figure was measured with."""

import math
from dataclasses import dataclass

from adapters.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """How strongly and how widely one pattern's edits act."""

    target_probability: float = 0.99  # what an edited token must reach; 0.9 loses long answers
    token_weight: float = 0.3  # of the base-argmax feature, relative to the mean key norm
    const_weight: float = 1.0  # of the in-gate feature of a convention, same unit
    max_step: float = 30.0  # nats one step may add to a logit at its own position
    max_shift: float = 100.0  # nats one position may add to a logit at itself over all steps
    max_sweeps: int = 200
    num_base_rows: int = 4  # strongest base tokens an edit may push down
    constraint_fraction: float = 0.99  # of its probability that a confirmed token must keep
    same_key_cosine: float = 0.99  # above it two positions cannot be told apart

    def __post_init__(self) -> None:
        for name in ("target_probability", "constraint_fraction", "same_key_cosine"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise AdapterError(f"head.{name} is {getattr(self, name)}; use (0, 1)")
        for name in ("token_weight", "const_weight", "max_step", "max_shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise AdapterError(f"head.{name} is {value}; use a finite number above 0")
        if self.max_sweeps < 0 or self.num_base_rows < 1:
            raise AdapterError(
                f"head.max_sweeps is {self.max_sweeps} and head.num_base_rows "
                f"{self.num_base_rows}; use at least 0 and 1"
            )
