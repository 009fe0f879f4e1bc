"""Which targets are taught as a convention: chosen from the pattern's feedback alone.

A convention says "in this gate, the token is y", whatever the base would have said: an in-gate
feature of weight 1 and the value e_y. It reaches every prompt of the gate, so it needs evidence
that no other right token is in its way. A target y is a convention when

  1. corrections of two or more feedbacks, at positions that differ, asked for y where the base's
     argmax was something else; and
  2. no position where another token is right contradicts it. A position (confirmed, already right
     in a corrected answer, or corrected to another token) contradicts y when
       a. the base's argmax there is one that y was asked to replace: "c becomes y" is false there,
          and only the hidden state can tell the two apart; or
       b. the convention alone would bring y within `_TAKEOVER` of the base's argmax there: what
          it would do to a position somebody has vouched for, it does to its unseen neighbours.

Every other target is a relabel: it acts through the hidden state and the base's argmax only.

2b needs the convention's shift before it exists. It is the shift of the trial: members in order
of arrival, each of strength alpha_j >= 0 with which, on top of the earlier ones, y reaches its
target probability. Row y moves at position i by sum_j alpha_j (h_i^T M h_j + w). With v = e_y the
needed shift is exact, and strengths never shrink, so no sweep is needed.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

# y may not come nearer to the base's argmax than a ninth of its probability: a pair of them then
# keeps 0.9, the fraction a confirmed token has to keep.
_TAKEOVER = float(np.log(9.0))


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What feedback says about N positions. `is_member`: an active correction of a wrong token."""

    gram: Float[np.ndarray, "N N"]
    argmax: Int[np.ndarray, " N"]
    target: Int[np.ndarray, " N"]  # token ids
    feedback: Int[np.ndarray, " N"]  # number of the feedback
    is_active: Bool[np.ndarray, " N"]
    is_member: Bool[np.ndarray, " N"]
    is_repeat: Bool[np.ndarray, " N"]  # says again what an earlier position with the same key said


def extend_strength(
    known: Float[np.ndarray, " K"],
    evidence: Evidence,
    needed: Float[np.ndarray, " L"],
    const: float,
) -> Float[np.ndarray, " N"]:
    """The trial's strengths alpha of all N positions, given those of the first K; 0 for no member.

    `needed` is the shift in nats with which the target of each of the L others would reach its
    probability; `const` the in-gate feature.
    """
    strength = np.concatenate([known, np.zeros(len(needed))])
    for new in len(known) + np.flatnonzero(evidence.is_member[len(known) :]):
        same = np.flatnonzero(
            evidence.is_member[:new] & (evidence.target[:new] == evidence.target[new])
        )
        reached = strength[same] @ (evidence.gram[new, same] + const)
        missing = max(needed[new - len(known)] - reached, 0.0)
        strength[new] = missing / (evidence.gram[new, new] + const)
    return strength


def conventions(
    evidence: Evidence,
    strength: Float[np.ndarray, " N"],
    base_logits: Float[np.ndarray, "N J"],
    argmax_logit: Float[np.ndarray, " N"],
    row_of: Int[np.ndarray, " N"],
    const: float,
) -> Int[np.ndarray, " T"]:
    """Token ids that are taught as a convention, ascending.

    Args:
      base_logits: relative to any per-position constant, the same as `argmax_logit`.
      row_of: column of each position's target in `base_logits`.
      const: weight of the in-gate feature, times the mean key norm.
    """
    candidates, first = _shared_targets(evidence)
    if len(candidates) == 0:
        return candidates
    asks = evidence.target[:, None] == candidates[None, :]
    members = np.flatnonzero(evidence.is_member & asks.any(1))
    belongs = asks[members]
    action = (evidence.gram[:, members] + const) * strength[members]
    shifted = base_logits[:, row_of[first]] + action @ belongs
    takes_over = shifted > (argmax_logit - _TAKEOVER)[:, None]
    replaces = (evidence.argmax[:, None] == evidence.argmax[members][None, :]) @ belongs
    other = evidence.is_active[:, None] & ~asks
    return candidates[~(other & (takes_over | replaces)).any(0)]


def _shared_targets(evidence: Evidence) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Targets that two or more feedbacks asked for, ascending, and one member of each."""
    members = np.flatnonzero(evidence.is_member & ~evidence.is_repeat)
    targets, feedbacks = evidence.target[members].tolist(), evidence.feedback[members].tolist()
    asked_by, shared = dict(zip(targets, feedbacks, strict=True)), dict[int, int]()
    for target, feedback, member in zip(targets, feedbacks, members.tolist(), strict=True):
        if asked_by[target] != feedback:
            shared[target] = member
    candidates = sorted(shared)
    return np.array(candidates, np.int32), np.array([shared[y] for y in candidates], np.int64)
