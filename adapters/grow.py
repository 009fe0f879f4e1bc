"""Taking a batch's positions and rows into a state, before anything is solved for them."""

from dataclasses import replace

import numpy as np

from adapters.base_rows import BaseRows, HeadRows
from adapters.batch import Batch
from adapters.errors import CandidateRejected
from adapters.solve import MAX_POSITIONS, MAX_ROWS, bucket_of
from adapters.state import POSITION, HeadState, logit

# A confirmed token keeps its fraction within these: a rare one is not protected to the last
# digit, a certain one may lose a little.
_LEAST_NEED, _MOST_NEED = 0.02, 0.99


def admit(state: HeadState, batch: Batch) -> tuple[Batch, np.ndarray]:
    """The positions there is room for, and the rows they bring: targets before base tokens."""
    is_edit, targets = batch.is_edit, batch.targets
    strongest = batch.capture.top_ids[is_edit, : state.config.num_base_rows]
    wanted = np.concatenate([targets[is_edit], strongest.ravel(), targets[~is_edit]])
    known = state.base.row_of
    new = [token_id for token_id in dict.fromkeys(wanted.tolist()) if token_id not in known]
    new = new[: MAX_ROWS - len(known)]
    room = MAX_POSITIONS - state.num_positions
    fresh = set(new)
    is_row = np.array([t in known or t in fresh for t in targets.tolist()], np.bool_)
    if is_edit.sum() > room or not is_row[is_edit].all():
        raise CandidateRejected(
            f"the pattern holds {state.num_positions} positions on {state.base.num_rows} rows and "
            f"has no room for {int(is_edit.sum())} more edits; at most {MAX_POSITIONS} and "
            f"{MAX_ROWS} are solved together: remove feedback, or consolidate the pattern"
        )
    keep = is_row.copy()
    spare = room - int(is_edit.sum())
    keep[np.flatnonzero(is_row & ~is_edit)[spare:]] = False
    return (batch if keep.all() else batch.taken(keep)), np.array(new, np.int32)


def grow(state: HeadState, batch: Batch, row_ids: np.ndarray, head_rows: HeadRows) -> HeadState:
    """Append positions and rows. The new positions are solved for by nobody yet."""
    old, count = state.num_positions, state.num_positions + len(batch.targets)
    shape = bucket_of(count, state.base.num_rows + len(row_ids))
    base = state.base.extended(row_ids, batch.capture, head_rows, shape)
    new_keys = state.metric.apply(base.hidden.rows[old:])
    cross = new_keys @ base.hidden.rows.T  # M is symmetric; the states were read just now
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
        keys=state.keys.append(new_keys),
        gram=gram,
        columns=_columns(state, batch, base, cross, ids.index(batch.feedback_id)),
        coefficients=coefficients,
        feedback_ids=ids,
    )


def _columns(
    state: HeadState, batch: Batch, base: BaseRows, cross: np.ndarray, feedback: int
) -> np.ndarray:
    """The old columns and those of the batch; a constraint needs what it has by now."""
    config, old = state.config, state.num_positions
    columns = np.zeros(old + len(batch.targets), POSITION)
    columns[:old] = state.columns
    new = columns[old:]
    new["target"], new["row"] = batch.targets, base.columns(batch.targets)
    new["argmax"] = batch.capture.top_ids[:, 0]
    new["argmax_logit"] = batch.capture.top_logprobs[:, 0]
    new["feedback"], new["norm"] = feedback, np.diagonal(cross, old)
    new["is_edit"], new["is_active"] = batch.is_edit, True
    new["need"] = logit(config.target_probability)
    kept = np.flatnonzero(~batch.is_edit)
    if len(kept):
        best = _best_probability(state, base, old + kept, new["row"][kept], cross[kept, :old])
        share = config.constraint_fraction * best
        new["need"][kept] = logit(share.clip(_LEAST_NEED, _MOST_NEED))
    return columns


def _best_probability(
    state: HeadState, base: BaseRows, positions: np.ndarray, row: np.ndarray, cross: np.ndarray
) -> np.ndarray:
    """Probability of new positions' targets, served or base, whichever is higher.

    The base's counts too: an edit may have pushed a token down that is now declared right.
    """
    num_old, num_old_rows = state.num_positions, state.base.num_rows
    logits = base.logits[positions, : base.num_rows]
    own = np.arange(len(row)), row
    base_logit = logits[own]  # relative to the log-sum-exp: a log-probability
    kernel = cross + state.features(base.top_ids.rows[positions, 0])
    logits[:, :num_old_rows] += kernel @ state.coefficients[:num_old, :num_old_rows]
    rest = base.rest[positions]
    peak = np.maximum(logits.max(1), rest)
    total = np.exp(logits - peak[:, None]).sum(1) + np.exp(rest - peak)
    return np.exp(np.maximum(base_logit, logits[own] - peak - np.log(total)))
