"""An answer to learn from: its tokens, and what should have followed at each position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine import Capture


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Tokens and, for each answer token, the distribution that should have produced it.

        tokens   p0 p1 p2 | a0 a1 a2        first = 3, A = 3
        targets             t0 t1 t2        t1 is what should follow p0 p1 p2 a0

    A target is a few likely tokens and the mass of all others together: a teacher's capture, or one
    token alone where a correction says what is right.
    """

    tokens: np.ndarray  # [T] int32, prompt and answer
    first: int  # index of the answer's first token, at least 1
    ids: np.ndarray  # [A, K] int32, A = T - first
    probabilities: np.ndarray  # [A, K] float32
    rest: np.ndarray  # [A] float32, of all other tokens
    weight: float = 1.0

    def __post_init__(self) -> None:
        num = len(self.tokens) - self.first
        shapes = {len(self.ids), len(self.probabilities), len(self.rest)}
        if self.first < 1 or num < 1 or shapes != {num}:
            raise ValueError(
                f"{len(self.tokens)} tokens with an answer from {self.first} need {num} targets of "
                f"each kind, found {sorted(shapes)}; an answer has a prompt and a token or more"
            )


def spoken(prompt: Sequence[int], answer: Sequence[int], *, weight: float = 1.0) -> Example:
    """Learn to say exactly this."""
    ids = np.asarray(answer, np.int32)[:, None]
    return Example(
        tokens=np.asarray([*prompt, *answer], np.int32),
        first=len(prompt),
        ids=ids,
        probabilities=np.ones(ids.shape, np.float32),
        rest=np.zeros(len(ids), np.float32),
        weight=weight,
    )


def taught(
    prompt: Sequence[int], answer: Sequence[int], teacher: Capture, *, weight: float = 1.0
) -> Example:
    """Learn to say it as a teacher does, who may have read more than the prompt.

    `teacher` has the state before each token of the answer: those of another prompt, of another
    version, or of the base.
    """
    probabilities = np.exp(np.asarray(teacher.top_logprobs, np.float32))
    return Example(
        tokens=np.asarray([*prompt, *answer], np.int32),
        first=len(prompt),
        ids=np.asarray(teacher.top_ids, np.int32),
        probabilities=probabilities,
        rest=np.exp(np.asarray(teacher.rest_logprob, np.float32)),
        weight=weight,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """Examples of one shape, for one compiled program."""

    tokens: np.ndarray  # [B, T] int32
    at: np.ndarray  # [B, A] int32, position whose state predicts the target; 0 where there is none
    ids: np.ndarray  # [B, A, K] int32; V where there is none
    probabilities: np.ndarray  # [B, A, K] float32
    rest: np.ndarray  # [B, A] float32
    weight: np.ndarray  # [B, A] float32; those of an example add up to its own


def padded(
    examples: Sequence[Example], *, length: int, num_targets: int, num_ids: int, no_id: int
) -> Padded:
    """Fill examples up. Raises ValueError when one exceeds the shape.

    Every target of an example has the same weight, so that a long answer counts as much as a short
    one.
    """
    rows = len(examples)
    out = Padded(
        tokens=np.zeros((rows, length), np.int32),
        at=np.zeros((rows, num_targets), np.int32),
        ids=np.full((rows, num_targets, num_ids), no_id, np.int32),
        probabilities=np.zeros((rows, num_targets, num_ids), np.float32),
        rest=np.zeros((rows, num_targets), np.float32),
        weight=np.zeros((rows, num_targets), np.float32),
    )
    for row, each in enumerate(examples):
        size, (count, width) = len(each.tokens), each.ids.shape
        if size > length or count > num_targets or width > num_ids:
            raise ValueError(
                f"an example of {size} tokens, {count} targets and {width} ids exceeds a shape of "
                f"{length}, {num_targets} and {num_ids}"
            )
        out.tokens[row, :size] = each.tokens
        out.at[row, :count] = np.arange(each.first - 1, size - 1)
        out.ids[row, :count, :width] = each.ids
        out.probabilities[row, :count, :width] = each.probabilities
        out.rest[row, :count] = each.rest
        out.weight[row, :count] = each.weight / count
    return out
