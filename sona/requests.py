"""Calls and replies as the service means them, whatever carried them: gRPC, HTTP or MQTT.

A border (`sona.rpc`, later HTTP and MQTT) parses its wire format into a call and checks it with
`sona.checks`; the domain behind `sona.ports` gets calls that can be trusted and gives these
replies back. Records of stored feedback are the journal's own (`sona.journal`).
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from engine.api import Constraint, FinishReason, SamplingParams, Token
from sona.journal.records import AdapterSpan, Signal


def new_id() -> str:
    """A request_id for a client that chose none."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to be continued."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's chat template."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Tokens as they are."""

    ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class AdapterPin:
    """An adapter asked for by name. Version None is the live one; 0 is before learning."""

    name: str
    version: int | None = None


@dataclass(frozen=True, slots=True)
class LoraPin:
    """A LoRA asked for by name. Version None is the live one."""

    name: str
    version: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """LoRAs, merged by weight, and what answers above them."""

    loras: tuple[LoraPin, ...]
    head: "AdapterPin | Literal['own', 'none']" = "none"


AdapterChoice = AdapterPin | AdapterMix | Literal["own", "none"]
"""What shapes an answer: a pinned version, LoRAs, the caller's own by pattern, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A prompt and how to answer it. `request_id` is never empty here."""

    prompt: Prompt
    model: str = ""  # empty: the served one
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterChoice = "own"
    learn: bool = True  # False: nothing of the request is kept
    request_id: str = field(default_factory=new_id)
    constraint: Constraint | None = None  # form of the answer
    priority: int = 0  # lower first, among the tenant's requests
    session_id: str = ""  # a conversation whose prefix stays warm
    cache_salt: str = ""  # cached prefixes are shared within the tenant, between equal salts
    deadline_s: float | None = None  # on the clock of `time.monotonic`


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A request was admitted."""

    request_id: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one answer: new tokens, and text that became certain."""

    choice_index: int = 0
    tokens: tuple[Token, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished answer."""

    index: int = 0
    text: str
    token_ids: tuple[int, ...]  # an end-of-sequence token included
    logprobs: tuple[Token, ...] = ()  # one per token, when asked for
    finish_reason: FinishReason
    stop_match: str | int | None = None  # stop string or stop id


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted."""

    num_prompt_tokens: int
    num_completion_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTiming:
    """Seconds by phase."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float  # arrival to end
    routing_s: float = 0.0  # a second prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReply:
    """The whole outcome of a GenerateCall; always the last item of its stream."""

    request_id: str
    answers: tuple[Answer, ...]
    usage: Usage
    timing: CallTiming
    prompt_logprobs: tuple[Token, ...] = ()  # of the prompt's tokens but the first, when asked for
    adapter_versions: tuple[AdapterSpan, ...] = ()  # every learned version that shaped a token
    pattern_ids: tuple[int, ...] = ()  # whose gate let the prompt in


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCall:
    """A prompt to embed."""

    prompt: Prompt
    model: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EmbedReply:
    """A prompt's vector."""

    vector: np.ndarray  # [D] float32, of length 1
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCall:
    """A prompt and a continuation to score."""

    prompt: Prompt
    continuation: str
    model: str = ""
    adapter: AdapterChoice = "own"
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReply:
    """How likely a continuation is."""

    logprobs: tuple[Token, ...]
    usage: Usage
    adapter_versions: tuple[AdapterSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackCall:
    """A feedback, checked as far as it can be without its request."""

    feedback_id: str  # empty in a preview
    request_id: str
    choice_index: int = 0
    signal: Signal
    comment: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewEdit:
    """A token that a correction would change."""

    position: int  # in the answer
    old_token_id: int | None  # None past the answer's end
    old_text: str
    new_token_id: int | None  # None: the answer should have ended here
    new_text: str
    base_probability: float | None  # of the new token; None where the states are gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a feedback would change."""

    would_learn: bool
    reason: str = ""
    pattern_id: int | None = None  # None: it would begin one
    edits: tuple[PreviewEdit, ...] = ()
    conflicts_with: tuple[str, ...] = ()
