"""Base logits of captured positions, on the few vocabulary rows that a pattern's edits touch.

Letters here: N positions, J touched rows, Q captured base logits (64), D model dimension; PN and PJ
are N and J padded to a bucket.

Per position the vocabulary falls into four parts; each token lies in exactly one:

                  captured (top 64)          not captured
    touched       kept as captured           gathered: W_v . h - l
    untouched     summed into `rest`         `rest_logprob` less what was gathered

so that log sum exp(z') = logsumexp(rest, z_v + delta_v for touched v) with nothing counted twice
and no difference of large numbers. Everything is relative to the base log-sum-exp l, which is
recovered as W_c . h - logprob(c) with the captured argmax c: the rounding of h cancels in part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from adapters.growing import Growing
from engine import NUM_CAPTURED_LOGITS, Capture

HeadRows = Callable[[np.ndarray], np.ndarray]
"""Rows of the served head for token ids [J]: [J, D], any float type. From the quantised head if
that is what is served."""

# Of the uncaptured mass, what stays untouched at least. Gathered logits carry the bfloat16
# rounding of h (about 1e-2 nat at |z| = 10), so a smaller remainder would be noise.
_LEAST_REMAINDER = 2.0**-10
_LOG_FLOOR = np.float32(-200.0)  # stands in for log 0
_LARGEST_LOG_RATIO = np.float32(80.0)
_FEW_ROWS = 16  # up to here comparing all with all is faster than a search


def log_norms(
    hidden: Float[np.ndarray, "N D"], capture: Capture, head_rows: HeadRows
) -> Float[np.ndarray, " N"]:
    """The base log-sum-exp l of each position, from the captured argmax's logit."""
    weights = np.asarray(head_rows(capture.top_ids[:, 0]), np.float32)
    logits = np.einsum("nd,nd->n", hidden, weights)
    return logits - capture.top_logprobs[:, 0]


def _hits(
    top_ids: Int[np.ndarray, "N Q"], row_ids: Int[np.ndarray, " J"]
) -> tuple[Int[np.ndarray, " H"], Int[np.ndarray, " H"], Int[np.ndarray, " H"]]:
    """Where captured ids are rows: position, place among the captured, row. Rows are distinct."""
    ids = top_ids.ravel()
    if len(row_ids) <= _FEW_ROWS:
        row, cell = np.divmod(np.flatnonzero(ids == row_ids[:, None]), max(ids.size, 1))
    else:
        order = np.argsort(row_ids, kind="stable")
        place = np.searchsorted(row_ids, ids, sorter=order).clip(max=len(row_ids) - 1)
        cell = np.flatnonzero(row_ids[order[place]] == ids)
        row = order[place[cell]]
    position, place = np.divmod(cell, top_ids.shape[1])
    return position, place, row


def log_odds(
    logits: Float[np.ndarray, "N J"], rest: Float[np.ndarray, " N"], row: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """z_y - logsumexp(everything else), without ever forming 1 - p. `row` is the column of y."""
    position = np.arange(len(row))
    others = logits.copy()
    others[position, row] = -np.inf
    peak = np.maximum(others.max(1), rest)
    total = np.exp(others - peak[:, None]).sum(1) + np.exp(rest - peak)
    return logits[position, row] - peak - np.log(total)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Relative base logits of some positions on some rows."""

    logits: Float[np.ndarray, "N J"]
    captured: Bool[np.ndarray, "N Q"]  # captured ids that are among the rows
    gathered: Float[np.ndarray, " N"]  # sum of exp(logit - rest_logprob) over uncaptured rows


def _block(
    logits: Float[np.ndarray, "N J"],
    top_ids: Int[np.ndarray, "N Q"],
    top_logprobs: Float[np.ndarray, "N Q"],
    rest_logprob: Float[np.ndarray, " N"],
    row_ids: Int[np.ndarray, " J"],
) -> _Block:
    """Put captured values over gathered ones, and weigh what remains gathered."""
    position, place, row = _hits(top_ids, row_ids)
    captured = np.zeros(top_ids.shape, np.bool_)
    captured[position, place] = True
    # The cap keeps exp finite; any ratio beyond 1 is cut to the least remainder where it is used.
    ratio = np.exp(np.minimum(logits - rest_logprob[:, None], _LARGEST_LOG_RATIO))
    ratio[position, row] = 0.0
    logits[position, row] = top_logprobs[position, place]
    return _Block(logits, captured, ratio.sum(1, dtype=np.float64))


def _log_rest(
    top_probabilities: Float[np.ndarray, "N Q"],
    covered: Bool[np.ndarray, "N Q"],
    rest_logprob: Float[np.ndarray, " N"],
    gathered: Float[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """Log of the base mass outside the rows: captured ids that are none, and the uncaptured.

    A sum of positive numbers in float64: exp(-200) is far from underflow, nothing cancels.
    """
    untouched = np.einsum("nq,nq->n", top_probabilities, ~covered)
    uncaptured = np.exp(rest_logprob.astype(np.float64))
    remainder = np.maximum(1.0 - gathered, _LEAST_REMAINDER)
    return np.log(untouched + uncaptured * remainder).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class BaseRows:
    """N captured positions against J rows, growing in both. Versions share the large arrays."""

    hidden: Growing  # [N, D] float32
    top_ids: Growing  # [N, Q] int32
    top_logprobs: Growing  # [N, Q] float32
    top_probabilities: Growing  # [N, Q] float64, the exponential of the above
    rest_logprob: np.ndarray  # [N] float32
    log_norm: np.ndarray  # [N] float32, l
    row_of: dict[int, int]  # row number of each token; not changed once here
    row_ids: np.ndarray  # [J] int32, distinct, in order of arrival
    row_weights: Growing  # [J, D] float32
    logits: np.ndarray  # [PN, PJ] float32, relative to l; zero outside N, J
    rest: np.ndarray  # [N] float32, log of the base mass outside the rows
    covered: np.ndarray  # [N, Q] bool, captured ids that are rows
    gathered: np.ndarray  # [N] float64, see _Block

    @classmethod
    def empty(cls, dim: int) -> "BaseRows":
        """No positions and no rows."""
        nothing = np.zeros(0, np.float32)
        return cls(
            hidden=Growing.empty(dim, np.float32),
            top_ids=Growing.empty(NUM_CAPTURED_LOGITS, np.int32),
            top_logprobs=Growing.empty(NUM_CAPTURED_LOGITS, np.float32),
            top_probabilities=Growing.empty(NUM_CAPTURED_LOGITS, np.float64),
            rest_logprob=nothing,
            log_norm=nothing,
            row_of={},
            row_ids=np.zeros(0, np.int32),
            row_weights=Growing.empty(dim, np.float32),
            logits=np.zeros((0, 0), np.float32),
            rest=nothing,
            covered=np.zeros((0, NUM_CAPTURED_LOGITS), np.bool_),
            gathered=np.zeros(0, np.float64),
        )

    @property
    def num_positions(self) -> int:
        """N."""
        return self.hidden.num_rows

    @property
    def num_rows(self) -> int:
        """J."""
        return len(self.row_ids)

    def columns(self, token_ids: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """The row number of each token. All must be rows."""
        return np.array([self.row_of[token_id] for token_id in token_ids.tolist()], np.int32)

    def extended(
        self,
        row_ids: Int[np.ndarray, " K"],
        capture: Capture,
        head_rows: HeadRows,
        shape: tuple[int, int],
    ) -> "BaseRows":
        """Add rows, distinct and new, then positions. `shape` is the padded [PN, PJ].

                        old rows     new rows
        old positions   kept         right
        new positions   -------- lower --------
        """
        hidden = np.asarray(capture.hidden, np.float32)
        weights, row_of, ids = self._rows_with(row_ids, head_rows)
        norm = log_norms(hidden, capture, head_rows)
        known_rest = np.maximum(capture.rest_logprob, _LOG_FLOOR)
        lower = _block(
            hidden @ weights.rows.T - norm[:, None],
            capture.top_ids, capture.top_logprobs, known_rest, ids,
        )  # fmt: skip
        right = self._columns_of(weights.rows[self.num_rows :], row_ids)
        covered = np.concatenate([self.covered | right.captured, lower.captured])
        gathered = np.concatenate([self.gathered + right.gathered, lower.gathered])
        probabilities = np.exp(capture.top_logprobs, dtype=np.float64)
        top_probabilities = self.top_probabilities.append(probabilities)
        rest_logprob = np.concatenate([self.rest_logprob, known_rest])
        return BaseRows(
            hidden=self.hidden.append(hidden),
            top_ids=self.top_ids.append(capture.top_ids),
            top_logprobs=self.top_logprobs.append(capture.top_logprobs),
            top_probabilities=top_probabilities,
            rest_logprob=rest_logprob,
            log_norm=np.concatenate([self.log_norm, norm]),
            row_of=row_of,
            row_ids=ids,
            row_weights=weights,
            logits=self._assembled(right.logits, lower.logits, shape),
            rest=_log_rest(top_probabilities.rows, covered, rest_logprob, gathered),
            covered=covered,
            gathered=gathered,
        )

    def _assembled(
        self,
        right: Float[np.ndarray, "N K"],
        lower: Float[np.ndarray, "P J"],
        shape: tuple[int, int],
    ) -> Float[np.ndarray, "PN PJ"]:
        """The picture above, with zeros around it."""
        old, num_old_rows, num_rows = self.num_positions, self.num_rows, lower.shape[1]
        logits = np.zeros(shape, np.float32)
        logits[:old, :num_old_rows] = self.logits[:old, :num_old_rows]
        logits[:old, num_old_rows:num_rows] = right
        logits[old : old + len(lower), :num_rows] = lower
        return logits

    def _rows_with(
        self, row_ids: Int[np.ndarray, " K"], head_rows: HeadRows
    ) -> tuple[Growing, dict[int, int], Int[np.ndarray, " J"]]:
        """Weights, numbers and ids of the rows with further ones behind them."""
        if len(row_ids) == 0:
            return self.row_weights, self.row_of, self.row_ids
        numbers = range(self.num_rows, self.num_rows + len(row_ids))
        return (
            self.row_weights.append(np.asarray(head_rows(row_ids), np.float32)),
            self.row_of | dict(zip(row_ids.tolist(), numbers, strict=True)),
            np.concatenate([self.row_ids, row_ids.astype(np.int32)]),
        )

    def _columns_of(
        self, weights: Float[np.ndarray, "K D"], row_ids: Int[np.ndarray, " K"]
    ) -> _Block:
        """The known positions on further rows."""
        logits = self.hidden.rows @ weights.T - self.log_norm[:, None]
        return _block(logits, self.top_ids.rows, self.top_logprobs.rows, self.rest_logprob, row_ids)
