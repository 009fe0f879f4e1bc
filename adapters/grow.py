"""Taking a batch's positions and rows into a state, before anything is solved for them."""

from dataclasses import replace

import numpy as np

from adapters.base_rows import BaseRows, HeadRows
from adapters.batch import Batch
from adapters.errors import CandidateRejected
from adapters.solve import FLOOR, MAX_POSITIONS, MAX_ROWS, bucket_of
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
    served = _served(state, base, cross, shape)
    known = state.feedback_ids
    ids = known if batch.feedback_id in known else (*known, batch.feedback_id)
    feedback = ids.index(batch.feedback_id)
    return replace(
        state,
        base=base,
        keys=state.keys.append(new_keys),
        gram=gram,
        columns=_columns(state, batch, base, np.diagonal(cross, old), served, feedback),
        coefficients=coefficients,
        served=served,
        feedback_ids=ids,
    )


def _served(
    state: HeadState, base: BaseRows, cross: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """The served logits with the new positions and rows, which nobody has stepped for yet."""
    old, count = state.num_positions, base.num_positions
    num_old_rows, num_rows = state.base.num_rows, base.num_rows
    served = np.full(shape, FLOOR, np.float32)
    served[:old, :num_old_rows] = state.served[:old, :num_old_rows]
    served[:old, num_old_rows:num_rows] = base.logits[:old, num_old_rows:num_rows]
    new = served[old:count, :num_rows]
    new[:] = base.logits[old:count, :num_rows]
    kernel = cross[:, :old] + state.features(base.top_ids.rows[old:, 0])
    new[:, :num_old_rows] += kernel @ state.coefficients[:old, :num_old_rows]
    return served


def _columns(
    state: HeadState,
    batch: Batch,
    base: BaseRows,
    norm: np.ndarray,
    served: np.ndarray,
    feedback: int,
) -> np.ndarray:
    """The old columns and those of the batch; a constraint needs what it has by now."""
    config, old = state.config, state.num_positions
    columns = np.zeros(base.num_positions, POSITION)
    columns[:old] = state.columns
    new = columns[old:]
    new["target"], new["row"] = batch.targets, base.columns(batch.targets)
    new["argmax"] = batch.capture.top_ids[:, 0]
    new["argmax_logit"] = batch.capture.top_logprobs[:, 0]
    new["feedback"], new["norm"] = feedback, norm
    new["is_edit"], new["is_active"] = batch.is_edit, True
    new["need"] = logit(config.target_probability)
    kept = np.flatnonzero(~batch.is_edit)
    if len(kept):
        best = _best_probability(base, served, old + kept, new["row"][kept])
        share = config.constraint_fraction * best
        new["need"][kept] = logit(share.clip(_LEAST_NEED, _MOST_NEED))
    return columns


def _best_probability(
    base: BaseRows, served: np.ndarray, positions: np.ndarray, row: np.ndarray
) -> np.ndarray:
    """Probability of new positions' targets, served or base, whichever is higher.

    The base's counts too: an edit may have pushed a token down that is now declared right.
    """
    before = base.logits[positions, row]  # relative to the log-sum-exp: a log-probability
    logits, rest = served[positions], base.rest[positions]
    peak = np.maximum(logits.max(1), rest)
    total = np.exp(logits - peak[:, None]).sum(1) + np.exp(rest - peak)
    after = logits[np.arange(len(row)), row] - peak - np.log(total)
    return np.exp(np.maximum(before, after))
