"""The gRPC server: our five services, health and reflection on one port."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sona.auth import Authenticator
from sona.checks import Limits
from sona.errors import PortInUse
from sona.ports import Control, Feedback, Inference, Learning
from sona.rpc.bank import ReasoningBankService
from sona.rpc.control import ControlService
from sona.rpc.feedback import FeedbackService
from sona.rpc.inference import InferenceService
from sona.rpc.interceptors import AuthInterceptor, CountingInterceptor, Observe
from sona.rpc.learning import LearningService
from sona.v1 import (
    bank_pb2,
    bank_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    learning_pb2,
    learning_pb2_grpc,
)

SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for module in (inference_pb2, feedback_pb2, learning_pb2, bank_pb2, control_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What the services delegate to."""

    inference: Inference
    feedback: Feedback
    learning: Learning
    control: Control
    limits: Limits


class RpcServer:
    """A bound server. Not serving until told; stopped once."""

    def __init__(self, server: grpc.aio.Server, probes: Any, port: int) -> None:
        self._server = server
        self._probes = probes  # health.aio.HealthServicer: the stubs do not know it
        self.port = port  # the bound one, also where 0 was asked for

    async def start(self) -> None:
        """Begin to answer; health says NOT_SERVING."""
        await self._set_all(_NOT_SERVING)
        await self._server.start()

    async def serve(self) -> None:
        """Tell health probes that requests are welcome."""
        await self._set_all(_SERVING)

    async def refuse(self) -> None:
        """Tell health probes that no more requests are welcome, for good. Calls still work."""
        await self._probes.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once; give the running ones `grace_s` seconds, then cancel them."""
        await self.refuse()
        await self._server.stop(grace_s)

    async def _set_all(self, status: Any) -> None:
        for service in ("", *SERVICES):
            await self._probes.set(service, status)


def build_server(
    domain: Domain,
    authenticator: Authenticator,
    *,
    host: str,
    port: int,
    max_receive_bytes: int = 4 * 2**20,
    observe: Observe | None = None,
) -> RpcServer:
    """Bind the port, or port 0 for any free one. Call it on the running event loop.

    Raises:
      PortInUse: another server listens there, or the host has no such address.
    """
    interceptors: list[AuthInterceptor | CountingInterceptor] = [AuthInterceptor(authenticator)]
    if observe is not None:
        interceptors.insert(0, CountingInterceptor(observe))  # outermost: denials are counted too
    server = grpc.aio.server(interceptors=interceptors, options=_options(max_receive_bytes))
    for add, servicer in _services(domain):
        add(servicer, server)
    probes: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    reflected = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(reflected, server)
    return RpcServer(server, probes, _bind(server, host, port))


_MAX_PENDING = 100_000


def _options(max_receive_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server would bind the same port and share it
        ("grpc.max_receive_message_length", max_receive_bytes),
        # Beyond a thousand calls that wait to be taken, gRPC drops some without a word; ours
        # are refused with a status and a time to come back.
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
        # A client may ping during a long prefill; the default cuts it off after two pings.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that vanished without a word is noticed, and its work freed.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _services(domain: Domain) -> list[tuple[Callable[..., None], object]]:
    limits = domain.limits
    return [
        (
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            InferenceService(domain.inference, limits),
        ),
        (
            feedback_pb2_grpc.add_FeedbackServiceServicer_to_server,
            FeedbackService(domain.feedback, limits),
        ),
        (
            learning_pb2_grpc.add_LearningServiceServicer_to_server,
            LearningService(domain.learning),
        ),
        (
            bank_pb2_grpc.add_ReasoningBankServiceServicer_to_server,
            ReasoningBankService(),
        ),
        (
            control_pb2_grpc.add_ControlServiceServicer_to_server,
            ControlService(domain.control),
        ),
    ]


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        bound, cause = 0, error
    else:
        cause = None
    if bound == 0:
        raise PortInUse(
            f"cannot listen on {address} for gRPC: the port is taken, or {host} is not an address "
            "of this machine; stop the other server, or choose another --grpc-port or --host"
        ) from cause
    return bound
