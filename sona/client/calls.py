"""Requests made from plain Python values, and refusals read back. Shared by both clients."""

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sona.v1 import common_pb2, feedback_pb2, inference_pb2, learning_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"
PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or messages with `role` and `content`."""

OPTIONS = [
    ("grpc.keepalive_time_ms", 20_000),  # a dead server is noticed during a long answer
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 2**20),
]
_SCOPES = {
    "": common_pb2.SCOPE_UNSPECIFIED,
    "principal": common_pb2.SCOPE_PRINCIPAL,
    "tenant": common_pb2.SCOPE_TENANT,
}


def generate_request(
    prompt: PromptLike,
    *,
    adapter: str = "",
    learn: bool | None = None,
    request_id: str = "",
    model: str = "",
    priority: int | None = None,
    session_id: str = "",
    cache_salt: str = "",
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Sequence[str] | None = None,
    **sampling: Any,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest; `sampling` takes the fields of SamplingParams by name.

    At most one of `json_schema` (a text or a dict), `regex`, `grammar` (Lark) and `choice` (the
    allowed answers) sets the form of the answer. Raises ValueError for more.
    """
    return inference_pb2.GenerateRequest(
        model=model,
        sampling=inference_pb2.SamplingParams(**sampling),
        constraint=_constraint(json_schema, regex, grammar, choice),
        adapter=adapter,
        learn=learn,
        request_id=request_id,
        priority=priority,
        session_id=session_id,
        cache_salt=cache_salt,
        **prompt_fields(prompt),
    )


def _constraint(
    json_schema: str | Mapping[str, Any] | None,
    regex: str | None,
    grammar: str | None,
    choice: Sequence[str] | None,
) -> inference_pb2.Constraint | None:
    if isinstance(json_schema, Mapping):
        json_schema = json.dumps(json_schema)
    choices = None if choice is None else inference_pb2.ChoiceList(choices=choice)
    forms = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choice": choices}
    given = {name: form for name, form in forms.items() if form is not None}
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)} are given; an answer has one form")
    return inference_pb2.Constraint(**given) if given else None  # pyright: ignore


def feedback_request(
    request_id: str,
    *,
    correction: str | None = None,
    score: float | None = None,
    is_pass: bool | None = None,
    preference: tuple[str, str] | None = None,
    feedback_id: str = "",
    choice_index: int = 0,
    comment: str = "",
    metadata: Mapping[str, str] | None = None,
) -> feedback_pb2.SubmitFeedbackRequest:
    """A SubmitFeedbackRequest with one signal; `preference` is (chosen, rejected).

    Raises ValueError unless exactly one signal is given.
    """
    given = [each for each in (correction, score, is_pass, preference) if each is not None]
    if len(given) != 1:
        raise ValueError(
            f"{len(given)} signals are given; give one of correction, score, is_pass, preference"
        )
    request = feedback_pb2.SubmitFeedbackRequest(
        feedback_id=feedback_id or uuid.uuid4().hex,
        request_id=request_id,
        choice_index=choice_index,
        comment=comment,
        metadata=metadata,
    )
    if correction is not None:
        request.correction = correction
    if score is not None:
        request.score = score
    if is_pass is not None:
        request.verdict = feedback_pb2.VERDICT_PASS if is_pass else feedback_pb2.VERDICT_FAIL
    if preference is not None:
        request.preference.chosen, request.preference.rejected = preference
    return request


def preview_request(
    feedback: feedback_pb2.SubmitFeedbackRequest,
) -> feedback_pb2.PreviewFeedbackRequest:
    """The same feedback, to be looked at only."""
    request = feedback_pb2.PreviewFeedbackRequest(
        request_id=feedback.request_id, choice_index=feedback.choice_index
    )
    match feedback.WhichOneof("signal"):
        case "correction":
            request.correction = feedback.correction
        case "score":
            request.score = feedback.score
        case "verdict":
            request.verdict = feedback.verdict
        case _:
            request.preference.CopyFrom(feedback.preference)
    return request


def prompt_fields(prompt: PromptLike) -> dict[str, Any]:
    """The field of the oneof `input` that carries a prompt."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if any(isinstance(each, Mapping) for each in prompt):
        turns: list[Any] = list(prompt)
        messages = [inference_pb2.Message(**turn) for turn in turns]
        return {"messages": inference_pb2.Messages(messages=messages)}
    ids: list[Any] = list(prompt)
    return {"token_ids": inference_pb2.TokenIds(ids=ids)}


def adapter_fields(name: str, scope: str, owner: str) -> dict[str, Any]:
    """The fields that name an adapter. Raises ValueError for an unknown scope."""
    if scope not in _SCOPES:
        raise ValueError(f"scope is {scope!r}; use principal, tenant, or nothing")
    return {"name": name, "scope": _SCOPES[scope], "owner": owner}


def rollback_request(
    name: str, *, to_version: int | None, scope: str, owner: str, reason: str
) -> learning_pb2.RollbackAdapterRequest:
    """A RollbackAdapterRequest; to_version None takes back the last feedback."""
    request = learning_pb2.RollbackAdapterRequest(
        reason=reason, **adapter_fields(name, scope, owner)
    )
    if to_version is not None:
        request.to_version = to_version
    return request


def event_kinds(kinds: Sequence[str]) -> list["learning_pb2.EventKind.ValueType"]:
    """Kinds by name: "adapter_published". Raises ValueError for one that does not exist."""
    return [learning_pb2.EventKind.Value(f"EVENT_KIND_{kind.upper()}") for kind in kinds]


def credentials(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def explain(error: grpc.RpcError) -> str:
    """A refusal in one line: code, message, and the field it is about."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return str(error)
    code = error.code()
    text = f"{'UNKNOWN' if code is None else code.name}: {error.details()}"
    for detail in _details(error):
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            refused = error_details_pb2.BadRequest()
            detail.Unpack(refused)
            fields = ", ".join(each.field for each in refused.field_violations)
            return f"{text} (field {fields})"
    return text


def _details(error: grpc.Call | grpc.aio.AioRpcError) -> list[Any]:
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))  # both offer what it reads
    except ValueError:  # details that contradict the status: not from our server
        return []
    return [] if status is None else list(status.details)
