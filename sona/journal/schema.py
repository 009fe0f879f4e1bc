"""journal.db: its tables, and what SQLite's errors mean here."""

import sqlite3
from pathlib import Path

from adapters.store import sqlite
from sona.errors import DiskFull, JournalCorrupt, JournalError

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
    """Make the file and bring it to the newest schema."""
    try:
        sqlite.create(path, _MIGRATIONS, JournalError)
    except OSError as error:
        raise JournalError(
            f"cannot open {path}: {error.strerror}; check its permissions"
        ) from error
    except sqlite3.Error as error:
        raise translate(error, path) from error


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
