"""One feedback's positions, as they come from a capture."""

from dataclasses import dataclass

import numpy as np

from adapters.errors import CandidateRejected
from engine import NUM_CAPTURED_LOGITS, Capture


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Positions of one feedback: tokens that must become likely, and tokens that must stay so.

    A feedback may come in several batches (the captured positions, then those of a teacher-forced
    pass). A confirmation is a feedback without any edit.
    """

    feedback_id: str
    capture: Capture  # T positions
    targets: np.ndarray  # [T] int32, the right token at each position
    is_edit: np.ndarray  # [T] bool; False is a constraint: right already, must stay

    def taken(self, keep: np.ndarray) -> "Batch":
        """The positions where `keep` [T] is true."""
        return Batch(
            feedback_id=self.feedback_id,
            capture=Capture(
                self.capture.hidden[keep],
                self.capture.top_ids[keep],
                self.capture.top_logprobs[keep],
                self.capture.rest_logprob[keep],
            ),
            targets=self.targets[keep],
            is_edit=self.is_edit[keep],
        )


def check(batch: Batch, dim: int) -> None:
    """Refuse shapes that contradict each other and values no softmax can give.

    Raises:
      CandidateRejected: naming the array and what is allowed.
    """
    capture, count = batch.capture, len(batch.targets)
    logits = (count, NUM_CAPTURED_LOGITS)
    for name, array, shape in (
        ("hidden", capture.hidden, (count, dim)),
        ("top_ids", capture.top_ids, logits),
        ("top_logprobs", capture.top_logprobs, logits),
        ("rest_logprob", capture.rest_logprob, (count,)),
        ("is_edit", batch.is_edit, (count,)),
    ):
        if array.shape != shape:
            raise CandidateRejected(
                f"feedback {batch.feedback_id}: {name} has shape {array.shape}; {count} positions "
                f"of this model need {shape}; capture the answer again"
            )
    hidden = np.asarray(capture.hidden, np.float32)
    if count == 0:
        return
    energy = np.einsum("td,td->t", hidden, hidden)
    if not (energy.min() > 0.0 and energy.max() < np.inf):  # NaN fails the first
        raise CandidateRejected(
            f"feedback {batch.feedback_id}: a hidden state is zero, infinite or NaN; "
            "nothing can be learned from it"
        )
    top, rest = capture.top_logprobs, capture.rest_logprob
    if not (top.max() < 1e-2 and rest.max() < 1e-2 and top.min() > -np.inf):
        raise CandidateRejected(
            f"feedback {batch.feedback_id}: a captured log-probability is above 0, infinite or "
            "NaN; capture the answer again"
        )
    if batch.targets.min() < 0:
        raise CandidateRejected(
            f"feedback {batch.feedback_id}: target {int(batch.targets.min())} is no token id; "
            "use ids of the served tokenizer"
        )
