"""TOML, environment and flags to one tree of frozen dataclasses.

Precedence: flag, environment, file, default. Each part checks itself; what no single part can
know is checked in `SonaConfig`. Only this module reads files and the environment.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from sona import settings
from sona.auth import AuthConfig, check_bind

_MAX_PORT = 65_535
_SHIPPED = "small-cpu"  # a preset that is always there: tells where the presets lie


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens, and how it ends."""

    host: str = "127.0.0.1"  # another than loopback needs [[auth.key]]
    port: int = 8000  # HTTP: /metrics, /health, /ready; 0: any free one
    grpc_port: int = 50051  # 0: any free one
    served_model_name: str = ""  # the model's name for clients; empty: its directory's
    max_receive_bytes: int = 4 * 2**20  # of one gRPC message
    drain_s: float = 10.0  # seconds that running requests may take after a stop signal

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("server.host is empty; use 127.0.0.1, or 0.0.0.0 with keys")
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) <= _MAX_PORT:
                raise ConfigError(f"server.{name} is {getattr(self, name)}; use 0 to {_MAX_PORT}")
        if self.port == self.grpc_port != 0:
            raise ConfigError(
                f"server.port and server.grpc_port are both {self.port}; HTTP and gRPC need two"
            )
        if self.max_receive_bytes < 65_536:
            raise ConfigError(
                f"server.max_receive_bytes is {self.max_receive_bytes}; use 65536 or more"
            )
        if not 0.0 <= self.drain_s <= 3_600.0:
            raise ConfigError(f"server.drain_s is {self.drain_s}; use 0 to 3600 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """Whether the server learns, and how much a client may ask it to learn at once."""

    enabled: bool = True  # false freezes what was learned; feedback is stored on
    max_correction_bytes: int = 65_536  # of one corrected answer, as UTF-8
    capture_memory_bytes: int = 256 * 2**20  # host memory for states that await feedback

    def __post_init__(self) -> None:
        for name in ("max_correction_bytes", "capture_memory_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"learning.{name} is {getattr(self, name)}; use 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is kept, and where."""

    dir: Path = Path(".sona")  # locked by one server at a time
    retention_s: float = 86_400.0  # seconds that a request can get feedback

    def __post_init__(self) -> None:
        if not self.retention_s > 0.0:
            raise ConfigError(f"data.retention_s is {self.retention_s}; use more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class SonaConfig:
    """Everything an operator may set."""

    model: str = ""  # directory of a checkpoint; empty: the shipped model
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_bind(self.server.host, self.auth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, and for every setting that is not a default where it came from."""

    config: SonaConfig
    origins: Mapping[str, str]


def load(
    source: str | Path | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read and check a configuration.

    Args:
      source: a file, or the name of a preset.
      flags: dotted path to value, already of the setting's type.
      environ: the environment unless given.

    Raises:
      ConfigError: names the first bad setting, where it came from, and what is allowed.
    """
    environ = os.environ if environ is None else environ
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if source is not None:
        path = find(source)
        tree = _read(path)
        origins = dict.fromkeys(settings.paths(tree), f"file {path}")
    for path, (value, name) in settings.from_environ(SonaConfig, environ).items():
        settings.put(tree, path, value)
        origins[path] = f"environment {name}"
    for path, value in (flags or {}).items():
        settings.put(tree, path, value)
        origins[path] = "flag"
    return Loaded(config=settings.build(SonaConfig, tree), origins=origins)


def find(source: str | Path) -> Path:
    """The file behind a path or a preset's name. Raises ConfigError."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = presets()
    if str(source) in shipped:
        return shipped[str(source)]
    raise ConfigError(
        f"there is no configuration file {source}; give a TOML file, or one of the presets "
        f"{', '.join(shipped)}"
    )


def presets() -> dict[str, Path]:
    """Shipped configurations by name."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):  # installed; in a checkout
        if (folder / f"{_SHIPPED}.toml").is_file():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path} as TOML: {error}") from error
