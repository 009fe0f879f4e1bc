"""The store's statements. Each runs on an open connection, inside the caller's transaction."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapters.errors import AdapterNotFound, IncompatibleAdapter, SnapshotCorrupt
from adapters.store.records import SlotKey, VersionDraft, VersionInfo

_VERSIONS = """
    SELECT slot_id, tenant, scope, owner, pattern_id, number, parent, restores, kind, created,
      base_hash, dim, is_gated, feedback_seqs, report,
      EXISTS (SELECT 1 FROM contents AS c
              WHERE c.slot_id = v.slot_id AND c.number = v.number) AS has_arrays
    FROM versions AS v JOIN slots USING (slot_id)
"""
_OF_SLOT = "tenant = ? AND scope = ? AND owner = ? AND pattern_id = ?"
_IS_LIVE = "number = (SELECT max(number) FROM versions WHERE slot_id = v.slot_id)"


def slot_of(row: sqlite3.Row) -> SlotKey:
    return SlotKey(
        tenant=row["tenant"],
        scope=row["scope"],
        owner=row["owner"],
        pattern_id=row["pattern_id"],
    )


def info_of(row: sqlite3.Row) -> VersionInfo:
    return VersionInfo(
        slot=slot_of(row),
        number=row["number"],
        parent=row["parent"],
        restores=row["restores"],
        kind=row["kind"],
        created=row["created"],
        base_hash=row["base_hash"],
        feedback_seqs=tuple(json.loads(row["feedback_seqs"])),
        is_gated=bool(row["is_gated"]),
        report=json.loads(row["report"]),
        has_arrays=bool(row["has_arrays"]),
    )


def slots(db: sqlite3.Connection, tenant: str | None) -> list[SlotKey]:
    """Slots with a version, by pattern, tenant, scope, owner."""
    rows = db.execute(
        "SELECT tenant, scope, owner, pattern_id FROM slots WHERE ? IS NULL OR tenant = ? "
        "ORDER BY pattern_id, tenant, scope, owner",
        (tenant, tenant),
    )
    return [slot_of(row) for row in rows]


def history(db: sqlite3.Connection, slot: SlotKey) -> list[sqlite3.Row]:
    """All versions of a slot, by number."""
    return db.execute(f"{_VERSIONS} WHERE {_OF_SLOT} ORDER BY number", _identity(slot)).fetchall()


def live(db: sqlite3.Connection, slot: SlotKey) -> sqlite3.Row | None:
    """The slot's newest version; None before the first."""
    return db.execute(f"{_VERSIONS} WHERE {_OF_SLOT} AND {_IS_LIVE}", _identity(slot)).fetchone()


def all_live(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """The newest version of every slot."""
    return db.execute(f"{_VERSIONS} WHERE {_IS_LIVE} ORDER BY slot_id").fetchall()


def numbered(db: sqlite3.Connection, slot: SlotKey, number: int) -> sqlite3.Row:
    """One version of a slot. Raises AdapterNotFound."""
    newest = live(db, slot)
    row = None
    if newest is not None and 0 < number <= newest["number"]:  # else it may not fit an integer
        row = db.execute(
            f"{_VERSIONS} WHERE {_OF_SLOT} AND number = ?", (*_identity(slot), number)
        ).fetchone()
    if row is None:
        known = "no versions" if newest is None else f"versions 1 to {newest['number']}"
        raise AdapterNotFound(f"{slot} has no version {number}; it has {known}")
    return row


def parts(
    db: sqlite3.Connection,
    row: sqlite3.Row,
    names: Iterable[str],
    *,
    base_hash: str | None,
    path: Path,
) -> dict[str, bytes]:
    """The named parts of a version that it has, each checked against its SHA-256.

    Raises:
      AdapterNotFound: the version was compacted.
      IncompatibleAdapter: it was learned on another base model than `base_hash`.
      SnapshotCorrupt: bytes differ from what was written, or are gone.
    """
    slot, number = slot_of(row), row["number"]
    if not row["has_arrays"]:
        raise AdapterNotFound(
            f"{slot} version {number} was compacted and has no arrays any more; choose one of the "
            "newest versions or a gated one"
        )
    if base_hash is not None and row["base_hash"] != base_hash:
        raise IncompatibleAdapter(
            f"{slot} version {number} was learned on base model {row['base_hash']}, served is "
            f"{base_hash}; serve that model again, or let the feedback be learned anew on this one"
        )
    found: dict[str, bytes] = {}
    for name in names:
        part = db.execute(
            "SELECT sha256, bytes FROM contents WHERE slot_id = ? AND number = ? AND part = ?",
            (row["slot_id"], number, name),
        ).fetchone()
        if part is None:
            continue
        if hashlib.sha256(part["bytes"]).digest() != part["sha256"]:
            raise SnapshotCorrupt(
                f"the {name} of {slot} version {number} in {path} does not match its checksum; "
                "roll the adapter back to another version, or restore the file from a backup"
            )
        found[name] = part["bytes"]
    return found


def next_number(db: sqlite3.Connection, slot: SlotKey) -> tuple[int, int]:
    """The slot's row id, made if need be, and its next version. Raises AdapterNotFound."""
    known = db.execute("SELECT 1 FROM patterns WHERE pattern_id = ?", (slot.pattern_id,))
    if known.fetchone() is None:
        raise AdapterNotFound(
            f"pattern {slot.pattern_id} was never created; take numbers from new_pattern_id"
        )
    db.execute(
        "INSERT OR IGNORE INTO slots (tenant, scope, owner, pattern_id) VALUES (?, ?, ?, ?)",
        _identity(slot),
    )
    (slot_id,) = db.execute(
        f"SELECT slot_id FROM slots WHERE {_OF_SLOT}", _identity(slot)
    ).fetchone()
    (newest,) = db.execute(
        "SELECT coalesce(max(number), 0) FROM versions WHERE slot_id = ?", (slot_id,)
    ).fetchone()
    return slot_id, newest + 1


def insert(
    db: sqlite3.Connection,
    slot_id: int,
    number: int,
    draft: VersionDraft,
    contents: Mapping[str, bytes],
) -> None:
    """Write a version's row and its parts."""
    db.execute(
        "INSERT INTO versions (slot_id, number, parent, restores, kind, created, base_hash, dim, "
        "is_gated, feedback_seqs, report) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            slot_id,
            number,
            draft.parent,
            draft.restores,
            draft.kind,
            draft.created,
            draft.base_hash,
            draft.table.keys.shape[1],
            draft.is_gated,
            json.dumps(draft.feedback_seqs),
            json.dumps(draft.report, allow_nan=False),
        ),
    )
    db.executemany(
        "INSERT INTO contents (slot_id, number, part, sha256, bytes) VALUES (?, ?, ?, ?, ?)",
        [
            (slot_id, number, name, hashlib.sha256(data).digest(), data)
            for name, data in contents.items()
        ],
    )


def num_bytes(db: sqlite3.Connection, slot: SlotKey, number: int) -> int:
    """Size of a version's stored table."""
    (size,) = db.execute(
        f"SELECT coalesce(sum(length(bytes)), 0) FROM contents JOIN slots USING (slot_id) "
        f"WHERE {_OF_SLOT} AND number = ? AND part = 'table'",
        (*_identity(slot), number),
    ).fetchone()
    return size


def compact(db: sqlite3.Connection, slot_id: int, *, newest: int, keep: int) -> None:
    """Drop the arrays of ungated versions that are not among the newest `keep`."""
    db.execute(
        "DELETE FROM contents WHERE slot_id = ? AND number <= ? AND number NOT IN "
        "(SELECT number FROM versions WHERE slot_id = ? AND is_gated)",
        (slot_id, newest - keep, slot_id),
    )


def _identity(slot: SlotKey) -> tuple[str, str, str, int]:
    return (slot.tenant, slot.scope, slot.owner, slot.pattern_id)
