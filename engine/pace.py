"""What the engine's time goes into: for deadlines, retry hints, and learning's share of it.

A chunk of a prompt is padded to a bucket, so its time is the bucket's, however few tokens it has.
The least of late is kept, not the mean: it must not refuse what could have been done. One slow
measurement raises it by a twentieth at most, and a refusal, which is never measured, lowers it.
"""

from collections.abc import Sequence

_MOST_CREDIT_S = 0.05  # about one slice of learning
_RISE = 1.05  # of an estimate by one measurement
_DOUBT = 0.8  # of an estimate after a refusal


class Pace:
    """The engine's own speed; nothing is thought to take time until it was measured."""

    def __init__(self, buckets: Sequence[int]) -> None:
        """`buckets`: tokens that chunks are padded to, rising."""
        self._chunk_s = dict.fromkeys(buckets, 0.0)
        self._step_s = 0.0

    def prefilled(self, num_tokens: int, spent_s: float) -> None:
        """A chunk of a prompt was computed."""
        bucket = self._bucket(num_tokens)
        self._chunk_s[bucket] = _lately(self._chunk_s[bucket], spent_s)

    def decoded(self, spent_s: float) -> None:
        """One token of every running sequence was computed."""
        self._step_s = _lately(self._step_s, spent_s)

    def refused(self) -> None:
        """A job was thought to take too long."""
        self._chunk_s = {bucket: _DOUBT * spent for bucket, spent in self._chunk_s.items()}
        self._step_s *= _DOUBT

    def least_s(self, num_prompt: int, num_generated: int = 0) -> float:
        """Time that this takes when nothing holds it up."""
        largest = max(self._chunk_s)
        chunks, rest = divmod(num_prompt, largest)
        rest_s = self._chunk_s[self._bucket(rest)] if rest else 0.0
        return chunks * self._chunk_s[largest] + rest_s + num_generated * self._step_s

    def _bucket(self, num_tokens: int) -> int:
        return min(bucket for bucket in self._chunk_s if bucket >= num_tokens)


def _lately(before: float, now: float) -> float:
    return min(now, before * _RISE) if before else now


class Slack:
    """Learning's share of the engine's time while users wait."""

    def __init__(self, share: float) -> None:
        """`share`: of all the time, in (0, 1]."""
        self._rate = share / (1 - share + 1e-9)  # of users' time
        self._credit_s = 0.0

    @property
    def may_learn(self) -> bool:
        """Whether the next turn has time for a slice."""
        return self._credit_s > 0

    def spent(self, turn_s: float, learning_s: float) -> None:
        """A turn that users waited for took this long, so much of it for learning."""
        earned_s = (turn_s - learning_s) * self._rate - learning_s
        self._credit_s = min(self._credit_s + earned_s, _MOST_CREDIT_S)
