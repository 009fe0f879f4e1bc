"""What the engine takes and what it gives back. Frozen data and one protocol.

A caller builds a `Job`, iterates the `Update`s of `Generator.generate`, and may close the
iterator at any time: the job ends and its pages return. Nothing here knows a wire format.
"""

import enum
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.params import MAX_LOGPROBS, MAX_SEED, Constraint, SamplingParams

__all__ = ["MAX_LOGPROBS", "MAX_SEED", "Constraint", "SamplingParams"]  # and everything below

NUM_CAPTURED_LOGITS = 64  # base logits kept per captured position


class FinishReason(enum.Enum):
    """Why a job ended. ERROR travels as an exception as well."""

    STOP = "stop"  # end-of-sequence token, stop id or stop string
    LENGTH = "length"  # max_tokens or the context is used up
    CANCELLED = "cancelled"
    ERROR = "error"


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


@dataclass(frozen=True, slots=True, eq=False)
class LoraTable:
    """Low-rank adapters of linear layers (Hu 2021, arXiv:2106.09685, section 4.1), ready to apply.

    Module m of layer l maps x to y + (x @ a[m][l].T) @ b[m][l]; every scale is in b. All float32.
    Layers without an adapter hold zeros; modules without one are absent.
    """

    a: Mapping[str, np.ndarray]  # module name -> [L, R, in]; of the head: [1, R, D]
    b: Mapping[str, np.ndarray]  # module name -> [L, R, out]

    @property
    def rank(self) -> int:
        """R, the same for every module."""
        return max(array.shape[1] for array in self.a.values())

    @property
    def num_bytes(self) -> int:
        """Host bytes of all arrays."""
        return sum(array.nbytes for array in (*self.a.values(), *self.b.values()))


@dataclass(frozen=True, slots=True, eq=False)
class LoraRef:
    """A LoRA version chosen for a job, or several merged."""

    name: str  # adapter name as reported to the client
    version: int
    slot_key: tuple[str, ...]  # identity across tenants
    table: LoraTable

    @property
    def identity(self) -> tuple[str, ...]:
        """What cached keys and values below the head depend on."""
        return (*self.slot_key, str(self.version))


HeadChoice = Callable[[np.ndarray], HeadRef | None]
"""Called once on the engine thread with the prompt's mean final hidden state [D] float32, after
prefill and before the first token. Must return within microseconds and must not raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A validated request for tokens."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choose_head: HeadChoice | None = None  # None: the base model's head
    lora: LoraRef | None = None  # None: the base model below the head
    constraint: Constraint | None = None  # form of the answer
    capture: bool = False  # keep learning states of every generated position
    tenant: str = ""  # whom the engine's time is shared between
    priority: int = 0  # lower first, within the tenant
    salt: Hashable = ""  # cached prefixes are shared between equal salts alone
    session: Hashable = None  # whose prefix stays warm for the next turn; None: nobody's
    deadline_s: float | None = None  # on the clock of `time.monotonic`


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
    """Log-probability under the adapted distribution at temperature 1, before any setting."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token, sampled or given."""

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
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    num_completion_tokens: int
    token_ids: tuple[int, ...]  # all generated ids, the end-of-sequence id included
    text: str  # the whole visible text
    head: HeadRef | None
    prompt_vector: np.ndarray  # [D] float32, mean final hidden state of the prompt
    prompt_tokens: tuple[Token, ...]  # the prompt's but the first, when prompt_logprobs was asked
    capture: Capture | None  # one row per generated token
    timing: Timing


@dataclass(frozen=True, slots=True)
class Update:
    """News of one answer: new tokens, newly visible text, and at last the end."""

    tokens: tuple[Token, ...]
    text: str
    final: Final | None
    index: int = 0  # of the answer, from 0 to n - 1


@dataclass(frozen=True, slots=True, eq=False)
class CaptureResult:
    """A teacher-forced pass: base states at the positions that predict the continuation."""

    capture: Capture  # T = length of the continuation
    prompt_vector: np.ndarray  # [D] float32, mean over the prompt alone


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    """How likely a given continuation is."""

    tokens: tuple[Token, ...]  # the continuation's, with log-probabilities
    head: HeadRef | None
    num_cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """A prompt's vector."""

    vector: np.ndarray  # [D] float32, mean final hidden state of the prompt
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of counters and gauges."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int  # to be computed for those that wait
    num_pages: int
    num_free_pages: int  # nobody holds them
    num_idle_pages: int  # held by the prefix cache alone, given up on demand
    num_session_pages: int  # that sessions keep warm, a shared one counted for each
    num_preemptions: int
    num_recompiles: int
    num_prompt_tokens: int  # computed
    num_cached_tokens: int  # of prompts, found in the prefix cache instead
    num_generated_tokens: int
    num_steps: int
    num_resident_heads: int
    num_resident_loras: int
    busy_s: float  # engine thread time in steps
    learning_s: float  # of which teacher-forced passes


class Generator(Protocol):
    """The engine as the service sees it. All methods are called on one event loop."""

    def generate(self, job: Job) -> AsyncGenerator[Update, None]:
        """Run a job. Close the generator to cancel it. Raises EngineError."""
        ...

    async def embed(self, job: Job) -> EmbedResult:
        """The prompt's vector, below the head; the job's LoRA applies, its sampling does not."""
        ...

    async def score(self, job: Job, continuation_ids: tuple[int, ...]) -> ScoreResult:
        """Log-probabilities of a continuation under the adapted model; nothing is sampled."""
        ...

    async def capture(self, job: Job, continuation_ids: tuple[int, ...]) -> CaptureResult:
        """Teacher-force the continuation on the base model, below every user's token."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a running or waiting job as CANCELLED. False when there is none."""
        ...

    def stats(self) -> EngineStats:
        """Counters now."""
        ...
