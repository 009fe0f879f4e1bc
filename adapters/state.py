"""What is known of one pattern: its positions, its rows and the coefficients of its edits."""

import math
from dataclasses import dataclass, field

import numpy as np

from adapters.base_rows import BaseRows
from adapters.batch import Batch
from adapters.growing import Growing
from adapters.head_config import HeadConfig
from adapters.metric import KeyMetric


def logit(probability: np.ndarray | float) -> np.ndarray:
    """Log-odds, float64."""
    value = np.asarray(probability, np.float64)
    return np.log(value) - np.log1p(-value)


def probability(log_odds: float) -> float:
    """The inverse of `logit`, for one number of any size."""
    return 1.0 / (1.0 + math.exp(-log_odds)) if log_odds > -700.0 else 0.0


# What is known of a position besides its base logits.
POSITION = np.dtype(
    [
        ("target", np.int32),  # token id
        ("row", np.int32),  # row number of the target
        ("argmax", np.int32),  # base argmax token
        ("argmax_logit", np.float32),  # relative to the base log-sum-exp
        ("feedback", np.int32),  # index into feedback_ids
        ("need", np.float32),  # log-odds at which the position holds
        ("norm", np.float32),  # h^T M h
        ("is_edit", np.bool_),
        ("is_active", np.bool_),  # false once replaced, or from the start: see has_yielded
        ("has_yielded", np.bool_),  # gave way to what was learned before it came
        ("is_repeat", np.bool_),  # see forms.Evidence
        ("is_convention", np.bool_),
        ("strength", np.float64),  # see forms.extend_strength
    ],
    align=True,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadState:
    """All that is known of one pattern's edits. Owned by one thread; never changed in place."""

    metric: KeyMetric
    config: HeadConfig
    base: BaseRows
    keys: Growing  # [N, D] float32, M h
    gram: np.ndarray  # [N', N'] float32, h_i^T M h_j; garbage past N
    columns: np.ndarray  # [N] of POSITION
    coefficients: np.ndarray  # [N', J'] float32, a_j; zero past N, J
    served: np.ndarray  # [N', J'] float32, logits with them, relative to the base log-sum-exp;
    #                     far below any other past N, J; meaningless where replaced
    log_odds: np.ndarray  # [N] float32, served; meaningless where replaced
    feedback_ids: tuple[str, ...] = ()
    is_settled: bool = True  # the sweeps have run
    log: tuple[Batch, ...] = field(default=())

    @classmethod
    def empty(cls, metric: KeyMetric, config: HeadConfig | None = None) -> "HeadState":
        """Nothing learned."""
        dim = metric.basis.shape[0]
        return cls(
            metric=metric,
            config=config or HeadConfig(),
            base=BaseRows.empty(dim),
            keys=Growing.empty(dim, np.float32),
            gram=np.zeros((0, 0), np.float32),
            columns=np.zeros(0, POSITION),
            coefficients=np.zeros((0, 0), np.float32),
            served=np.zeros((0, 0), np.float32),
            log_odds=np.zeros(0, np.float32),
        )

    @property
    def num_positions(self) -> int:
        """N, replaced ones included."""
        return self.base.num_positions

    @property
    def num_edits(self) -> int:
        """Active edits."""
        return int((self.columns["is_active"] & self.columns["is_edit"]).sum())

    def feedbacks(self, which: np.ndarray) -> tuple[str, ...]:
        """Ids of the feedback of some positions, given by a mask or by number; by age."""
        return tuple(
            self.feedback_ids[i] for i in sorted({*self.columns["feedback"][which].tolist()})
        )

    @property
    def probabilities(self) -> np.ndarray:
        """Served probability of each position's target [N] float64; meaningless where replaced."""
        return np.array([probability(odds) for odds in self.log_odds])

    def features(self, argmax: np.ndarray, edits: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The kernel less h^T M h, from queries with this base argmax [Q] to edits [E]: [Q, E]."""
        columns, config, scale = self.columns, self.config, self.metric.mean_norm
        token_weight = np.float32(config.token_weight * scale)
        const_weight = np.float32(config.const_weight * scale)
        token = token_weight * (argmax[:, None] == columns["argmax"][edits])
        return np.where(columns["is_convention"][edits], const_weight, token)
