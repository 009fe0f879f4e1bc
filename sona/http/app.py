"""What HTTP answers: /metrics, /health, /ready."""

from collections.abc import Callable
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sona.metrics import CONTENT_TYPE

_RETRY_S = "5"


class Probe(Protocol):
    """How the server feels."""

    def is_alive(self) -> bool:
        """Whether it can still be of use without a restart."""
        ...

    def is_ready(self) -> bool:
        """Whether requests are welcome: loaded, warm, not draining."""
        ...

    def stage(self) -> str:
        """What it does now, in a word or two: "loading weights", "serving", "draining"."""
        ...


def build_app(probe: Probe, render_metrics: Callable[[], bytes]) -> Starlette:
    """The application. None of its routes asks for a key: none tells about a user."""

    async def metrics(request: Request) -> Response:
        return Response(render_metrics(), media_type=CONTENT_TYPE)

    async def health(request: Request) -> Response:
        return _answer(probe.is_alive(), probe)

    async def ready(request: Request) -> Response:
        return _answer(probe.is_alive() and probe.is_ready(), probe)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/ready", ready),
        ]
    )


def _answer(is_well: bool, probe: Probe) -> Response:
    body = {"ok": is_well, "stage": probe.stage()}
    if is_well:
        return JSONResponse(body)
    return JSONResponse(body, status_code=503, headers={"retry-after": _RETRY_S})
