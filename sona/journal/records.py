"""What the journal takes and gives back: frozen data, no SQL.

A request is kept for the retention time. A feedback takes with it what it needs of its request,
so it outlives the request.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from engine import Capture, ShapeError
from sona.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class AdapterSpan:
    """The adapter version that shaped the answer tokens start <= index < end."""

    name: str
    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer to a request."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestRecord:
    """A served request. `request_id` is unique per tenant within retention."""

    tenant: str
    principal: str
    request_id: str
    model: str
    base_hash: str
    created: float  # unix seconds
    prompt_ids: tuple[int, ...]
    prompt_text: str | None  # for people: text as it came, messages as JSON
    prompt_vector: np.ndarray | None  # [D] float32, mean final hidden state of the prompt
    choices: tuple[Choice, ...]
    adapter_versions: tuple[AdapterSpan, ...] = ()


class FeedbackKind(enum.StrEnum):
    """Which signal a feedback carries."""

    CORRECTION = "correction"
    SCORE = "score"
    VERDICT = "verdict"
    PREFERENCE = "preference"


@dataclass(frozen=True, slots=True)
class Correction:
    """The answer that should have been given."""

    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """How good the answer was, in [0, 1]; thumbs are 0 and 1."""

    value: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0:
            raise InvalidRequest(f"score is {self.value}; use a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the answer was right."""

    is_pass: bool


@dataclass(frozen=True, slots=True)
class Preference:
    """Which of two answers was better."""

    chosen: str
    rejected: str


Signal = Correction | Score | Verdict | Preference


def is_learnable(signal: Signal) -> bool:
    """Whether the instant loop learns from it: corrections, passes and full scores."""
    match signal:
        case Correction():
            return True
        case Verdict(is_pass):
            return is_pass
        case Score(value):
            return value == 1.0
        case Preference():
            return False


class FeedbackState(enum.StrEnum):
    """What became of a feedback. REMOVED is final."""

    ACCEPTED = "ACCEPTED"  # on disk, not learned
    LEARNED = "LEARNED"
    REJECTED = "REJECTED"
    QUARANTINED = "QUARANTINED"
    ROLLED_BACK = "ROLLED_BACK"
    REMOVED = "REMOVED"  # its texts, ids, vectors and positions are gone


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackDraft:
    """A feedback as the caller knows it. The journal adds the rest from the request."""

    tenant: str
    principal: str
    feedback_id: str  # unique per tenant
    request_id: str
    choice_index: int = 0
    signal: Signal
    comment: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    created: float  # unix seconds
    pattern_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeedbackRecord:
    """A stored feedback and its state."""

    seq: int  # rises in commit order, never reused
    tenant: str
    principal: str
    feedback_id: str
    request_id: str
    choice_index: int
    signal: Signal  # emptied when REMOVED
    comment: str
    metadata: Mapping[str, str]
    created: float  # unix seconds
    state: FeedbackState
    adapter: str | None
    version: int | None
    reason: str
    conflicts_with: tuple[str, ...]  # feedback_ids of earlier feedback it contradicts
    pattern_id: int | None
    model: str
    base_hash: str
    adapter_versions: tuple[AdapterSpan, ...]  # that shaped the answer
    prompt_text: str | None
    prompt_ids: tuple[int, ...]
    prompt_vector: np.ndarray | None  # [D] float32
    answer: Choice


@dataclass(frozen=True, slots=True)
class FeedbackOutcome:
    """What a submission led to. A duplicate carries the state of the first submission."""

    record: FeedbackRecord
    is_duplicate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChange:
    """A new state for feedback. None leaves a field as it is."""

    state: FeedbackState
    adapter: str | None = None
    version: int | None = None
    reason: str | None = None
    conflicts_with: tuple[str, ...] | None = None
    pattern_id: int | None = None
    is_learnable: bool | None = None  # False takes it out of `pending`


class PositionKind(enum.StrEnum):
    """What a captured position asks of the solver."""

    EDIT = "edit"  # the base was wrong here
    CONSTRAINT = "constraint"  # it was right and must stay so


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """T answer positions of one feedback with the states captured there, row by row."""

    indices: tuple[int, ...]  # in the answer, distinct
    target_ids: tuple[int, ...]  # the token that should come at each
    kinds: tuple[PositionKind, ...]
    capture: Capture  # T rows

    def __post_init__(self) -> None:
        num = len(self.indices)
        capture = self.capture
        arrays = (capture.hidden, capture.top_ids, capture.top_logprobs, capture.rest_logprob)
        lengths = {num, len(self.target_ids), len(self.kinds), *(len(a) for a in arrays)}
        if len(lengths) > 1 or capture.top_ids.shape != capture.top_logprobs.shape:
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise ShapeError(
                f"{num} positions, {len(self.target_ids)} targets, {len(self.kinds)} kinds and "
                f"capture arrays of shapes {shapes}; every one needs {num} rows"
            )
        if len(set(self.indices)) < num:
            raise ShapeError(f"position indices {self.indices} repeat; give each position once")

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class PatternFeedback:
    """A feedback of a pattern with its positions, by rising index; None when it has none."""

    record: FeedbackRecord
    positions: Positions | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalCounts:
    """The journal at one moment; counters since it was opened."""

    num_requests: int
    num_feedback: Mapping[FeedbackState, int]
    num_pending: int  # learnable and not yet learned
    num_queued: int  # calls waiting for their commit
    num_commits: int
    num_failed_commits: int
    num_committed_calls: int
    num_refused_calls: int  # the queue was full
    commit_s: float  # spent in commits, writing included
    file_bytes: int  # journal.db and its write-ahead log
