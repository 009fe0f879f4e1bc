"""What the borders (gRPC now, HTTP and MQTT later) need of the domain: four small protocols.

Every method may raise the errors that `sona.rpc.status` lists. Callers are identified before a
port is called; what depends on who owns a request, a feedback or an adapter is decided behind it.
"""

import enum
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from adapters.loras import LoraInfo
from adapters.store.records import Scope, SlotKey, VersionInfo
from engine.config import EnginePlan
from sona.auth import Principal
from sona.journal.records import FeedbackOutcome, FeedbackRecord, FeedbackState
from sona.requests import (
    Delta,
    EmbedCall,
    EmbedReply,
    FeedbackCall,
    GenerateCall,
    GenerateReply,
    Preview,
    Prompt,
    ScoreCall,
    ScoreReply,
    Started,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A served model."""

    name: str
    architecture: str
    max_model_len: int  # tokens of prompt plus answer
    vocab_size: int
    num_parameters: int
    dtype: str
    base_hash: str


class Inference(Protocol):
    """Tokens out of the served model."""

    def generate(
        self, call: GenerateCall, principal: Principal
    ) -> AsyncGenerator[Started | Delta | GenerateReply, None]:
        """One Started, Deltas, and at last one GenerateReply. Closing the generator aborts.

        Raises RequestExists, AdapterNotFound, InvalidField (prompt too long), QueueFull, ….
        """
        ...

    async def embed(self, call: EmbedCall, principal: Principal) -> EmbedReply:
        """The prompt's vector under the base model."""
        ...

    async def score(self, call: ScoreCall, principal: Principal) -> ScoreReply:
        """How likely the continuation is."""
        ...

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids the model would see."""
        ...

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Their text."""
        ...

    def models(self) -> tuple[ModelInfo, ...]:
        """What is served."""
        ...


class Feedback(Protocol):
    """What was said about answers."""

    async def submit(self, call: FeedbackCall, principal: Principal) -> FeedbackOutcome:
        """Store a feedback; returns after its commit.

        Raises RequestNotFound, ForeignRequest, FeedbackConflict, InvalidRequest, DiskFull, ….
        """
        ...

    async def get(self, feedback_id: str, principal: Principal) -> FeedbackRecord:
        """A feedback the caller may see. Raises FeedbackNotFound."""
        ...

    async def preview(self, call: FeedbackCall, principal: Principal) -> Preview:
        """What the feedback would change. Stores nothing; `feedback_id` is empty."""
        ...


class LearningState(enum.StrEnum):
    """Whether the server learns."""

    RUNNING = "running"
    PAUSED = "paused"
    DISABLED = "disabled"  # --no-learn


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningStatus:
    """What learning does and what waits: the whole server's, but for `num_adapters`."""

    state: LearningState
    reason: str = ""  # of a pause
    num_pending: int  # stored, learnable, not learned
    num_feedback: Mapping[FeedbackState, int] = field(default_factory=dict[FeedbackState, int])
    num_adapters: int  # that the caller may see
    num_failed_steps: int  # since start-up, whole server
    last_publish: float | None  # unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter with its live version."""

    slot: SlotKey
    version: int
    num_edits: int
    num_constraints: int
    num_bytes: int
    created: float  # unix seconds, first version
    updated: float  # live version

    @property
    def name(self) -> str:
        """As on the wire."""
        return self.slot.adapter_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One version of an adapter, with the ids of the feedback in force in it."""

    info: VersionInfo
    feedback_ids: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHistory:
    """An adapter and its versions, newest first."""

    adapter: AdapterInfo
    revisions: tuple[Revision, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """What a rollback left live, and the feedback that is no longer in force."""

    adapter: AdapterInfo
    feedback_ids: tuple[str, ...]


class EventKind(enum.StrEnum):
    """Kinds of events."""

    FEEDBACK_ACCEPTED = "feedback_accepted"
    FEEDBACK_LEARNED = "feedback_learned"
    FEEDBACK_REJECTED = "feedback_rejected"
    ADAPTER_PUBLISHED = "adapter_published"
    ADAPTER_ROLLED_BACK = "adapter_rolled_back"
    ADAPTER_UNLOADED = "adapter_unloaded"
    LEARNING_PAUSED = "learning_paused"
    LEARNING_RESUMED = "learning_resumed"
    LEARNING_FAILED = "learning_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened in learning."""

    time: float  # unix seconds
    kind: EventKind
    principal: str = ""  # whom it concerns; empty: everybody
    feedback_id: str = ""
    adapter: str = ""
    version: int = 0
    scope: Scope | None = None
    reason: str = ""


class Learning(Protocol):
    """What was learned, and when learning runs."""

    async def status(self, principal: Principal) -> LearningStatus:
        """Whether the server learns, and what waits."""
        ...

    async def list_adapters(self, principal: Principal) -> tuple[AdapterInfo, ...]:
        """Own and tenant scope; for an operator every principal's of the tenant."""
        ...

    async def list_loras(self, principal: Principal) -> tuple[LoraInfo, ...]:
        """What the caller's tenant has loaded."""
        ...

    async def get_lora(self, name: str, principal: Principal) -> LoraInfo:
        """The one of that name. Raises AdapterNotFound."""
        ...

    async def load_lora(
        self, name: str, path: str, principal: Principal, *, any_base: bool
    ) -> LoraInfo:
        """Read a LoRA from a directory of the server and serve it; replaces one of that name.

        One that names another base model than the served one is refused unless `any_base`.
        Raises InvalidAdapter, IncompatibleAdapter, StoreUnwritable. Allowed already.
        """
        ...

    async def unload_lora(self, name: str, principal: Principal) -> LoraInfo:
        """Forget a LoRA. Raises AdapterNotFound. Allowed already."""
        ...

    async def get_adapter(
        self, name: str, scope: Scope | None, owner: str, principal: Principal
    ) -> AdapterHistory:
        """Scope None: the owner's own if it exists, else the tenant's. Raises AdapterNotFound.

        `owner` is never empty; another's than the caller's has been allowed already.
        """
        ...

    async def rollback(
        self, slot: SlotKey, to_version: int | None, reason: str, principal: Principal
    ) -> Rollback:
        """Write a version that equals `to_version`; None: less the last feedback. Allowed already.

        Raises AdapterNotFound, CandidateRejected (it is live already).
        """
        ...

    async def pause(self, reason: str, principal: Principal) -> LearningState:
        """Stop learning on the whole server. Idempotent."""
        ...

    async def resume(self, principal: Principal) -> LearningState:
        """Learn what waits, and go on. Idempotent."""
        ...

    def events(
        self, kinds: frozenset[EventKind], principal: Principal
    ) -> AsyncGenerator[Event, None]:
        """Events from now on that the caller may see; empty `kinds` means all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What this server is."""

    version: str
    model: ModelInfo
    plan: EnginePlan
    platform: str  # "cpu", "gpu" or "tpu"
    devices: tuple[str, ...]
    num_cpus: int
    memory_bytes: int
    started: float  # unix seconds
    is_learning_enabled: bool


class Control(Protocol):
    """The server itself."""

    def server_info(self) -> ServerInfo:
        """Constant after start-up."""
        ...

    async def abort(self, request_id: str, principal: Principal) -> bool:
        """End a running or waiting request of the caller, or of its tenant for an operator.

        False: nothing of that name runs or waits where the caller may act.
        """
        ...
