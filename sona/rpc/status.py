"""Our exceptions as gRPC statuses: one table, and the wrappers that apply it.

The client's fault is told and not logged; pressure is told with a time to retry; what is ours is
logged once with its traceback and told as "internal error".
"""

import functools
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

import adapters.errors as adapter_errors
import engine.errors as engine_errors
import sona.errors as sona_errors

log = logging.getLogger("sona.rpc")

Context = grpc.aio.ServicerContext[Any, Any]
_Code = grpc.StatusCode

# Most specific first: the first class that matches wins.
STATUS: dict[type[Exception], grpc.StatusCode] = {
    # sona
    sona_errors.InvalidField: _Code.INVALID_ARGUMENT,
    sona_errors.InvalidRequest: _Code.INVALID_ARGUMENT,
    sona_errors.NotBuilt: _Code.UNIMPLEMENTED,
    sona_errors.ModelNotFound: _Code.NOT_FOUND,
    sona_errors.Unauthenticated: _Code.UNAUTHENTICATED,
    sona_errors.PermissionDenied: _Code.PERMISSION_DENIED,
    sona_errors.Overloaded: _Code.RESOURCE_EXHAUSTED,
    sona_errors.ShuttingDown: _Code.UNAVAILABLE,
    sona_errors.NotReady: _Code.UNAVAILABLE,
    sona_errors.PortInUse: _Code.FAILED_PRECONDITION,
    sona_errors.DataDirLocked: _Code.FAILED_PRECONDITION,
    sona_errors.DataDirUnwritable: _Code.FAILED_PRECONDITION,
    sona_errors.DataDirError: _Code.FAILED_PRECONDITION,
    sona_errors.RequestNotFound: _Code.NOT_FOUND,
    sona_errors.RequestExists: _Code.ALREADY_EXISTS,
    sona_errors.ForeignRequest: _Code.PERMISSION_DENIED,
    sona_errors.FeedbackNotFound: _Code.NOT_FOUND,
    sona_errors.FeedbackConflict: _Code.ALREADY_EXISTS,
    sona_errors.DiskFull: _Code.RESOURCE_EXHAUSTED,
    sona_errors.JournalCorrupt: _Code.DATA_LOSS,
    sona_errors.JournalError: _Code.INTERNAL,
    sona_errors.SonaError: _Code.INTERNAL,
    # adapters
    adapter_errors.AdapterNotFound: _Code.NOT_FOUND,
    adapter_errors.InvalidAdapter: _Code.INVALID_ARGUMENT,
    adapter_errors.IncompatibleAdapter: _Code.FAILED_PRECONDITION,
    adapter_errors.StaleCandidate: _Code.ABORTED,
    adapter_errors.CandidateRejected: _Code.FAILED_PRECONDITION,
    adapter_errors.SnapshotCorrupt: _Code.DATA_LOSS,
    adapter_errors.StoreUnwritable: _Code.RESOURCE_EXHAUSTED,
    adapter_errors.AdapterError: _Code.INTERNAL,
    # engine
    engine_errors.InvalidJob: _Code.INVALID_ARGUMENT,
    engine_errors.FormFailed: _Code.INVALID_ARGUMENT,
    engine_errors.DuplicateJob: _Code.ALREADY_EXISTS,
    engine_errors.QueueFull: _Code.RESOURCE_EXHAUSTED,
    engine_errors.DeadlinePassed: _Code.DEADLINE_EXCEEDED,
    engine_errors.EngineStopped: _Code.UNAVAILABLE,
    engine_errors.WeightsError: _Code.FAILED_PRECONDITION,
    engine_errors.TokenizerError: _Code.FAILED_PRECONDITION,
    engine_errors.ConfigError: _Code.FAILED_PRECONDITION,
    engine_errors.ShapeError: _Code.INTERNAL,
    engine_errors.EngineError: _Code.INTERNAL,
}

# Seconds after which trying again may help; a full queue knows better.
RETRY_S: dict[type[Exception], float] = {
    sona_errors.Overloaded: 1,
    sona_errors.ShuttingDown: 5,
    sona_errors.NotReady: 5,
    sona_errors.DiskFull: 30,
    adapter_errors.StoreUnwritable: 30,
}

# What was not found, for google.rpc.ResourceInfo.
_RESOURCE: dict[type[Exception], str] = {
    sona_errors.ModelNotFound: "model",
    sona_errors.RequestNotFound: "request",
    sona_errors.FeedbackNotFound: "feedback",
    adapter_errors.AdapterNotFound: "adapter",
}

_LOGGED = (_Code.INTERNAL, _Code.DATA_LOSS)
_MAX_MESSAGE_BYTES = 1_000  # statuses travel in HTTP/2 trailers, which end at 8 KiB


def status_of(error: Exception) -> grpc.StatusCode:
    """The code a client sees. What is not in the table is our fault."""
    found = _lookup(STATUS, error)
    return _Code.INTERNAL if found is None else found


def reason_of(error: Exception) -> str:
    """Machine-readable name: FeedbackConflict becomes FEEDBACK_CONFLICT."""
    if _lookup(STATUS, error) is None:
        return "INTERNAL"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()


def public_message(error: Exception) -> str:
    """What a client may read."""
    if status_of(error) in _LOGGED:
        return "internal error"
    text = str(error).encode(errors="replace")
    if len(text) <= _MAX_MESSAGE_BYTES:
        return text.decode()
    half = _MAX_MESSAGE_BYTES // 2 - 3  # what to do about it stands at the end
    head, tail = (part.decode(errors="ignore") for part in (text[:half], text[-half:]))
    return f"{head} ... {tail}"


def details_of(error: Exception) -> list[message.Message]:
    """google.rpc messages that say the same to a program."""
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=reason_of(error), domain="sona")
    ]
    if isinstance(error, sona_errors.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=public_message(error)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    is_estimated = isinstance(error, engine_errors.QueueFull)
    retry_s = error.retry_s if is_estimated else _lookup(RETRY_S, error)
    if retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_s * 1e3))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    resource = _lookup(_RESOURCE, error)
    if resource is not None:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=resource, description=public_message(error)
            )
        )
    return details


async def refuse(context: Context, error: Exception) -> NoReturn:
    """End the call with the error's status and details."""
    code = status_of(error)
    status = status_pb2.Status(code=code.value[0], message=public_message(error))
    for detail in details_of(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailer = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, status.message, trailer)


def deadline_of(context: Context) -> float | None:
    """When the caller gives up, on the clock of `time.monotonic`; None: never."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def log_if_ours(error: Exception, method: str) -> None:
    """Log with traceback what no client caused."""
    if status_of(error) in _LOGGED:
        log.error("%s failed", method, exc_info=error)


Unary = TypeVar("Unary", bound=Callable[..., Awaitable[Any]])
Stream = TypeVar("Stream", bound=Callable[..., AsyncGenerator[Any, None]])


def unary(method: Unary) -> Unary:
    """Turn our exceptions into a gRPC status."""

    @functools.wraps(method)
    async def wrapped(self: object, request: object, context: Context) -> object:
        try:
            return await method(self, request, context)
        except Exception as error:  # CancelledError is not an Exception and passes through
            log_if_ours(error, method.__qualname__)
            await refuse(context, error)

    return cast(Unary, wrapped)


def streaming(method: Stream) -> Stream:
    """The same for a method that streams; closing the stream closes the method's generator."""

    @functools.wraps(method)
    async def wrapped(
        self: object, request: object, context: Context
    ) -> AsyncGenerator[object, None]:
        try:
            async with aclosing(method(self, request, context)) as replies:
                async for reply in replies:
                    yield reply
        except Exception as error:
            log_if_ours(error, method.__qualname__)
            await refuse(context, error)

    return cast(Stream, wrapped)


def not_built(name: str) -> Callable[..., Any]:
    """A method of the contract that this version does not have: UNIMPLEMENTED, by name."""

    async def answer(self: object, request: object, context: Context) -> None:
        await refuse(context, sona_errors.NotBuilt(f"{name} is not built yet in this version"))

    return answer


_Value = TypeVar("_Value")


def _lookup(table: dict[type[Exception], _Value], error: Exception) -> _Value | None:
    for kind, value in table.items():
        if isinstance(error, kind):
            return value
    return None
