"""Loaded LoRAs on disk: one file per live version, written and synced before anyone may use it.

    loras/<tenant>/<name>/3.safetensors      factors; the header says whose, and of what base
    loras/<tenant>/<name>/last               the highest number ever given: none is reused

Tables rest in host memory as long as a budget allows, the least recently used leaving first.
"""

import hashlib
import json
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from adapters.errors import (
    AdapterNotFound,
    IncompatibleAdapter,
    InvalidAdapter,
    SnapshotCorrupt,
    StoreUnwritable,
)
from adapters.lora import merge
from engine import LoraRef, LoraTable

_NAME = re.compile(r"(?!pattern-\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = ("none", "own")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraInfo:
    """A loaded LoRA's live version."""

    tenant: str
    name: str
    version: int
    base_hash: str
    rank: int
    num_bytes: int  # of the table in host memory
    source: str  # the directory it was read from
    created: float  # unix seconds, of this version

    @property
    def key(self) -> tuple[str, str]:
        """Identity across tenants."""
        return (self.tenant, self.name)


class LoraStore:
    """Owner of the directory `loras`. Every method is for any thread."""

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the directory and read who is loaded; damaged files are listed in `failures`."""
        self._directory, self._memory_bytes, self._clock = directory, memory_bytes, clock
        self._lock = threading.Lock()
        self._live: dict[tuple[str, str], LoraInfo] = {}
        self._tables: OrderedDict[tuple[str, ...], LoraTable] = OrderedDict()
        self.failures: list[SnapshotCorrupt] = []
        for path in sorted(directory.glob("*/*/*.safetensors")):
            try:
                info = _read_info(path)
            except SnapshotCorrupt as error:
                self.failures.append(error)
                continue
            known = self._live.get(info.key)
            if known is None or known.version < info.version:
                self._live[info.key] = info

    def put(
        self, tenant: str, name: str, table: LoraTable, *, base_hash: str, source: str
    ) -> LoraInfo:
        """Store the next version of a name, which makes it live. Returns once it is on disk.

        Raises InvalidAdapter for a name that cannot be one, StoreUnwritable.
        """
        check_name(name)
        with self._lock:
            home = self._home(tenant, name)
            version = self._last(home) + 1
            info = LoraInfo(
                tenant=tenant,
                name=name,
                version=version,
                base_hash=base_hash,
                rank=table.rank,
                num_bytes=table.num_bytes,
                source=source,
                created=self._clock(),
            )
            try:
                _write(home, info, table)
            except OSError as error:
                raise StoreUnwritable(
                    f"the disk refused {home} ({error.strerror}); nothing was loaded and the "
                    "version before stays: free space on that disk"
                ) from error
            self._live[info.key] = info
            self._keep(info.key, table)
            for old in home.glob("*.safetensors"):
                if old.stem != str(version):
                    old.unlink(missing_ok=True)
        return info

    def remove(self, tenant: str, name: str) -> LoraInfo:
        """Forget a LoRA; requests under way keep theirs. Raises AdapterNotFound."""
        with self._lock:
            info = self._info(tenant, name)
            for path in self._home(tenant, name).glob("*.safetensors"):
                path.unlink(missing_ok=True)
            del self._live[info.key]
            self._tables.pop(info.key, None)
        return info

    def get(self, tenant: str, name: str) -> LoraInfo:
        """The live version of a name. Raises AdapterNotFound."""
        with self._lock:
            return self._info(tenant, name)

    def all_of(self, tenant: str) -> list[LoraInfo]:
        """What a tenant has loaded, by name."""
        with self._lock:
            found = [info for info in self._live.values() if info.tenant == tenant]
        return sorted(found, key=lambda info: info.name)

    @property
    def num_loaded(self) -> int:
        """Names of all tenants."""
        return len(self._live)

    def ref(self, tenant: str, name: str, version: int | None, *, base_hash: str) -> LoraRef:
        """The live version, ready for a job; reads the file when memory has let it go.

        Raises AdapterNotFound, IncompatibleAdapter, SnapshotCorrupt.
        """
        with self._lock:
            info = self._info(tenant, name)
            if version not in (None, info.version):
                raise AdapterNotFound(
                    f"{name} has version {info.version} loaded, not {version}; leave the version "
                    "out, or load that one again"
                )
            if info.base_hash != base_hash:
                raise IncompatibleAdapter(
                    f"{name} was loaded for the base model {info.base_hash[:12]}, the one served "
                    f"is {base_hash[:12]}: load it again for this one"
                )
            table = self._tables.get(info.key)
            if table is None:
                table = _read_table(self._path(info))
            self._keep(info.key, table)
        return LoraRef(info.name, info.version, info.key, table)

    def mix(self, tenant: str, parts: Sequence[tuple[LoraRef, float]]) -> LoraRef:
        """LoRAs merged by weight, as one. Raises CandidateRejected for a weight out of range."""
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0]
        names = [f"{ref.name}@{ref.version}:{weight!r}" for ref, weight in parts]
        key = ("mix", tenant, *names)
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                table = merge([(ref.table, weight) for ref, weight in parts])
            self._keep(key, table)
        return LoraRef("+".join(names), 0, key, table)

    def _info(self, tenant: str, name: str) -> LoraInfo:
        info = self._live.get((tenant, name))
        if info is None:
            raise AdapterNotFound(
                f"no LoRA {name!r} is loaded for your tenant; ListAdapters names those that are "
                "(a server without --max-loras has none)"
            )
        return info

    def _keep(self, key: tuple[str, ...], table: LoraTable) -> None:
        self._tables[key] = table
        self._tables.move_to_end(key)
        held = sum(each.num_bytes for each in self._tables.values())
        while held > self._memory_bytes and len(self._tables) > 1:
            _, dropped = self._tables.popitem(last=False)
            held -= dropped.num_bytes

    def _home(self, tenant: str, name: str) -> Path:
        return self._directory / hashlib.sha256(tenant.encode()).hexdigest()[:16] / name

    def _path(self, info: LoraInfo) -> Path:
        return self._home(info.tenant, info.name) / f"{info.version}.safetensors"

    def _last(self, home: Path) -> int:
        try:
            return int((home / "last").read_text())
        except (OSError, ValueError):
            return max((int(path.stem) for path in home.glob("*.safetensors")), default=0)


def check_name(name: str) -> None:
    """Refuse a name that a request could not ask for. Raises InvalidAdapter."""
    if name in _RESERVED or not _NAME.fullmatch(name):
        raise InvalidAdapter(
            f"a LoRA cannot be called {name[:80]!r}; use 1 to 64 letters, digits, dots, dashes "
            "and underscores, and neither none, own nor a pattern's name"
        )


def _write(home: Path, info: LoraInfo, table: LoraTable) -> None:
    """The number first, then the file: a number that was given once is never given again."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    arrays = {f"a.{m}": array for m, array in table.a.items()}
    arrays |= {f"b.{m}": array for m, array in table.b.items()}
    aside = home / f"{info.version}.writing"
    try:
        (home / "last").write_text(str(info.version))
        save_file(arrays, aside, metadata={"lora": json.dumps(asdict(info))})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(home / f"{info.version}.safetensors")
        fd = os.open(home, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(0, str(error)) from error
    finally:
        aside.unlink(missing_ok=True)


def _read_info(path: Path) -> LoraInfo:
    try:
        with safe_open(path, framework="np") as file:
            found: Mapping[str, Any] = json.loads((file.metadata() or {})["lora"])
        return LoraInfo(**found)
    except (SafetensorError, OSError, struct.error, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_table(path: Path) -> LoraTable:
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            for name in names:
                side, _, module = name.partition(".")
                (a if side == "a" else b)[module] = file.get_tensor(name)
    except (SafetensorError, OSError, struct.error) as error:
        raise _damaged(path, error) from error
    return LoraTable(a, b)


def _damaged(path: Path, error: Exception) -> SnapshotCorrupt:
    return SnapshotCorrupt(f"{path} is damaged ({error}); load the LoRA again, or remove the file")
