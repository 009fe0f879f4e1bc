"""From coefficients to the factored table that a head slot holds.

The shift of a pattern is sum_j K(., j) a_j: one key per edit, one vector of row values per edit.
Any factorisation a_j = sum_r mix[j, r] values[r] makes a table of rank R out of it. In this order:

  merged     R = targets of conventions (their values are all e_y) + edits of other form.  Exact.
  by row     R = rows: mix = a, values = the identity.                                     Exact.
  truncated  values = the R directions of the rows in which the shift at the pattern's own
             positions is largest, half of the weight on edits, half on constraints: the best
             rank R for those states (Eckart and Young on the weighted shifts). All cases are
             replayed on the result, and the report says what is left.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from adapters.base_rows import log_odds
from adapters.errors import AdapterError
from adapters.state import HeadState, probability
from engine import HeadTable


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLimits:
    """The size of a head slot."""

    rank: int = 32
    max_rows: int = 2048
    max_tokens: int = 64  # distinct base tokens that edits answer to

    def __post_init__(self) -> None:
        if min(self.rank, self.max_rows, self.max_tokens) < 1:
            raise AdapterError(
                f"a head slot of rank {self.rank}, {self.max_rows} rows and {self.max_tokens} "
                "token keys holds nothing; use at least 1 of each"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReport:
    """What became of the pattern's own positions in the table. Says nothing of others.

    An edit is kept while its token is likelier than all others together, a constraint holds while
    its token has what it needs. A constraint is lost only where its token is neither likelier than
    all others together nor has half of the odds that it needs. `before` is the untruncated
    solution, on the same positions.
    """

    form: Literal["merged", "by row", "truncated"]
    rank: int
    num_rows: int
    num_tokens: int
    num_dropped_rows: int
    num_dropped_tokens: int
    num_edits: int
    num_kept_before: int
    num_kept_after: int
    num_constraints: int
    num_holding_before: int
    num_holding_after: int
    min_probability_before: float  # over active edits; 1 without any
    min_probability_after: float
    lost: tuple[str, ...]  # feedbacks of which an active position is not kept in the table
    replaced: tuple[str, ...]  # feedbacks of which a position gave way to a later, contrary one

    @property
    def is_exact(self) -> bool:
        """The table says what the solution says, up to float32."""
        return self.form != "truncated" and not (self.num_dropped_rows or self.num_dropped_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """Ranks that mix positions, then ranks that are one position each."""

    form: Literal["merged", "by row", "truncated"]
    mixed: np.ndarray  # [K] position numbers
    mix: np.ndarray  # [K, G] float32
    singles: np.ndarray  # [L] position numbers; R = G + L
    values: np.ndarray  # [R, J] float32, J the kept rows

    def of(self, columns: np.ndarray) -> np.ndarray:
        """What each rank has of per-position features [N, X]: [R, X]."""
        if len(self.mixed) == 0:
            return columns[self.singles]
        return np.concatenate([self.mix.T @ columns[self.mixed], columns[self.singles]])


def export(state: HeadState, limits: TableLimits | None = None) -> tuple[HeadTable, TableReport]:
    """The table of a state's coefficients, within the limits, and what it keeps."""
    limits = limits or TableLimits()
    coefficients = state.coefficients[: state.num_positions, : state.base.num_rows]
    used = np.flatnonzero(coefficients.any(1))
    coefficients = coefficients[used]
    rows = np.flatnonzero(coefficients.any(0))
    num_dropped_rows = max(len(rows) - limits.max_rows, 0)
    if num_dropped_rows:
        energy = (_shifts(state, used, coefficients[:, rows]) ** 2).sum(0)
        rows = np.sort(rows[np.argsort(-energy, kind="stable")[: limits.max_rows]])
    tokens, num_dropped_tokens = _tokens(state, coefficients, used, limits.max_tokens)
    factors = _factors(state, coefficients[:, rows], used, rows, limits.rank)
    table = _table(state, factors, rows, tokens)
    after = state.log_odds
    if factors.form == "truncated" or num_dropped_rows or num_dropped_tokens:
        after = _replayed(state, table, rows)
    return table, _report(state, factors.form, table, after, (num_dropped_rows, num_dropped_tokens))


def _factors(
    state: HeadState, coefficients: np.ndarray, used: np.ndarray, rows: np.ndarray, rank: int
) -> _Factors:
    """The first of the three factorisations that fits, of the coefficients [used, rows]."""
    is_convention = state.columns["is_convention"][used]
    merged, singles = used[is_convention], used[~is_convention]
    targets, group = _distinct(state.columns["row"][merged])
    if len(targets) + len(singles) <= rank:
        mix = np.zeros((len(merged), len(targets)), np.float32)
        at_target = coefficients[is_convention].sum(1)  # zero elsewhere
        mix[np.arange(len(merged)), group] = at_target
        is_target = (rows[None, :] == targets[:, None]).astype(np.float32)
        values = np.concatenate([is_target, coefficients[~is_convention]])
        return _Factors("merged", merged, mix, singles, values)
    nobody = np.zeros(0, np.int64)
    if len(rows) <= rank:
        identity = np.eye(len(rows), dtype=np.float32)
        return _Factors("by row", used, coefficients, nobody, identity)
    directions = _leading_directions(state, coefficients, used, rank)
    return _Factors("truncated", used, coefficients @ directions, nobody, directions.T.copy())


def _distinct(values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The values without repetition, ascending, and the place of each among them."""
    each = values.tolist()
    distinct = sorted(set(each))
    place = {value: number for number, value in enumerate(distinct)}
    return np.array(distinct, np.int32), [place[value] for value in each]


def _leading_directions(
    state: HeadState, coefficients: np.ndarray, used: np.ndarray, rank: int
) -> np.ndarray:
    """Orthonormal directions of the rows [J, R] that carry most of the weighted shift."""
    columns = state.columns
    is_edit = columns["is_active"] & columns["is_edit"]
    is_constraint = columns["is_active"] & ~columns["is_edit"]
    weight = is_edit / max(is_edit.sum(), 1) + is_constraint / max(is_constraint.sum(), 1)
    shifts = _shifts(state, used, coefficients).astype(np.float64) * np.sqrt(0.5 * weight)[:, None]
    if shifts.shape[0] < shifts.shape[1]:
        energy, left = np.linalg.eigh(shifts @ shifts.T)
        kept = np.flatnonzero(energy > 1e-12 * energy[-1])[::-1][:rank]
        return (shifts.T @ (left[:, kept] / np.sqrt(energy[kept]))).astype(np.float32)
    return np.linalg.eigh(shifts.T @ shifts)[1][:, ::-1][:, :rank].astype(np.float32)


def _shifts(state: HeadState, used: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """The shift of each row at each of the pattern's positions [N, J]."""
    kernel = state.gram[: state.num_positions, used]
    return (kernel + state.features(state.columns["argmax"], used)) @ coefficients


def _tokens(
    state: HeadState, coefficients: np.ndarray, used: np.ndarray, limit: int
) -> tuple[np.ndarray, int]:
    """The base tokens that the table answers to, and how many were too weak to be kept."""
    is_relabel = ~state.columns["is_convention"][used]
    tokens, place = _distinct(state.columns["argmax"][used[is_relabel]])
    if len(tokens) <= limit:
        return tokens, 0
    total = np.bincount(place, np.linalg.norm(coefficients[is_relabel], axis=1), len(tokens))
    kept = np.sort(np.argsort(-total, kind="stable")[:limit])
    return tokens[kept], len(tokens) - limit


def _table(state: HeadState, factors: _Factors, rows: np.ndarray, tokens: np.ndarray) -> HeadTable:
    columns, config, scale = state.columns, state.config, state.metric.mean_norm
    is_convention = columns["is_convention"]
    answers_to = (columns["argmax"][:, None] == tokens[None, :]) & ~is_convention[:, None]
    token_weight = np.float32(config.token_weight * scale)
    const_weight = np.float32(config.const_weight * scale)
    return HeadTable(
        keys=factors.of(state.keys.rows),
        token_ids=tokens,
        token_keys=factors.of(answers_to.astype(np.float32)) * token_weight,
        const_keys=factors.of(is_convention[:, None].astype(np.float32))[:, 0] * const_weight,
        row_ids=state.base.row_ids[rows],
        values=factors.values,
    )


def _replayed(state: HeadState, table: HeadTable, rows: np.ndarray) -> np.ndarray:
    """Log-odds of the pattern's positions [N] under the table."""
    columns = state.columns
    reads = (columns["argmax"][:, None] == table.token_ids[None, :]).astype(np.float32)
    reaction = state.base.hidden.rows @ table.keys.T + reads @ table.token_keys.T + table.const_keys
    logits = state.base.logits[: state.num_positions, : state.base.num_rows].astype(np.float64)
    logits[:, rows] += reaction @ table.values
    return log_odds(logits, state.base.rest.astype(np.float64), columns["row"])


def _report(
    state: HeadState,
    form: Literal["merged", "by row", "truncated"],
    table: HeadTable,
    after: np.ndarray,
    dropped: tuple[int, int],
) -> TableReport:
    columns, before = state.columns, state.log_odds
    active, edits, need = columns["is_active"], columns["is_edit"], columns["need"]
    is_edit, is_constraint = active & edits, active & ~edits
    is_kept, at_least = after > 0, np.minimum(need - np.log(2.0), 0.0)
    return TableReport(
        form=form,
        rank=len(table.keys),
        num_rows=len(table.row_ids),
        num_tokens=len(table.token_ids),
        num_dropped_rows=dropped[0],
        num_dropped_tokens=dropped[1],
        num_edits=int(np.count_nonzero(is_edit)),
        num_kept_before=int(np.count_nonzero(is_edit & (before > 0))),
        num_kept_after=int(np.count_nonzero(is_edit & is_kept)),
        num_constraints=int(np.count_nonzero(is_constraint)),
        num_holding_before=int(np.count_nonzero(is_constraint & (before >= need))),
        num_holding_after=int(np.count_nonzero(is_constraint & (after >= need))),
        min_probability_before=probability(before.min(initial=np.inf, where=is_edit)),
        min_probability_after=probability(after.min(initial=np.inf, where=is_edit)),
        lost=state.feedbacks(active & ~np.where(edits, is_kept, after >= at_least)),
        replaced=state.feedbacks(~active & ~columns["has_yielded"]),
    )
