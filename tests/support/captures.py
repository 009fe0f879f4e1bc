"""Captures as the engine would take them, from states and a head that a test made up."""

import ml_dtypes
import numpy as np

from engine import NUM_CAPTURED_LOGITS, Capture


def capture_of(hidden, head):
    """A capture of states [T, D] under a head [V, D], V > 64; logits in float64, h in bfloat16.

    The logits are those of the unrounded states, as in the engine.
    """
    hidden = np.asarray(hidden, np.float64)
    logits = hidden @ np.asarray(head, np.float64).T
    peak = logits.max(1, keepdims=True)
    logits = logits - peak - np.log(np.exp(logits - peak).sum(1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")
    top, rest = order[:, :NUM_CAPTURED_LOGITS], order[:, NUM_CAPTURED_LOGITS:]
    outside = np.take_along_axis(logits, rest, 1)
    highest = outside.max(1)
    return Capture(
        hidden=hidden.astype(np.float32).astype(ml_dtypes.bfloat16),
        top_ids=top.astype(np.int32),
        top_logprobs=np.take_along_axis(logits, top, 1).astype(np.float32),
        rest_logprob=(highest + np.log(np.exp(outside - highest[:, None]).sum(1))).astype(
            np.float32
        ),
    )


def rows_of(head):
    """The gather that the engine offers for its served head."""
    weights = np.asarray(head, np.float32)
    return lambda ids: weights[ids]
