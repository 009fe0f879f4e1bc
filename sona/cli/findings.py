"""What `sona doctor` looks at: each check yields findings, each finding says what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import socket
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

if TYPE_CHECKING:
    from sona.config import SonaConfig

Level = Literal["ok", "note", "blocks"]
PACKAGES = ("sona", "engine", "adapters", "reasoning_bank")

_OLDEST_PYTHON = (3, 11)
_TESTED_JAX = {(3, 11): "0.10.2", (3, 12): "0.11"}  # newest that is tested, by Python
_OLDEST_SQLITE = (3, 37)  # STRICT tables
_FEW_BYTES = 2**30
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `advice` is empty when there is nothing to do."""

    level: Level
    topic: str
    text: str
    advice: str = ""


def machine() -> Iterator[Finding]:
    """Python, cores, instructions, memory."""
    version = platform.python_version()
    is_old = sys.version_info < _OLDEST_PYTHON
    yield Finding(
        level="blocks" if is_old else "ok",
        topic="python",
        text=f"{version} on {platform.machine()} {platform.system()}",
        advice="install Python 3.11 or newer" if is_old else "",
    )
    cores = len(psutil.Process().cpu_affinity() or []) if hasattr(os, "sched_getaffinity") else 0
    flags = [flag for flag in _CPU_FLAGS if flag in _cpu_flags()]
    yield Finding(
        level="ok", topic="cpu", text=f"{cores or os.cpu_count()} cores; {' '.join(flags) or '-'}"
    )
    available = _memory_limit()
    is_scarce = available < _FEW_BYTES
    yield Finding(
        level="note" if is_scarce else "ok",
        topic="memory",
        text=f"{available / 2**30:.1f} GiB available",
        advice="free memory, or lower engine.num_pages and engine.max_num_seqs"
        if is_scarce
        else "",
    )


def libraries() -> Iterator[Finding]:
    """SQLite and gRPC, and whether the generated code fits the installed protobuf."""
    is_old = sqlite3.sqlite_version_info < _OLDEST_SQLITE
    yield Finding(
        level="blocks" if is_old else "ok",
        topic="sqlite",
        text=sqlite3.sqlite_version,
        advice="use a Python built with SQLite 3.37 or newer" if is_old else "",
    )
    try:
        pass  # everything gRPC, generated code included
    except Exception as error:  # protobuf raises a class of its own for versions that clash
        yield Finding(
            level="blocks", topic="grpc", text=f"cannot be imported: {error}",
            advice="pip install -U 'protobuf>=6.31.1,<8' grpcio-health-checking grpcio-reflection "
            "so that their versions agree",
        )  # fmt: skip
        return
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("grpcio", "protobuf")]
    yield Finding(level="ok", topic="grpc", text=", ".join(versions))


def devices() -> Iterator[Finding]:
    """JAX, what it runs on, and which kernels serve."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # a plugin or driver may fail in any way it likes
        yield Finding(
            level="blocks", topic="jax", text=f"cannot be used: {error}",
            advice="pip install -U jax, or set JAX_PLATFORMS=cpu to leave an accelerator alone",
        )  # fmt: skip
        return
    tested = _TESTED_JAX.get(sys.version_info[:2])
    is_tested = tested is not None and jax.__version__.startswith(tested)
    yield Finding(
        level="ok" if is_tested else "note",
        topic="jax",
        text=f"{jax.__version__} on {', '.join(str(device) for device in found)}",
        advice="" if is_tested else "tested: " + ", ".join(
            f"jax {version} on Python {major}.{minor}"
            for (major, minor), version in _TESTED_JAX.items()
        ),
    )  # fmt: skip
    yield Finding(level="ok", topic="kernels", text="XLA; native kernels are not built yet")


def names() -> Iterator[Finding]:
    """Whether our four packages are ours: `engine` and `adapters` are names others use too."""
    owners = importlib.metadata.packages_distributions()
    home = _home("sona")
    for package in PACKAGES:
        others = sorted(set(owners.get(package, ())) - {"sona"})
        where = _home(package)
        if others or where != home:
            yield Finding(
                level="blocks", topic="names",
                text=f"the package {package} lies in {where}"
                + (f" and is also installed by {', '.join(others)}" if others else ""),
                advice="use an environment of its own: pip uninstall "
                f"{' '.join(others) or package}, then install sona again",
            )  # fmt: skip
            return
    yield Finding(level="ok", topic="names", text=f"{', '.join(PACKAGES)} lie in {home}")


def data_dir(config: "SonaConfig") -> Iterator[Finding]:
    """Whether the data directory can be used. What does not exist is not made."""
    from sona.datadir import DataDir
    from sona.errors import DataDirError

    path = config.data.dir.absolute()
    if not path.exists():
        above = next(parent for parent in path.parents if parent.exists())
        can_make = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
        yield Finding(
            level="ok" if can_make else "blocks",
            topic="data",
            text=f"{path} does not exist yet",
            advice="" if can_make else f"{above} cannot be written: choose another --data-dir",
        )
        return
    try:
        DataDir(path).close()
    except DataDirError as error:
        yield Finding(level="blocks", topic="data", text=str(error), advice="see above")
    else:
        yield Finding(level="ok", topic="data", text=f"{path} can be written")


def ports(config: "SonaConfig") -> Iterator[Finding]:
    """Whether the ports are free now."""
    server = config.server
    for flag, port in (("--port", server.port), ("--grpc-port", server.grpc_port)):
        if port == 0:
            continue
        with socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((server.host, port))
            except OSError as error:
                yield Finding(
                    level="blocks", topic="ports",
                    text=f"{server.host}:{port} cannot be bound ({error.strerror})",
                    advice=f"stop what listens there, or choose another {flag}",
                )  # fmt: skip
                continue
        yield Finding(level="ok", topic="ports", text=f"{server.host}:{port} is free ({flag})")


def model(config: "SonaConfig") -> Iterator[Finding]:
    """Whether the checkpoint is there and of a kind that can be served. Reads no weights."""
    from engine.errors import EngineError
    from engine.model import load_config

    shipped = Path(_home("sona")) / "sona" / "models" / "nano" / "checkpoint"
    directory = Path(config.model) if config.model else shipped
    try:
        architecture = load_config(directory).architecture
    except EngineError as error:
        yield Finding(
            level="blocks", topic="model", text=str(error),
            advice="give the directory of a checkpoint: sona serve MODEL",
        )  # fmt: skip
    else:
        yield Finding(level="ok", topic="model", text=f"{architecture} in {directory}")


def _home(package: str) -> str:
    """The directory that holds a package; "nowhere" when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "nowhere"
    return str(Path(spec.origin).resolve().parent.parent)


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def _memory_limit() -> int:
    """Bytes available, by the machine and by the control group."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("utf-8"))
        return available if limit == "max" else min(available, int(limit) - used)
    except (OSError, ValueError):
        return available
