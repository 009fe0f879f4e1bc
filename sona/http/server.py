"""The HTTP server: uvicorn on the service's own event loop."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from sona.errors import PortInUse

_BACKLOG = 128


class HttpServer:
    """A bound server. `serve` runs until `stop`, as one task of whoever owns it."""

    def __init__(self, app: Starlette, *, host: str, port: int) -> None:
        """Bind the port, or port 0 for any free one. Raises PortInUse."""
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=30
        )
        self._server = _Server(config)

    async def serve(self) -> None:
        """Answer until `stop`; requests under way are finished."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._socket.close()

    async def started(self) -> None:
        """Wait until it answers."""
        await self._server.answering.wait()

    def stop(self) -> None:
        """Ask it to end."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """Leaves signals to the service: it stops both of its servers itself, in order."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortInUse(f"{host!r} is not an address of this machine ({error})") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise PortInUse(
            f"cannot listen on {host}:{port} for HTTP ({error.strerror}); stop the other server, "
            "or choose another --port or --host"
        ) from error
    bound.setblocking(False)
    return bound
