"""Scores and thumbs, as counts: which of the tokens said at a choice point did well.

A choice point is a state at which the model says one thing or another. Each token y that was said
there has a number of scores n_y and their sum s_y, each score in [0, 1]. Its logit is moved by

    d_y = 6 (s_y - n_y m) / (n_y + 4)        m the mean of all scores at the point

which is 6 times the token's mean score over that of all, shrunk as if four more average scores had
come: 0 for a token nobody scored, 0 for all where scores say nothing, at most 6 in the limit. The
shift is a function of the counts alone, so a score is taken back by not counting it, and noise does
not add up: gradient steps of any fixed size end in certainty on scores that carry no information
(docs/learning.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_SCALE = 6.0  # nats between a token that always pleases and one that never does
_PRIOR = 4.0  # average scores that each token begins with


@dataclass(frozen=True, slots=True)
class Scored:
    """What one token got."""

    count: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class ChoicePoint:
    """The scores of one choice point. Weights are trust: a score may count less than once."""

    tokens: Mapping[int, Scored] = field(default_factory=dict[int, Scored])

    def with_score(self, token_id: int, score: float, *, weight: float = 1.0) -> "ChoicePoint":
        """One score more. Raises ValueError for a score outside [0, 1] or a weight of nothing."""
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"score is {score}; use a number from 0 (bad) to 1 (good)")
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight is {weight}; use a finite number above 0")
        before = self.tokens.get(token_id, Scored())
        after = Scored(before.count + weight, before.total + weight * score)
        return ChoicePoint({**self.tokens, token_id: after})

    @property
    def mean(self) -> float:
        """Of all scores here; 0.5 before there are any."""
        count = sum(each.count for each in self.tokens.values())
        return sum(each.total for each in self.tokens.values()) / count if count else 0.5

    def shifts(self) -> dict[int, float]:
        """Nats by which each scored token's logit moves; every other one's stays."""
        mean = self.mean
        return {
            token_id: _SCALE * (each.total - each.count * mean) / (each.count + _PRIOR)
            for token_id, each in self.tokens.items()
        }
