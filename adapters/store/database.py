"""adapters.db: its tables, and what SQLite's errors mean here."""

import sqlite3
from pathlib import Path

from adapters.errors import AdapterError, SnapshotCorrupt, StoreUnwritable
from adapters.store import sqlite

# One tuple of statements per schema version. Released entries never change; add a new one.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # AUTOINCREMENT: a pattern's number is never given to another.
        """
        CREATE TABLE patterns (
          pattern_id INTEGER PRIMARY KEY AUTOINCREMENT,
          created REAL NOT NULL
        ) STRICT
        """,
        """
        CREATE TABLE slots (
          slot_id INTEGER PRIMARY KEY,
          tenant TEXT NOT NULL,
          scope TEXT NOT NULL,
          owner TEXT NOT NULL,
          pattern_id INTEGER NOT NULL REFERENCES patterns (pattern_id),
          UNIQUE (tenant, scope, owner, pattern_id)
        ) STRICT
        """,
        """
        CREATE TABLE versions (
          slot_id INTEGER NOT NULL REFERENCES slots (slot_id),
          number INTEGER NOT NULL CHECK (number > 0),
          parent INTEGER NOT NULL,
          restores INTEGER,
          kind TEXT NOT NULL,
          created REAL NOT NULL,
          base_hash TEXT NOT NULL,
          dim INTEGER NOT NULL,
          is_gated INTEGER NOT NULL,
          feedback_seqs TEXT NOT NULL,
          report TEXT NOT NULL,
          PRIMARY KEY (slot_id, number)
        ) STRICT, WITHOUT ROWID
        """,
        # The arrays of a version, one safetensors blob per part. Compaction deletes these rows.
        """
        CREATE TABLE contents (
          slot_id INTEGER NOT NULL,
          number INTEGER NOT NULL,
          part TEXT NOT NULL CHECK (part IN ('table', 'gate', 'state')),
          sha256 BLOB NOT NULL,
          bytes BLOB NOT NULL,
          PRIMARY KEY (slot_id, number, part),
          FOREIGN KEY (slot_id, number) REFERENCES versions (slot_id, number)
        ) STRICT
        """,
        """
        CREATE TRIGGER versions_are_immutable BEFORE UPDATE ON versions
        BEGIN SELECT RAISE(ABORT, 'a version never changes'); END
        """,
    ),
)


def create(path: Path) -> None:
    """Make the file and bring it to the newest schema."""
    try:
        sqlite.create(path, _MIGRATIONS, AdapterError)
    except OSError as error:
        raise StoreUnwritable(
            f"cannot open {path}: {error.strerror}; check its permissions"
        ) from error
    except sqlite3.Error as error:
        raise translate(error, path) from error


def translate(error: sqlite3.Error, path: Path) -> AdapterError:
    """The store's error for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
        return StoreUnwritable(
            f"the disk refused {path} ({error}); nothing was stored and the version before stays: "
            "free space on that disk, or check it for errors"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return SnapshotCorrupt(
            f"{path} is damaged ({error}); stop the server and restore it from a backup, or move "
            "it away to start without adapters"
        )
    return AdapterError(
        f"{path}: {error}; check that no other program has it open and that it is writable"
    )
