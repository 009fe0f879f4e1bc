"""A server of one's own: a child process on free ports with a temporary data directory."""

import asyncio
import contextlib
import hashlib
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sona.client import AsyncClient
from sona.errors import SonaError

_READY = re.compile(r"gRPC (\S+)\s+HTTP (\S+)")
_START_S = 600.0  # a large checkpoint compiles for minutes
_STOP_S = 30.0


class ChildFailed(SonaError):
    """The child server did not come up."""


@dataclass(frozen=True, slots=True)
class Child:
    """Where the child answers, and one key per student."""

    grpc: str
    http: str
    keys: dict[str, str]  # student to key
    process: asyncio.subprocess.Process

    def client(self, student: str) -> AsyncClient:
        """A client that acts as this student. Close it after use."""
        return AsyncClient(self.grpc, api_key=self.keys[student])


@contextlib.asynccontextmanager
async def child_server(
    students: Sequence[str], *, model: str = "", settings: str = "", data: Path | None = None
) -> AsyncIterator[Child]:
    """Start `sona serve` and stop it at the end. Every student is a tenant with one principal.

    Args:
      model: a checkpoint directory; empty: the shipped model.
      settings: further TOML, before the keys.
      data: a data directory to use again; None: a temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="sona-") as scratch:
        keys = {student: secrets.token_urlsafe(24) for student in students}
        config = Path(scratch) / "sona.toml"
        directory = data or Path(scratch) / "data"
        config.write_text(_config(model, settings, directory, keys), "utf-8")
        with (Path(scratch) / "stderr").open("w+") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sona.cli", "serve", "--config", str(config),
                stdout=asyncio.subprocess.PIPE, stderr=errors,
            )  # fmt: skip
            try:
                grpc, http = await asyncio.wait_for(_addresses(process), _START_S)
                if not grpc:
                    errors.seek(0)
                    raise ChildFailed(f"the server did not start: {errors.read().strip()}")
                yield Child(grpc, http, keys, process)
            finally:
                await _stop(process)


async def _addresses(process: asyncio.subprocess.Process) -> tuple[str, str]:
    assert process.stdout is not None
    async for line in process.stdout:
        found = _READY.search(line.decode())
        if found:
            return found[1], found[2]
    return "", ""


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _config(model: str, settings: str, data: Path, keys: dict[str, str]) -> str:
    lines = [f'model = "{model}"'] if model else []
    lines += ["[server]", "port = 0", "grpc_port = 0", "[data]", f'dir = "{data}"', settings]
    for student, key in keys.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines += [
            "[[auth.key]]", f'tenant = "{student}"', f'principal = "{student}"',
            'role = "admin"', f'sha256 = "{digest}"',
        ]  # fmt: skip
    return "\n".join(lines) + "\n"
