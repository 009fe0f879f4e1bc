"""How a SQLite file of ours is made and opened: durable, private, with numbered migrations."""

import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

_OLDEST_SQLITE = (3, 37)  # STRICT tables
_BUSY_TIMEOUT_S = 5.0  # only a foreign tool can hold the lock: each file has one writer
Migrations = Sequence[Sequence[str]]  # one tuple of statements per schema version


def create(path: Path, migrations: Migrations, fail: Callable[[str], Exception]) -> None:
    """Make the file, readable by its owner only, and bring it to the newest schema.

    Raises `fail(message)` for what is not SQLite's own, else OSError and sqlite3.Error.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise fail(
            f"this Python carries SQLite {sqlite3.sqlite_version}; {path.name} needs 3.37 or "
            "newer: use a newer Python build"
        )
    # SQLite gives its -wal and -shm files the mode of the database file.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = connect(path)
    try:
        _migrate(connection, path, migrations, fail)
    finally:
        connection.close()


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
        connection.execute("PRAGMA secure_delete = ON")  # what is deleted leaves the file
        connection.execute(f"PRAGMA query_only = {'ON' if is_reader else 'OFF'}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _migrate(
    connection: sqlite3.Connection,
    path: Path,
    migrations: Migrations,
    fail: Callable[[str], Exception],
) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise fail(
            f"{path} has schema {version}, this SONA knows up to {len(migrations)}; start the "
            "SONA that wrote it, or use another --data-dir"
        )
    for number, statements in enumerate(migrations[version:], start=version + 1):
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
