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
_LOG_FLOOR = -200.0  # stands in for log 0
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
    if len(row_ids) <= _FEW_ROWS:
        hit = np.flatnonzero(top_ids.ravel()[None, :] == row_ids[:, None])  # of the flat array
        row, cell = np.divmod(hit, max(top_ids.size, 1))
        position, place = np.divmod(cell, top_ids.shape[1])
        return position, place, row
    order = np.argsort(row_ids, kind="stable")
    nearest = np.searchsorted(row_ids, top_ids, sorter=order).clip(max=len(row_ids) - 1)
    row = order[nearest]
    position, place = np.nonzero(row_ids[row] == top_ids)
    return position, place, row[position, place]


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


def _log_uncovered(
    top_logprobs: Float[np.ndarray, "N Q"], covered: Bool[np.ndarray, "N Q"]
) -> Float[np.ndarray, " N"]:
    """log-sum-exp of the captured logits that are not among the rows."""
    kept = np.where(covered, np.float32(_LOG_FLOOR), top_logprobs)
    peak = kept.max(1)
    return (peak + np.log(np.exp(kept - peak[:, None]).sum(1))).astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class BaseRows:
    """N captured positions against J rows, growing in both. Versions share the large arrays."""

    hidden: Growing  # [N, D] float32
    top_ids: Growing  # [N, Q] int32
    top_logprobs: Growing  # [N, Q] float32
    rest_logprob: np.ndarray  # [N] float32
    log_norm: np.ndarray  # [N] float32, l
    row_ids: np.ndarray  # [J] int32, distinct, in order of arrival
    row_weights: Growing  # [J, D] float32
    logits: np.ndarray  # [PN, PJ] float32, relative to l; zero outside N, J
    covered: np.ndarray  # [N, Q] bool
    uncovered: np.ndarray  # [N] float64, log mass of captured ids that are not rows
    gathered: np.ndarray  # [N] float64, see _Block

    @classmethod
    def empty(cls, dim: int) -> "BaseRows":
        """No positions and no rows."""
        nothing = np.zeros(0, np.float64)
        return cls(
            hidden=Growing.empty(dim, np.float32),
            top_ids=Growing.empty(NUM_CAPTURED_LOGITS, np.int32),
            top_logprobs=Growing.empty(NUM_CAPTURED_LOGITS, np.float32),
            rest_logprob=np.zeros(0, np.float32),
            log_norm=np.zeros(0, np.float32),
            row_ids=np.zeros(0, np.int32),
            row_weights=Growing.empty(dim, np.float32),
            logits=np.zeros((0, 0), np.float32),
            covered=np.zeros((0, NUM_CAPTURED_LOGITS), np.bool_),
            uncovered=nothing,
            gathered=nothing,
        )

    @property
    def num_positions(self) -> int:
        """N."""
        return self.hidden.num_rows

    @property
    def num_rows(self) -> int:
        """J."""
        return len(self.row_ids)

    @property
    def rest(self) -> Float[np.ndarray, " N"]:
        """Log of the base mass outside the rows, float32."""
        remainder = np.log(np.maximum(1.0 - self.gathered, _LEAST_REMAINDER))
        return np.logaddexp(self.uncovered, self.rest_logprob + remainder).astype(np.float32)

    def columns(self, token_ids: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """The row number of each token. All must be rows."""
        order = np.argsort(self.row_ids, kind="stable")
        return order[np.searchsorted(self.row_ids, token_ids, sorter=order)]

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
        weights, ids = self.row_weights, self.row_ids
        if len(row_ids):
            weights = weights.append(np.asarray(head_rows(row_ids), np.float32))
            ids = np.concatenate([ids, row_ids.astype(np.int32)])
        norm = log_norms(hidden, capture, head_rows)
        rest = np.maximum(capture.rest_logprob, np.float32(_LOG_FLOOR))
        lower = _block(
            hidden @ weights.rows.T - norm[:, None],
            capture.top_ids, capture.top_logprobs, rest, ids,
        )  # fmt: skip
        right = self._columns_of(weights.rows[self.num_rows :], row_ids)
        logits = np.zeros(shape, np.float32)
        old, num_old_rows = self.num_positions, self.num_rows
        logits[:old, :num_old_rows] = self.logits[:old, :num_old_rows]
        logits[:old, num_old_rows : len(ids)] = right.logits
        logits[old : old + len(hidden), : len(ids)] = lower.logits
        covered, uncovered = self._covered_by(right)
        fresh = _log_uncovered(capture.top_logprobs, lower.captured)
        return BaseRows(
            hidden=self.hidden.append(hidden),
            top_ids=self.top_ids.append(capture.top_ids),
            top_logprobs=self.top_logprobs.append(capture.top_logprobs),
            rest_logprob=np.concatenate([self.rest_logprob, rest]),
            log_norm=np.concatenate([self.log_norm, norm]),
            row_ids=ids,
            row_weights=weights,
            logits=logits,
            covered=np.concatenate([covered, lower.captured]),
            uncovered=np.concatenate([uncovered, fresh]),
            gathered=np.concatenate([self.gathered + right.gathered, lower.gathered]),
        )

    def _columns_of(
        self, weights: Float[np.ndarray, "K D"], row_ids: Int[np.ndarray, " K"]
    ) -> _Block:
        """The known positions on further rows."""
        logits = self.hidden.rows @ weights.T - self.log_norm[:, None]
        return _block(logits, self.top_ids.rows, self.top_logprobs.rows, self.rest_logprob, row_ids)

    def _covered_by(self, right: _Block) -> tuple[Bool[np.ndarray, "N Q"], Float[np.ndarray, " N"]]:
        """`covered` and `uncovered` once the further rows are there."""
        covered, uncovered = self.covered | right.captured, self.uncovered.copy()
        changed = right.captured.any(1)
        uncovered[changed] = _log_uncovered(self.top_logprobs.rows[changed], covered[changed])
        return covered, uncovered
