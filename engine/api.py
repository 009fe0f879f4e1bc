"""What the engine takes and what it gives back. Frozen data and one protocol.

A caller builds a `Job`, iterates the `Update`s of `Generator.generate`, and may close the
iterator at any time: the job ends and its pages return. Nothing here knows a wire format.
"""

import enum
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

NUM_CAPTURED_LOGITS = 64  # base logits kept per captured position
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
_MAX_TOP_K = 2**31 - 1


class FinishReason(enum.Enum):
    """Why a job ended. ERROR travels as an exception as well."""

    STOP = "stop"  # end-of-sequence token, stop id or stop string
    LENGTH = "length"  # max_tokens or the context is used up
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How logits become a token."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0  # in (0, 1]
    seed: int | None = None  # None draws one per job
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n best, n <= 20

    def fault(self) -> tuple[str, object, str] | None:
        """The first setting that no draw could follow: its name, its value, what is allowed."""
        is_warmth = math.isfinite(self.temperature) and self.temperature >= 0
        for name, is_allowed, allowed in (
            ("temperature", is_warmth, "a finite number from 0 (greedy) up"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1 (all)"),
            ("top_k", 0 <= self.top_k <= _MAX_TOP_K, f"0 (all) to {_MAX_TOP_K}"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("seed", 0 <= (self.seed or 0) <= MAX_SEED, f"0 to {MAX_SEED}"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            ("stop", all(self.stop), "texts of one character or more"),
        ):
            if not is_allowed:
                return name, getattr(self, name), allowed
        return None


@dataclass(frozen=True, slots=True, eq=False)
class HeadTable:
    """One version of a pattern's head edits, in the factored form that a head slot holds.

    With h the final hidden state and c the base argmax token at a position, row v = row_ids[j]
    of the base logits is shifted by sum_r values[r, j] * u[r], where
    u[r] = keys[r] . h + sum_t token_keys[r, t] * [c == token_ids[t]] + const_keys[r].
    All float32. Unpadded: R, Rows and Kt are what the edits need.
    """

    keys: np.ndarray  # [R, D]
    token_ids: np.ndarray  # [Kt] int32, distinct
    token_keys: np.ndarray  # [R, Kt]
    const_keys: np.ndarray  # [R]
    row_ids: np.ndarray  # [Rows] int32, distinct
    values: np.ndarray  # [R, Rows]

    @property
    def num_bytes(self) -> int:
        """Host bytes of all six arrays."""
        arrays = (self.keys, self.token_ids, self.token_keys, self.const_keys, self.row_ids)
        return sum(a.nbytes for a in arrays) + self.values.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class HeadRef:
    """A head version chosen for a job: identity for residency and reports, table for upload."""

    name: str  # adapter name as reported to the client
    version: int
    slot_key: tuple[str, ...]  # identity across tenants and scopes
    table: HeadTable


HeadChoice = Callable[[np.ndarray], HeadRef | None]
"""Called once on the engine thread with the prompt's mean final hidden state [D] float32, after
prefill and before the first token. Must return within microseconds and must not raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A validated request for tokens."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choose_head: HeadChoice | None = None  # None: the base model
    capture: bool = False  # keep learning states of every generated position
    priority: int = 0  # lower first


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """States of T answer positions, taken from the base head before any delta or temperature."""

    hidden: np.ndarray  # [T, D] bfloat16, input of the head that predicts the position's token
    top_ids: np.ndarray  # [T, 64] int32, by falling base logit; column 0 is the base argmax
    top_logprobs: np.ndarray  # [T, 64] float32, base logit minus base log-sum-exp
    rest_logprob: np.ndarray  # [T] float32, log of the base mass outside the 64

    @property
    def num_bytes(self) -> int:
        """Host bytes of the four arrays."""
        return (
            self.hidden.nbytes
            + self.top_ids.nbytes
            + self.top_logprobs.nbytes
            + self.rest_logprob.nbytes
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability under the adapted distribution at temperature 1."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token."""

    token_id: int
    logprob: float | None  # None when not asked for
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds spent by one job, by phase."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """How a job ended and what it leaves behind."""

    finish_reason: FinishReason
    stop_match: str | int | None  # the stop string or id that ended it
    num_prompt_tokens: int
    num_completion_tokens: int
    token_ids: tuple[int, ...]  # all generated ids, the end-of-sequence id included
    text: str  # the whole visible text
    head: HeadRef | None
    prompt_vector: np.ndarray  # [D] float32, mean final hidden state of the prompt
    capture: Capture | None  # one row per generated token
    timing: Timing


@dataclass(frozen=True, slots=True)
class Update:
    """News of a job since the last one: new tokens, newly visible text, and at last the end."""

    tokens: tuple[Token, ...]
    text: str
    final: Final | None


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    """A teacher-forced pass: states at the positions that predict the continuation."""

    capture: Capture  # T = length of the continuation
    prompt_vector: np.ndarray  # [D] float32, mean over the prompt alone


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of counters and gauges."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_preemptions: int
    num_recompiles: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_steps: int
    num_resident_heads: int
    busy_s: float  # engine thread time in steps
    learning_s: float  # of which teacher-forced passes


class Generator(Protocol):
    """The engine as the service sees it. All methods are called on one event loop."""

    def generate(self, job: Job) -> AsyncGenerator[Update, None]:
        """Run a job. Close the generator to cancel it. Raises EngineError."""
        ...

    async def embed(self, request_id: str, prompt_ids: tuple[int, ...]) -> np.ndarray:
        """Mean final hidden state [D] float32 of the prompt."""
        ...

    async def score(
        self, request_id: str, prompt_ids: tuple[int, ...], continuation_ids: tuple[int, ...]
    ) -> ScoreResult:
        """Teacher-force the continuation, below every user's token in priority."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a running or waiting job as CANCELLED. False when there is none."""
        ...

    def stats(self) -> EngineStats:
        """Counters now."""
        ...
