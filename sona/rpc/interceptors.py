"""What happens around every call of ours: who is it, and how did it end."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from sona.auth import Authenticator, set_principal
from sona.errors import Unauthenticated
from sona.rpc.status import Context, refuse

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]"
Observe = Callable[[str, grpc.StatusCode, float], None]
"""Told the method, how it ended and the seconds it took."""

_EXEMPT = ("/grpc.health.v1.", "/grpc.reflection.")  # probes have no key
_OURS = "/sona.v1."


class AuthInterceptor(grpc.aio.ServerInterceptor):  # pyright: ignore[reportMissingTypeArgument]
    """Identifies the caller, or denies the call."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """The principal set here is read by the method: both run in the call's own task."""
        handler = await continuation(handler_call_details)
        # No handler: an unknown method; the server answers UNIMPLEMENTED itself.
        if handler is None or handler_call_details.method.startswith(_EXEMPT):
            return handler
        try:
            authorization = _metadatum(handler_call_details, "authorization")
            set_principal(self._authenticator.identify(authorization))
        except Unauthenticated as error:
            return _denial(handler, error)
        return handler


class CountingInterceptor(grpc.aio.ServerInterceptor):  # pyright: ignore[reportMissingTypeArgument]
    """Reports every call of our services when it ends."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wraps the method; what it is told is a name of ours, never a client's invention."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        if not handler.response_streaming:
            inner = cast(Callable[..., Awaitable[object]], handler.unary_unary)

            async def unary(request: object, context: Context) -> object:
                with _Clock(self._observe, method, context):
                    return await inner(request, context)

            return _like(handler, unary)
        streamed = cast(
            Callable[..., AsyncGenerator[object, None]],
            handler.stream_stream if handler.request_streaming else handler.unary_stream,
        )

        async def stream(request: object, context: Context) -> AsyncGenerator[object, None]:
            with _Clock(self._observe, method, context):
                async with aclosing(streamed(request, context)) as replies:
                    async for reply in replies:
                        yield reply

        return _like(handler, stream)


class _Clock:
    """Times a call and reads how it ended. An exception that nobody turned into a status is one
    of three: the client went away, the abort itself, or a fault of ours."""

    def __init__(self, observe: Observe, method: str, context: Context) -> None:
        self._observe = observe
        self._method = method
        self._context = context

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        code = grpc.StatusCode.OK
        if kind is not None and issubclass(kind, grpc.aio.AbortError):
            code = _code(self._context)
        elif kind is not None:
            ended = not issubclass(kind, Exception)  # CancelledError, GeneratorExit
            code = grpc.StatusCode.CANCELLED if ended else grpc.StatusCode.UNKNOWN
        self._observe(self._method, code, time.perf_counter() - self._start)


def _code(context: Context) -> grpc.StatusCode:
    """The code an abort has set; grpc.aio keeps it as its number."""
    code: object = context.code()
    for known in grpc.StatusCode:
        if code is known or code == known.value[0]:
            return known
    return grpc.StatusCode.UNKNOWN


def _metadatum(details: grpc.HandlerCallDetails, name: str) -> str | None:
    metadata = cast("list[tuple[str, str | bytes]]", details.invocation_metadata or [])
    for key, value in metadata:
        if key == name and isinstance(value, str):
            return value
    return None


def _denial(handler: Handler, error: Unauthenticated) -> Handler:
    """A handler of the same arity: another one would reach the client as UNKNOWN."""

    async def deny(request: object, context: Context) -> None:
        await refuse(context, error)

    async def deny_stream(
        request: AsyncIterator[object] | object, context: Context
    ) -> AsyncGenerator[object, None]:
        await refuse(context, error)
        yield

    return _like(handler, deny_stream if handler.response_streaming else deny)


def _like(handler: Handler, method: Callable[..., Any]) -> Handler:
    """`method` in the place of the handler's own, with its arity and codecs."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(method, handler.request_deserializer, handler.response_serializer)
