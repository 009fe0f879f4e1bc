"""One job inside the engine: its tokens, its pages, and how far it has come. Engine thread only.

    tokens        p0 p1 … p(n-1) | g0 g1 … g(m-1)        prompt, then what was generated
    num_computed  how many of them have keys and values in `pages`

While decoding, the last token is not computed yet: it is the next step's input.
"""

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.api import (
    Capture,
    Final,
    FinishReason,
    HeadRef,
    Job,
    Timing,
    Token,
    TokenLogprob,
    Update,
)
from engine.text import TextStream, Tokenizer

if TYPE_CHECKING:  # the scheduler handles sequences and must not load jax
    from engine.step import Captured, Sampled


class Kind(enum.Enum):
    """What a sequence is for."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"  # a teacher-forced pass; below every user's token


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one job. `Scheduler` owns pages and progress, `Answer` owns the text."""

    kind: Kind
    job: Job
    tokens: list[int]
    num_prompt: int
    replays_by_decode: bool = False  # after a preemption: generated tokens as single steps
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    row: int = -1  # of the decode page table while running
    slot: int = 0  # head slot, 0 for none
    head: HeadRef | None = None
    parked_hidden: np.ndarray | None = None  # [D], waits for a free head slot to be sampled
    vector_sum: np.ndarray | None = None  # [D] float64, over the prompt computed so far
    prompt_vector: np.ndarray | None = None
    # Steps and rows of them; a step's other rows live as long, at most a context of each sequence.
    captured: "list[tuple[Captured, int]]" = field(default_factory=list)
    created_s: float = field(default_factory=time.monotonic)
    admitted_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def request_id(self) -> str:
        """The job's id."""
        return self.job.request_id

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt

    @property
    def prefill_target(self) -> int:
        """Tokens to compute before single steps take over."""
        if self.kind is Kind.SCORE:
            return len(self.tokens) - 1  # nothing is asked of the last one
        if not self.num_generated or self.replays_by_decode:
            return self.num_prompt
        return len(self.tokens) - 1

    @property
    def is_prefilled(self) -> bool:
        """Whether the next work is a single step."""
        return self.num_computed >= self.prefill_target

    @property
    def is_decoding(self) -> bool:
        """Whether it belongs in the next decode step."""
        is_generating = self.kind is Kind.GENERATE and self.num_generated > 0
        return is_generating and self.is_prefilled and not self.lacks_slot

    @property
    def lacks_slot(self) -> bool:
        """Whether its head edits wait for a slot on the device."""
        return self.head is not None and not self.slot

    @property
    def is_replaying(self) -> bool:
        """Whether the next decode step repeats a token that is already known."""
        return self.num_computed < len(self.tokens) - 1

    def add_vector(self, total: np.ndarray) -> None:
        """Sum of final hidden states over a prompt chunk."""
        self.vector_sum = total if self.vector_sum is None else self.vector_sum + total

    def stacked_capture(self) -> Capture | None:
        """All captured positions in order, or None when nothing was captured."""
        if not self.captured:
            return None
        return Capture(
            hidden=np.array([step.hidden[row] for step, row in self.captured]),
            top_ids=np.array([step.top_ids[row] for step, row in self.captured]),
            top_logprobs=np.array([step.top_logprobs[row] for step, row in self.captured]),
            rest_logprob=np.array([step.rest_logprob[row] for step, row in self.captured]),
        )


class Answer:
    """The growing answer of a generating sequence: stops, visible text, news for the caller."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, *, max_len: int) -> None:
        sampling = sequence.job.sampling
        self._sequence = sequence
        self._stream = TextStream(tokenizer, sampling.stop)
        self._stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else tokenizer.eos_ids
        )
        self._max_tokens = min(sampling.max_tokens, max_len - sequence.num_prompt)
        self._news: list[Token] = []
        self._text = ""

    def accept(self, sampled: "Sampled", row: int) -> FinishReason | None:
        """Take row `row` of a step's result. Returns the reason when the answer ends here."""
        sequence, job = self._sequence, self._sequence.job
        token_id = int(sampled.token[row])
        if not sequence.num_generated:
            sequence.first_token_s = time.monotonic()
        sequence.tokens.append(token_id)
        if job.capture:
            sequence.captured.append((sampled.captured, row))
        self._news.append(_token(sampled, row, job.sampling.logprobs))
        if token_id in self._stop_ids:
            self._stop_match = token_id
            return FinishReason.STOP
        self._text += self._stream.push(token_id)
        if self._stream.stop_match is not None:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.num_generated >= self._max_tokens else None

    _stop_match: int | None = None

    def news(self) -> Update | None:
        """What is new since the last call; None when nothing is."""
        if not self._news:
            return None
        update = Update(tuple(self._news), self._text, None)
        self._news, self._text = [], ""
        return update

    def finish(self, reason: FinishReason) -> Update:
        """The last update, with everything the caller needs to account and to learn."""
        sequence = self._sequence
        self._text += self._stream.flush()
        final = Final(
            finish_reason=reason,
            stop_match=self._stream.stop_match or self._stop_match,
            num_prompt_tokens=sequence.num_prompt,
            num_completion_tokens=sequence.num_generated,
            token_ids=tuple(sequence.tokens[sequence.num_prompt :]),
            text=self._stream.text,
            head=sequence.head,
            prompt_vector=_vector(sequence),
            capture=sequence.stacked_capture(),
            timing=_timing(sequence),
        )
        update = Update(tuple(self._news), self._text, final)
        self._news, self._text = [], ""
        return update


def _token(sampled: "Sampled", row: int, num_logprobs: int | None) -> Token:
    token_id = int(sampled.token[row])
    if num_logprobs is None:
        return Token(token_id, None, ())
    best = zip(sampled.best_ids[row], sampled.best_logprobs[row], strict=True)
    top = tuple(TokenLogprob(int(i), float(p)) for i, p in list(best)[:num_logprobs])
    return Token(token_id, float(sampled.logprob[row]), top)


def _vector(sequence: Sequence) -> np.ndarray:
    if sequence.prompt_vector is not None:
        return sequence.prompt_vector
    return np.zeros(0, np.float32)  # ended before its prompt was computed


def _timing(sequence: Sequence) -> Timing:
    now = time.monotonic()
    admitted = sequence.admitted_s or now
    first = sequence.first_token_s or now
    return Timing(
        queue_s=admitted - sequence.created_s, prefill_s=first - admitted, decode_s=now - first
    )
