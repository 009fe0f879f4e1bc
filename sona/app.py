"""Composition: what exists, in which order it starts, in which order it stops.

start   data directory → ports → journal, store → model → engine → gates → learner → ready
stop    refuse → drain (grace) → cancel → learner → engine → journal, store → data directory
"""

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from adapters.loras import LoraStore
from adapters.store import AdapterStore, LoadFailure, Version
from engine.client import EngineClient
from engine.config import EnginePlan
from engine.errors import ShapeError
from engine.slots import check_fits
from sona.auth import Authenticator
from sona.config import SonaConfig
from sona.datadir import DataDir
from sona.errors import SonaError
from sona.generic import load_or_embed
from sona.http.app import build_app
from sona.http.server import HttpServer
from sona.journal import Journal
from sona.late import Late
from sona.metrics import Metrics
from sona.model import Progress, warm_up
from sona.parts import Parts, compose
from sona.routing import Routing
from sona.rpc.server import Domain, RpcServer, build_server

log = logging.getLogger(__name__)
_PURGE_EVERY_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running server answers."""

    grpc: str
    http: str
    model: str


@dataclass(slots=True)
class _Stage:
    """How the server feels, for probes."""

    name: str = "starting"
    ready: bool = False
    alive: Callable[[], bool] = field(default=lambda: True)

    def is_alive(self) -> bool:
        return self.alive()

    def is_ready(self) -> bool:
        return self.ready

    def stage(self) -> str:
        return self.name


def run(config: SonaConfig, *, progress: Progress, on_ready: Callable[[Addresses], None]) -> None:
    """Serve until SIGINT or SIGTERM. Blocking. Raises what start-up refuses."""
    try:
        asyncio.run(serve(config, progress=progress, on_ready=on_ready))
    except ExceptionGroup as group:
        if len(group.exceptions) == 1:  # the task group wraps what start-up refused
            raise group.exceptions[0] from None
        raise


async def serve(
    config: SonaConfig, *, progress: Progress, on_ready: Callable[[Addresses], None]
) -> None:
    """Serve until a signal arrives or the task is cancelled."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running(config, progress=progress) as addresses:
        on_ready(addresses)
        await stop.wait()


@contextlib.asynccontextmanager
async def running(config: SonaConfig, *, progress: Progress) -> AsyncIterator[Addresses]:
    """A server that answers while the context lasts."""
    async with contextlib.AsyncExitStack() as stack:
        data = stack.enter_context(contextlib.closing(DataDir(config.data.dir)))
        stage, late = _Stage(), _LateDomain()
        rpc = build_server(
            late.domain(),
            Authenticator(config.auth.key),
            host=config.server.host,
            port=config.server.grpc_port,
            max_receive_bytes=config.server.max_receive_bytes,
            observe=late.metrics.call_ended,
        )
        await rpc.start()
        stack.push_async_callback(rpc.stop, 0.0)
        http = await _start_http(stack, config, stage, late)
        parts = await _start_parts(stack, config, data, stage, progress)
        late.become(parts)
        gc.collect()
        gc.freeze()  # what start-up made stays: no collection has to look through it again
        await rpc.serve()
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        watching = tasks.create_task(_watch(parts.engine_ended, rpc))
        stack.callback(watching.cancel)
        stage.name, stage.ready = "serving", True
        stack.push_async_callback(_drain, rpc, stage, config.server.drain_s)
        yield Addresses(
            grpc=f"{config.server.host}:{rpc.port}",
            http=f"http://{config.server.host}:{http.port}",
            model=parts.warm.info.name,
        )


class _LateDomain:
    """The borders' collaborators, bound before they are ready."""

    def __init__(self) -> None:
        names = ("inference", "feedback", "learning", "control", "limits")
        self._late = {name: Late() for name in names}
        self.metrics = _LateMetrics()

    def domain(self) -> Domain:
        """What the gRPC services hold."""
        return Domain(**cast(dict[str, Any], self._late))

    def become(self, parts: Parts) -> None:
        """Answer from now on."""
        for name, late in self._late.items():
            late.become(getattr(parts, name))
        self.metrics.real = parts.metrics


class _LateMetrics:
    """Metrics carry the model's name; calls that end before it is known are not counted."""

    def __init__(self) -> None:
        self.real: Metrics | None = None

    def call_ended(self, method: str, code: Any, seconds: float) -> None:
        if self.real is not None:
            self.real.call_ended(method, code, seconds)

    def render(self) -> bytes:
        return b"" if self.real is None else self.real.render()


async def _start_http(
    stack: contextlib.AsyncExitStack, config: SonaConfig, stage: _Stage, late: _LateDomain
) -> HttpServer:
    app = build_app(stage, late.metrics.render)
    server = HttpServer(app, host=config.server.host, port=config.server.port)
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    tasks.create_task(server.serve())
    await server.started()
    stack.callback(server.stop)
    return server


async def _start_parts(
    stack: contextlib.AsyncExitStack,
    config: SonaConfig,
    data: DataDir,
    stage: _Stage,
    progress: Progress,
) -> Parts:
    """Everything slow, with the ports already bound."""
    retention_s = config.data.retention_s
    journal = stack.enter_context(
        contextlib.closing(Journal(data.journal_path, retention_s=retention_s))
    )
    store = stack.enter_context(contextlib.closing(AdapterStore(data.adapters_path)))

    def staged(name: str, done: int, total: int) -> None:
        stage.name = name
        progress(name, done, total)

    warm = await asyncio.to_thread(
        warm_up,
        config.model,
        config.server.served_model_name,
        config.engine,
        learns=config.learning.enabled,
        progress=staged,
    )
    engine = EngineClient(warm.model, warm.tokenizer, warm.plan, warm.runner)
    stack.push_async_callback(asyncio.to_thread, engine.close)
    stage.alive = lambda: engine.is_alive
    generic = await load_or_embed(
        engine, warm.tokenizer, data.cache_path, warm.info.base_hash, staged
    )
    routing = Routing(generic)
    _publish_live(store, routing, warm.info.base_hash, warm.plan)
    loras = await asyncio.to_thread(LoraStore, data.loras_path)
    for error in loras.failures:
        log.warning("a LoRA is not served: %s", error)
    parts = compose(config, warm, engine, journal, store, loras, routing)
    parts.learning.loop.start(learns=config.learning.enabled)
    stack.push_async_callback(asyncio.to_thread, parts.learning.loop.stop)
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    purging = tasks.create_task(_purge(journal))
    stack.callback(purging.cancel)
    return parts


def _publish_live(store: AdapterStore, routing: Routing, base_hash: str, plan: EnginePlan) -> None:
    """What was learned before is loaded, never computed again."""
    for version in store.all_live(base_hash):
        error = _unservable(version, plan)
        if error is None:
            assert isinstance(version, Version)
            routing.publish(version)
        else:
            log.warning("%s version %d is not served: %s", version.slot, version.number, error)


def _unservable(version: Version | LoadFailure, plan: EnginePlan) -> Exception | str | None:
    """Why a stored version cannot be served as it is."""
    if isinstance(version, LoadFailure):
        return version.error
    try:
        check_fits(version.table, plan)
    except ShapeError as error:
        return error
    return None


async def _purge(journal: Journal) -> None:
    """Forget requests past their retention."""
    while True:
        try:
            await asyncio.wrap_future(journal.purge())
        except SonaError:
            log.exception("requests past their retention could not be deleted; trying again later")
        await asyncio.sleep(_PURGE_EVERY_S)


async def _watch(engine_ended: asyncio.Event, rpc: RpcServer) -> None:
    """Health probes hear of it when the engine dies."""
    await engine_ended.wait()
    await rpc.refuse()


async def _drain(rpc: RpcServer, stage: _Stage, grace_s: float) -> None:
    """Refuse what is new, let what runs finish, cancel the rest."""
    stage.name, stage.ready = "draining", False
    await rpc.stop(grace_s)
