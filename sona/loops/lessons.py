"""A feedback as positions: which tokens must come, which must stay, in which states.

    generated   a b c d            captured states exist for the positions of a, b, c, d
    corrected   a b x e            valid under the correction: those of a, b and c (predicts x)

So the first divergent token can be learned at once; what follows it needs a teacher-forced pass.
"""

from collections.abc import Sequence

import numpy as np

from adapters.align import align
from adapters.batch import Batch
from engine.api import Capture
from sona.journal import PositionKind, Positions

MAX_AT_ONCE = 4  # positions of the first step, so that it stays below a millisecond
MAX_POSITIONS = 256  # of one feedback


def captured_lesson(
    answer_ids: Sequence[int], corrected_ids: Sequence[int], capture: Capture
) -> Positions | None:
    """What a correction teaches with the answer's own states.

    The first divergent position is an edit. The least certain positions before it are kept as
    constraints. None when no state predicts the divergence.
    """
    alignment = align(answer_ids, corrected_ids)
    first = alignment.num_common
    if not alignment.has_divergent_state or first >= len(capture.hidden):
        return None
    certainty = _target_logprobs(capture, np.asarray(answer_ids[:first], np.int64))
    kept = np.sort(np.argsort(certainty, kind="stable")[: MAX_AT_ONCE - 1]).tolist()
    indices = [*kept, first]
    targets = [*(answer_ids[index] for index in kept), corrected_ids[first]]
    kinds = [PositionKind.CONSTRAINT] * len(kept) + [PositionKind.EDIT]
    return _positions(indices, targets, kinds, capture)


def scored_lesson(
    target_ids: Sequence[int],
    capture: Capture,
    *,
    skip: Sequence[int] = (),
    is_confirmation: bool = False,
) -> Positions | None:
    """What a whole answer teaches after a teacher-forced pass over it.

    A token that the base would not say is an edit, every other one a constraint; in a
    confirmation all are constraints. `skip` are positions already learned. Of an answer too long
    to keep, edits go before constraints and the uncertain before the certain. None when no
    position is left, or no room.
    """
    known = set(skip)
    left = [index for index in range(len(target_ids)) if index not in known]
    is_wrong = np.asarray(target_ids, np.int64) != capture.top_ids[: len(target_ids), 0]
    certainty = _target_logprobs(capture, np.asarray(target_ids, np.int64))
    left.sort(key=lambda index: (not is_wrong[index], certainty[index]))
    indices = sorted(left[: max(MAX_POSITIONS - len(known), 0)])
    if not indices:
        return None
    kinds = [
        PositionKind.EDIT if is_wrong[index] and not is_confirmation else PositionKind.CONSTRAINT
        for index in indices
    ]
    return _positions(indices, [target_ids[index] for index in indices], kinds, capture)


def is_whole(num_targets: int, num_positions: int) -> bool:
    """Whether these many known positions are all that is kept of an answer of these many tokens."""
    return num_positions >= min(num_targets, MAX_POSITIONS)


def as_batch(feedback_id: str, positions: Positions) -> Batch:
    """Positions as the solver takes them."""
    return Batch(
        feedback_id=feedback_id,
        capture=positions.capture,
        targets=np.asarray(positions.target_ids, np.int32),
        is_edit=np.array([kind is PositionKind.EDIT for kind in positions.kinds], np.bool_),
    )


def _positions(
    indices: list[int], targets: list[int], kinds: list[PositionKind], capture: Capture
) -> Positions:
    rows = np.asarray(indices)
    return Positions(
        indices=tuple(indices),
        target_ids=tuple(int(target) for target in targets),
        kinds=tuple(kinds),
        capture=Capture(
            capture.hidden[rows],
            capture.top_ids[rows],
            capture.top_logprobs[rows],
            capture.rest_logprob[rows],
        ),
    )


def _target_logprobs(capture: Capture, targets: np.ndarray) -> np.ndarray:
    """Base log-probability of each target; the rest mass where it is not among the 64."""
    count = len(targets)
    hit = capture.top_ids[:count] == targets[:, None]
    known = np.where(hit, capture.top_logprobs[:count], -np.inf).max(axis=1, initial=-np.inf)
    return np.where(hit.any(axis=1), known, capture.rest_logprob[:count])
