"""journal.db: its tables, how a connection is opened, and what SQLite's errors mean here."""

import os
import sqlite3
from pathlib import Path

from sona.errors import DiskFull, JournalCorrupt, JournalError

_OLDEST_SQLITE = (3, 37)  # STRICT tables
_BUSY_TIMEOUT_S = 5.0  # only a foreign tool can hold the lock: we write from one thread

# One tuple of statements per schema version. Released entries never change; add a new one.
# Small columns come first: what follows a large value lies on overflow pages.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE requests (
          tenant TEXT NOT NULL,
          request_id TEXT NOT NULL,
          principal TEXT NOT NULL,
          model TEXT NOT NULL,
          base_hash TEXT NOT NULL,
          created REAL NOT NULL,
          adapter_versions TEXT NOT NULL,
          prompt_ids BLOB NOT NULL,
          choices TEXT NOT NULL,
          prompt_text TEXT,
          prompt_vector BLOB,
          UNIQUE (tenant, request_id)
        ) STRICT
        """,
        "CREATE INDEX requests_created ON requests (created)",
        # AUTOINCREMENT: the number of a deleted feedback is never given to another.
        """
        CREATE TABLE feedback (
          seq INTEGER PRIMARY KEY AUTOINCREMENT,
          tenant TEXT NOT NULL,
          feedback_id TEXT NOT NULL,
          principal TEXT NOT NULL,
          request_id TEXT NOT NULL,
          choice_index INTEGER NOT NULL,
          content_hash BLOB NOT NULL,
          created REAL NOT NULL,
          state TEXT NOT NULL,
          is_learnable INTEGER NOT NULL,
          adapter TEXT,
          version INTEGER,
          pattern_id INTEGER,
          reason TEXT NOT NULL DEFAULT '',
          conflicts_with TEXT NOT NULL DEFAULT '[]',
          kind TEXT NOT NULL,
          payload TEXT NOT NULL,
          comment TEXT NOT NULL,
          metadata TEXT NOT NULL,
          model TEXT NOT NULL,
          base_hash TEXT NOT NULL,
          adapter_versions TEXT NOT NULL,
          prompt_ids BLOB NOT NULL,
          answer_ids BLOB NOT NULL,
          prompt_text TEXT,
          answer_text TEXT NOT NULL,
          prompt_vector BLOB,
          UNIQUE (tenant, feedback_id)
        ) STRICT
        """,
        """
        CREATE INDEX feedback_pending ON feedback (seq)
        WHERE state = 'ACCEPTED' AND is_learnable = 1
        """,
        "CREATE INDEX feedback_pattern ON feedback (pattern_id, seq) WHERE pattern_id IS NOT NULL",
        "CREATE INDEX feedback_state ON feedback (state)",
        # states: hidden bf16, top ids i32, top log-probs f32, rest log-prob f32, CRC-32.
        """
        CREATE TABLE positions (
          seq INTEGER NOT NULL REFERENCES feedback (seq) ON DELETE CASCADE,
          position_index INTEGER NOT NULL,
          target_id INTEGER NOT NULL,
          kind TEXT NOT NULL,
          num_top INTEGER NOT NULL,
          states BLOB NOT NULL,
          UNIQUE (seq, position_index)
        ) STRICT
        """,
    ),
)


def create(path: Path) -> None:
    """Make the file, readable by its owner only, and bring it to the newest schema."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise JournalError(
            f"this Python carries SQLite {sqlite3.sqlite_version}; the journal needs 3.37 or "
            "newer: use a newer Python build"
        )
    try:
        # SQLite gives its -wal and -shm files the mode of the database file.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = connect(path)
        try:
            _migrate(connection, path)
        finally:
            connection.close()
    except OSError as error:
        raise JournalError(
            f"cannot open {path}: {error.strerror}; check its permissions"
        ) from error
    except sqlite3.Error as error:
        raise translate(error, path) from error


def connect(path: Path, *, is_reader: bool = False) -> sqlite3.Connection:
    """Open a connection that any one thread at a time may use. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # WAL: one sync per commit
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # deleted text leaves the file
        connection.execute(f"PRAGMA query_only = {'ON' if is_reader else 'OFF'}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise JournalError(
            f"{path} has schema {version}, this SONA knows up to {len(_MIGRATIONS)}; start the "
            "SONA that wrote it, or use another --data-dir"
        )
    for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def translate(error: sqlite3.Error, path: Path) -> JournalError:
    """The journal's error for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return DiskFull(
            f"the disk refused {path} ({error}); nothing of this call was stored: free space on "
            "that disk, or check it for errors, and send it again"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return JournalCorrupt(
            f"{path} is damaged ({error}); stop the server and restore it from a backup, or move "
            "it away to start with an empty journal"
        )
    return JournalError(
        f"{path}: {error}; check that no other program has it open and that it is writable"
    )
