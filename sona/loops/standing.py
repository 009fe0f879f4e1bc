"""What a version means for the feedback in it: LEARNED only while the served table holds it.

A version's report names the feedback that it does not hold, by the way it fails to; whatever is in
force and not named there is LEARNED. `_FLAWS` is what its author is told.
"""

from adapters.store import VersionInfo
from sona.journal import FeedbackRecord, FeedbackState, StateChange
from sona.loops.lessons import MAX_POSITIONS

_FLAWS = {
    "partial": "in force in part: restored from a version that holds only its beginning",
    "replaced": "in force in part: a later feedback contradicts it",
    "lost": "in force in part: the pattern cannot hold some of its tokens beside the others",
}


def standing(record: FeedbackRecord, info: VersionInfo, num_targets: int) -> StateChange:
    """The state that a version means for a feedback of `num_targets` tokens."""
    report = info.report
    if record.seq not in info.feedback_seqs:
        why = report.get("reason") or f"rolled back to version {info.restores}"
        return StateChange(state=FeedbackState.ROLLED_BACK, reason=str(why))
    for flaw, reason in _FLAWS.items():
        if record.feedback_id in report.get(flaw, ()):
            is_coming = flaw == "partial" and info.restores is None  # the rest is on its way
            return StateChange(
                state=FeedbackState.ACCEPTED,
                reason="" if is_coming else reason,
                is_learnable=None if is_coming else False,
            )
    reason = ""
    if num_targets > MAX_POSITIONS:
        reason = f"{MAX_POSITIONS} of {num_targets} tokens are kept, the wrong and uncertain first"
    return StateChange(state=FeedbackState.LEARNED, reason=reason)


def moved(before: VersionInfo | None, after: VersionInfo) -> tuple[set[int], set[str]]:
    """Feedback that came or went, by number, and feedback that stands otherwise, by id."""
    earlier = {} if before is None else before.report
    seqs = set(() if before is None else before.feedback_seqs) ^ set(after.feedback_seqs)
    names: set[str] = set()
    for flaw in _FLAWS:
        names |= set(earlier.get(flaw, ())) ^ set(after.report.get(flaw, ()))
    return seqs, names
