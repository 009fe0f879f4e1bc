"""One job inside the engine: its tokens, its pages, and how far it has come. Engine thread only.

    tokens        p0 p1 … p(n-1) | g0 g1 … g(m-1)        prompt, then what was generated
    num_computed  how many of them have keys and values in `pages`

While decoding, the last token is not computed yet: it is the next step's input.

    waiting ── a row and pages ──▶ lacks_lora      until its LoRA has a slot
       ▲                           ▼
       │                           not is_prefilled     chunks of the prompt
       │                           ▼                    the head is chosen (has_chosen)
       │                           lacks_slot      until its head has a slot
       │                           ▼
       │                           is_reading      given tokens are scored, a slice a turn
       │                           ▼
       │                           is_parked       its first token is sampled, the siblings' too
       │                           ▼
       └── lost its pages ───────  is_decoding     a token a turn; is_replaying: a known one
           (is_returning)
"""

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.api import Capture, HeadRef, Job, Token

if TYPE_CHECKING:  # the scheduler handles sequences and must not load jax
    from engine.constraints import Matcher
    from engine.kv.prefix import Node
    from engine.step import Captured

_CHUNK_FROM = 4  # known tokens of an answer; fewer are computed step by step, beside the others


class Kind(enum.Enum):
    """What a sequence is for."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"  # log-probabilities of a given continuation
    CAPTURE = "capture"  # a teacher-forced pass of learning; below every user's token


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one job. `Scheduler` owns pages and progress, `Answer` the text."""

    kind: Kind
    job: Job
    tokens: list[int]
    num_prompt: int
    index: int = 0  # of the answer, where a job has several
    siblings: "tuple[Sequence, ...]" = ()  # of the first answer: the others, begun after its prompt
    replays_by_decode: bool = False  # after a preemption: generated tokens as single steps
    matcher: "Matcher | None" = None  # of a constrained answer
    number: int = 0  # order of arrival
    is_returning: bool = False  # it lost its pages and waits again
    num_computed: int = 0
    num_cached: int = 0  # of the prompt, when it was first admitted
    pages: list[int] = field(default_factory=list)
    node: "Node | None" = None  # of the prefix cache, as far as it knows these tokens
    row: int = -1  # of the decode page table while running
    slot: int = 0  # head slot, 0 for none
    lora_slot: int = 0
    head: HeadRef | None = None
    has_chosen: bool = False  # the head, with or without one
    stop_ids: frozenset[int] = frozenset()
    parked_hidden: np.ndarray | None = None  # [D], waits for a free head slot to be sampled
    unread: list[np.ndarray] = field(default_factory=list)  # [t, D] each, to be scored
    read: list[Token] = field(default_factory=list)
    vector_sum: np.ndarray | None = None  # [D] float32, over the tokens computed so far
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
    def num_answers(self) -> int:
        """Decode rows that the job will take."""
        return 1 + len(self.siblings)

    @property
    def next_read(self) -> int | None:
        """First token whose log-probability is asked for and not known yet; None: no more."""
        if self.kind is Kind.SCORE:
            at, end = self.num_prompt + len(self.read), len(self.tokens)
        elif self.job.sampling.prompt_logprobs is None or self.index:
            return None
        else:
            at, end = 1 + len(self.read), self.num_prompt
        return at if at < end else None

    @property
    def match_limit(self) -> int:
        """Leading tokens whose states nobody asks for: a cached prefix may stand for them."""
        if self.next_read is not None:
            return self.next_read - 1
        if self.prompt_vector is not None:  # nothing of the prompt is asked any more
            return len(self.tokens) - 1
        return self.num_prompt - 1

    @property
    def prefill_target(self) -> int:
        """Tokens to compute in chunks before single steps take over."""
        if self.kind in (Kind.SCORE, Kind.CAPTURE):
            return len(self.tokens) - 1  # nothing is asked of the last one
        if not self.num_generated or self.replays_by_decode:
            return self.num_prompt
        return len(self.tokens) - 1

    @property
    def is_prefilled(self) -> bool:
        """Whether the next work is a single step."""
        missing = self.prefill_target - self.num_computed
        if self.num_computed < self.num_prompt or self.kind is not Kind.GENERATE:
            return missing <= 0
        return missing < _CHUNK_FROM

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
    def lacks_lora(self) -> bool:
        """Whether its LoRA waits for a slot on the device; nothing can be computed before."""
        return self.job.lora is not None and not self.lora_slot

    @property
    def is_parked(self) -> bool:
        """Whether its first token waits to be sampled."""
        return self.parked_hidden is not None

    @property
    def is_reading(self) -> bool:
        """Whether log-probabilities of given tokens are still to be computed."""
        return bool(self.unread) and self.is_prefilled and not self.lacks_slot

    @property
    def is_replaying(self) -> bool:
        """Whether the next decode step computes a token that is already known."""
        return self.num_computed < len(self.tokens) - 1

    def num_uncaptured(self, num_computed: int) -> int:
        """Known tokens of the answer whose states are computed and not kept, if they are to be."""
        if not self.job.capture:
            return 0
        num_known = min(num_computed - self.num_prompt + 1, self.num_generated)
        return max(0, num_known - len(self.captured))

    def add_states(self, hidden: np.ndarray) -> None:
        """Final hidden states [t, D] of the next tokens: into the running sum."""
        total = hidden.sum(axis=0, dtype=np.float32)
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
