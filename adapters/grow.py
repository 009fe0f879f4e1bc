"""Taking a batch's positions and rows into a state, before anything is solved for them."""

from dataclasses import replace

import numpy as np

from adapters.base_rows import BaseRows, HeadRows, log_odds
from adapters.batch import Batch
from adapters.errors import CandidateRejected
from adapters.solve import MAX_POSITIONS, MAX_ROWS, bucket_of
from adapters.state import Columns, HeadState, logit

# A confirmed token keeps its fraction within these: a rare one is not protected to the last
# digit, a certain one may lose a little.
_LEAST_NEED, _MOST_NEED = 0.02, 0.99


def admit(state: HeadState, batch: Batch) -> tuple[Batch, np.ndarray]:
    """The positions there is room for, and the rows they bring: targets before base tokens."""
    is_edit, targets = batch.is_edit, batch.targets
    strongest = batch.capture.top_ids[is_edit, : state.config.num_base_rows]
    wanted = np.concatenate([targets[is_edit], strongest.ravel(), targets[~is_edit]])
    rows = dict.fromkeys(state.base.row_ids.tolist())  # a set that keeps its order
    num_old = len(rows)
    for token_id in wanted.tolist():
        if len(rows) < MAX_ROWS:
            rows.setdefault(token_id)
    room = MAX_POSITIONS - state.num_positions
    is_row = np.array([token_id in rows for token_id in targets.tolist()], np.bool_)
    if is_edit.sum() > room or not is_row[is_edit].all():
        raise CandidateRejected(
            f"the pattern holds {state.num_positions} positions on {state.base.num_rows} rows and "
            f"has no room for {int(is_edit.sum())} more edits; at most {MAX_POSITIONS} and "
            f"{MAX_ROWS} are solved together: remove feedback, or consolidate the pattern"
        )
    keep = is_row.copy()
    spare = room - int(is_edit.sum())
    keep[np.flatnonzero(is_row & ~is_edit)[spare:]] = False
    new = np.array(list(rows)[num_old:], np.int32)
    return (batch if keep.all() else batch.taken(keep)), new


def grow(state: HeadState, batch: Batch, row_ids: np.ndarray, head_rows: HeadRows) -> HeadState:
    """Append positions and rows. The new positions are solved for by nobody yet."""
    old, count = state.num_positions, state.num_positions + len(batch.targets)
    shape = bucket_of(count, state.base.num_rows + len(row_ids))
    base = state.base.extended(row_ids, batch.capture, head_rows, shape)
    keys = state.keys.append(state.metric.apply(base.hidden.rows[old:]))
    cross = base.hidden.rows[old:] @ keys.rows.T
    gram = np.zeros((shape[0], shape[0]), np.float32)
    gram[:old, :old] = state.gram[:old, :old]
    gram[old:count, :count] = cross
    gram[:old, old:count] = cross[:, :old].T
    coefficients = state.coefficients  # zero wherever there was nothing yet
    if coefficients.shape != shape:
        coefficients = np.zeros(shape, np.float32)
        coefficients[: state.gram.shape[0], : state.coefficients.shape[1]] = state.coefficients
    known = state.feedback_ids
    ids = known if batch.feedback_id in known else (*known, batch.feedback_id)
    return replace(
        state,
        base=base,
        keys=keys,
        gram=gram,
        columns=_columns(state, batch, base, cross, ids.index(batch.feedback_id)),
        coefficients=coefficients,
        feedback_ids=ids,
    )


def _columns(
    state: HeadState, batch: Batch, base: BaseRows, cross: np.ndarray, feedback: int
) -> Columns:
    """The old columns and those of the batch; a constraint needs what it has by now."""
    config, old, count = state.config, state.num_positions, len(batch.targets)
    row = base.columns(batch.targets).astype(np.int32)
    argmax = batch.capture.top_ids[:, 0]
    need = np.full(count, logit(config.target_probability), np.float32)
    kept = np.flatnonzero(~batch.is_edit)
    if len(kept):
        odds = _best_log_odds(state, base, old + kept, row[kept], cross[kept, :old])
        share = config.constraint_fraction / (1.0 + np.exp(-odds))
        need[kept] = logit(share.clip(_LEAST_NEED, _MOST_NEED))
    no = np.zeros(count, np.bool_)
    return state.columns.followed_by(Columns(
        target=batch.targets.astype(np.int32), row=row, argmax=argmax,
        argmax_logit=batch.capture.top_logprobs[:, 0],
        feedback=np.full(count, feedback, np.int32), need=need, norm=np.diagonal(cross, old),
        is_edit=batch.is_edit, is_active=~no, is_repeat=no, is_convention=no,
        strength=np.zeros(count, np.float64),
    ))  # fmt: skip


def _best_log_odds(
    state: HeadState, base: BaseRows, positions: np.ndarray, row: np.ndarray, cross: np.ndarray
) -> np.ndarray:
    """Log-odds of new positions' targets, served or base, whichever is higher; float64.

    The base's counts too: an edit may have pushed a token down that is now declared right.
    """
    old, num_old_rows = state.num_positions, state.base.num_rows
    logits = base.logits[positions, : base.num_rows].astype(np.float64)
    served = logits.copy()
    kernel = cross + state.features(base.top_ids.rows[positions, 0])
    served[:, :num_old_rows] += kernel @ state.coefficients[:old, :num_old_rows]
    rest = base.rest[positions].astype(np.float64)
    both = log_odds(np.concatenate([logits, served]), np.tile(rest, 2), np.tile(row, 2))
    return both.reshape(2, -1).max(0)
