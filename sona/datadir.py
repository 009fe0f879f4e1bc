"""The data directory: private, writable, and held by one process at a time."""

import contextlib
import fcntl
import json
import os
import sys
import time
from pathlib import Path

from sona.errors import DataDirLocked, DataDirUnwritable

_LOCK_NAME = "lock"


class DataDir:
    """A locked data directory. The lock ends with `close` or with the process, however it ends."""

    def __init__(self, path: Path) -> None:
        """Create the directory if need be (0700), check that it can be written, and lock it.

        Raises:
          DataDirUnwritable: it cannot be made or written.
          DataDirLocked: another process, or another `DataDir`, holds it.
        """
        self._path = path.absolute()
        _make_private(self._path)
        self._lock_fd: int | None = _lock(self._path)
        try:
            _check_writable(self._path)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """Absolute."""
        return self._path

    @property
    def journal_path(self) -> Path:
        """Requests and feedback (`sona.journal`)."""
        return self._path / "journal.db"

    @property
    def adapters_path(self) -> Path:
        """Adapter versions (`adapters.store`)."""
        return self._path / "adapters.db"

    @property
    def loras_path(self) -> Path:
        """Loaded LoRAs (`adapters.loras`)."""
        return self._path / "loras"

    @property
    def cache_path(self) -> Path:
        """A directory for what can be computed again. Made on first use."""
        path = self._path / "cache"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def close(self) -> None:
        """Let go of the lock. Idempotent."""
        if self._lock_fd is not None:
            # The file stays: removing it would let two processes lock two files of one name.
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> "DataDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataDirUnwritable(
            f"data directory {path} lies below a file; choose another --data-dir"
        ) from None
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise DataDirUnwritable(
                f"data directory {path} is a file; move it away or choose another --data-dir"
            ) from None
    except OSError as error:
        raise _unwritable(path, error) from error


def _lock(path: Path) -> int:
    try:
        fd = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(fd)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise DataDirLocked(
            f"data directory {path} is in use by {holder}; stop it, or give this server another "
            "--data-dir"
        ) from None
    except OSError as error:
        os.close(fd)
        raise _unwritable(path, error) from error
    return fd


def _sign(fd: int) -> None:
    """Leave our name in the lock file, for the message that a second process will print."""
    note = {"pid": os.getpid(), "since": time.time(), "command": " ".join(sys.argv)[:200]}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(note).encode(), 0)


def _holder(fd: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        note = json.loads(os.pread(fd, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note["since"]))
        return f"process {note['pid']} ({note['command']}, since {since})"
    return "another process"


def _check_writable(path: Path) -> None:
    """Write and remove a file: a directory may be readable and yet take nothing."""
    probe = path / f".probe-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(b"sona")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> DataDirUnwritable:
    return DataDirUnwritable(
        f"data directory {path} cannot be written ({error.strerror}); it needs a directory of "
        "this user with free space: change its permissions or choose another --data-dir"
    )
