"""From the wire to calls: parse, refuse what is not built by name, check."""

import json
from collections.abc import Iterable
from typing import Protocol, cast

from google.protobuf.message import Message

from engine.api import Constraint, SamplingParams
from sona import checks
from sona.checks import Limits
from sona.errors import InvalidField, NotBuilt
from sona.journal.records import Correction, Preference, Signal, Verdict
from sona.requests import (
    ChatMessage,
    ChatPrompt,
    EmbedCall,
    FeedbackCall,
    GenerateCall,
    Prompt,
    ScoreCall,
    TextPrompt,
    TokenPrompt,
    new_id,
)
from sona.v1 import feedback_pb2, inference_pb2

# Set to anything, they ask for what this version does not do.
_UNBUILT_REQUEST = ("metadata",)
# Fields of SamplingParams that mean the same here and in the engine.
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "n", "min_tokens", "max_tokens", "ignore_eos", "logprobs",
    "prompt_logprobs",
)  # fmt: skip


class _Input(Protocol):
    """The part of a message that carries a prompt."""

    text: str

    @property
    def messages(self) -> inference_pb2.Messages: ...
    @property
    def token_ids(self) -> inference_pb2.TokenIds: ...


def generate_call(
    request: inference_pb2.GenerateRequest, limits: Limits, deadline_s: float | None
) -> GenerateCall:
    """Raises InvalidField, ModelNotFound, NotBuilt."""
    set_fields = _set_fields(request)
    for name in _UNBUILT_REQUEST:
        if name in set_fields:
            raise NotBuilt(f"{name} is not built yet in this version; leave it out")
    if request.use_patterns:
        raise NotBuilt("use_patterns is not built yet in this version; leave it out or false")
    for name in ("request_id", "session_id", "cache_salt"):
        if getattr(request, name):
            checks.check_id(name, getattr(request, name))
    call = GenerateCall(
        prompt=prompt(request),
        model=request.model,
        sampling=sampling(request.sampling),
        adapter=checks.parse_adapter(request.adapter),
        learn=request.learn if request.HasField("learn") else True,
        request_id=request.request_id or new_id(),
        constraint=_constraint(request) if "constraint" in set_fields else None,
        priority=request.priority,
        session_id=request.session_id,
        cache_salt=request.cache_salt,
        deadline_s=deadline_s,
    )
    checks.check_model(call.model, limits)
    checks.check_prompt(call.prompt, limits)
    checks.check_sampling(call.sampling, limits)
    return call


def sampling(params: inference_pb2.SamplingParams) -> SamplingParams:
    """What is not set keeps the engine's default."""
    set_fields = _set_fields(params)
    chosen = {name: getattr(params, name) for name in _SAMPLING if name in set_fields}
    return SamplingParams(
        **chosen,
        logit_bias=dict(params.logit_bias),
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
    )


def embed_call(
    request: inference_pb2.EmbedRequest, limits: Limits, deadline_s: float | None
) -> EmbedCall:
    """Raises InvalidField, ModelNotFound."""
    call = EmbedCall(prompt=prompt(request), model=request.model, deadline_s=deadline_s)
    checks.check_model(call.model, limits)
    checks.check_prompt(call.prompt, limits)
    return call


def score_call(
    request: inference_pb2.ScoreRequest, limits: Limits, deadline_s: float | None
) -> ScoreCall:
    """Raises InvalidField, ModelNotFound."""
    call = ScoreCall(
        prompt=prompt(request),
        continuation=request.continuation,
        model=request.model,
        adapter=checks.parse_adapter(request.adapter),
        deadline_s=deadline_s,
    )
    checks.check_model(call.model, limits)
    checks.check_prompt(call.prompt, limits)
    if not call.continuation:
        raise InvalidField("continuation", "there is nothing to score; send some text")
    checks.check_text("continuation", call.continuation, limits)
    return call


def _constraint(request: inference_pb2.GenerateRequest) -> Constraint:
    asked = request.constraint
    kind = asked.WhichOneof("kind")
    if kind is None:
        raise InvalidField("constraint", "no form is set; use json_schema, regex, grammar, choice")
    if kind != "choice":
        constraint = Constraint(kind, getattr(asked, kind))
    else:
        choices = list(asked.choice.choices)
        if not choices or not all(choices):
            what = "an empty text" if choices else "0 texts"
            raise InvalidField(
                "constraint.choice",
                f"constraint.choice has {what}; send one text or more, none of them empty",
            )
        constraint = Constraint("choice", json.dumps(choices, ensure_ascii=False))
    checks.check_constraint(constraint)
    return constraint


def prompt(request: Message) -> Prompt:
    """The prompt of a message with a oneof `input`. Raises InvalidField when none is set."""
    fields = cast(_Input, request)
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(fields.text)
        case "messages":
            turns = fields.messages.messages
            return ChatPrompt(tuple(ChatMessage(turn.role, turn.content) for turn in turns))
        case "token_ids":
            return TokenPrompt(tuple(fields.token_ids.ids))
        case _:
            raise InvalidField("input", "there is no prompt; set text, messages or token_ids")


def feedback_call(request: feedback_pb2.SubmitFeedbackRequest, limits: Limits) -> FeedbackCall:
    """Raises InvalidField."""
    checks.check_id("feedback_id", request.feedback_id)
    return _checked(
        FeedbackCall(
            feedback_id=request.feedback_id,
            request_id=request.request_id,
            choice_index=request.choice_index,
            signal=_signal(request),
            comment=request.comment,
            metadata=dict(request.metadata),
        ),
        limits,
    )


def preview_call(request: feedback_pb2.PreviewFeedbackRequest, limits: Limits) -> FeedbackCall:
    """Raises InvalidField."""
    return _checked(
        FeedbackCall(
            feedback_id="",
            request_id=request.request_id,
            choice_index=request.choice_index,
            signal=_signal(request),
        ),
        limits,
    )


def _checked(call: FeedbackCall, limits: Limits) -> FeedbackCall:
    checks.check_id("request_id", call.request_id)
    checks.check_feedback(call, limits)
    return call


def _signal(
    request: feedback_pb2.SubmitFeedbackRequest | feedback_pb2.PreviewFeedbackRequest,
) -> Signal:
    match request.WhichOneof("signal"):
        case "score":
            return checks.parse_score(request.score)
        case "correction":
            return Correction(request.correction)
        case "preference":
            return Preference(request.preference.chosen, request.preference.rejected)
        case "verdict":
            if request.verdict == feedback_pb2.VERDICT_UNSPECIFIED:
                raise InvalidField("verdict", "verdict is not said; use VERDICT_PASS or _FAIL")
            if request.verdict not in (feedback_pb2.VERDICT_PASS, feedback_pb2.VERDICT_FAIL):
                raise InvalidField(
                    "verdict", f"verdict is {request.verdict}; use VERDICT_PASS or VERDICT_FAIL"
                )
            return Verdict(request.verdict == feedback_pb2.VERDICT_PASS)
        case _:
            raise InvalidField(
                "signal", "nothing is said; set score, correction, preference or verdict"
            )


def _set_fields(message: Message) -> frozenset[str]:
    fields: Iterable[str] = (descriptor.name for descriptor, _ in message.ListFields())
    return frozenset(fields)
