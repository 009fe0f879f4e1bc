"""Immutable versions of head slots on disk: written and synced before anyone may serve them."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    CandidateRejected,
    SnapshotCorrupt,
    StaleCandidate,
)
from adapters.store import arrays, database, rows, sqlite
from adapters.store.records import (
    LoadFailure,
    SlotKey,
    Version,
    VersionDraft,
    VersionInfo,
    check_draft,
    empty_table,
)

_SERVED = ("table", "gate")


class AdapterStore:
    """Owns adapters.db. Every method is for any thread; what writes returns once it is on disk.

    The highest number of a slot is its live version; a rollback is a new version with the content
    of an older one. The newest `keep_versions` of a slot and every gated version keep their
    arrays, the others only their row.
    """

    def __init__(
        self, path: Path, *, keep_versions: int = 100, clock: Callable[[], float] = time.time
    ) -> None:
        """Open or create the store.

        Raises:
          SnapshotCorrupt, StoreUnwritable, AdapterError: the file cannot be used.
        """
        assert keep_versions >= 1, "the live version needs its arrays"
        self._path = path
        self._keep_versions = keep_versions
        self._clock = clock
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._is_closed = False
        database.create(path)
        self._writer: sqlite3.Connection | None = None  # opened by the first write
        try:
            self._reader = sqlite.connect(path, is_reader=True)
        except sqlite3.Error as error:
            raise database.translate(error, path) from error

    def new_pattern_id(self) -> int:
        """A number that no pattern of this installation has had or will get again."""
        with self._writing() as db:
            cursor = db.execute("INSERT INTO patterns (created) VALUES (?)", (self._clock(),))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def put(self, slot: SlotKey, draft: VersionDraft) -> Version:
        """Store the next version of a slot, which makes it live. Raises only if nothing was stored.

        Raises:
          CandidateRejected: arrays or figures that nobody could serve.
          StaleCandidate: `draft.parent` is not the live version any more.
          AdapterNotFound: the pattern id did not come from `new_pattern_id`.
          StoreUnwritable: the disk took no more.
        """
        check_draft(draft)
        contents = {
            "table": arrays.pack_table(draft.table),
            "state": arrays.pack(draft.solver_state),
        }
        if draft.gate is not None:
            contents["gate"] = arrays.pack_gate(draft.gate)
        with self._writing() as db:
            slot_id, number = rows.next_number(db, slot)
            if draft.parent != number - 1:
                raise StaleCandidate(
                    f"{slot}: the candidate was made from version {draft.parent}, live is "
                    f"{number - 1}; make it again from the live version"
                )
            rows.insert(db, slot_id, number, draft, contents)
            rows.compact(db, slot_id, newest=number, keep=self._keep_versions)
            version = _version(rows.numbered(db, slot, number), contents)
        return version

    def rollback(
        self, slot: SlotKey, to: int, *, report: Mapping[str, Any] | None = None
    ) -> Version:
        """Store a version with the content of version `to`; 0 is before anything was learned.

        Raises:
          AdapterNotFound: no such slot or version, or its arrays were compacted away.
          CandidateRejected: `to` is the live version.
          StaleCandidate: another version came in between; roll back again.
          SnapshotCorrupt, StoreUnwritable: as for `get` and `put`.
        """
        with self._reading() as db:
            live = rows.live(db, slot)
        if live is None:
            raise AdapterNotFound(f"{slot} has no versions; there is nothing to roll back")
        if to == live["number"]:
            raise CandidateRejected(f"{slot}: version {to} is live already; choose an older one")
        target = self.get(slot, to) if to else None
        return self.put(
            slot,
            VersionDraft(
                kind="rollback",
                parent=live["number"],
                restores=to,
                created=self._clock(),
                base_hash=live["base_hash"] if target is None else target.info.base_hash,
                feedback_seqs=() if target is None else target.info.feedback_seqs,
                table=empty_table(live["dim"]) if target is None else target.table,
                gate=None if target is None else target.gate,
                solver_state={} if target is None else self.solver_state(slot, to),
                report={} if report is None else report,
            ),
        )

    def live(self, slot: SlotKey, *, base_hash: str | None = None) -> Version | None:
        """The version to serve; None before the first. Raises as `get` does."""
        with self._reading() as db:
            row = rows.live(db, slot)
            return None if row is None else self._load(db, row, base_hash)

    def get(self, slot: SlotKey, number: int, *, base_hash: str | None = None) -> Version:
        """One version.

        Raises:
          AdapterNotFound: no such version, or its arrays were compacted away.
          IncompatibleAdapter: `base_hash` is given and it was learned on another base model.
          SnapshotCorrupt: its bytes differ from what was written.
        """
        with self._reading() as db:
            return self._load(db, rows.numbered(db, slot, number), base_hash)

    def solver_state(self, slot: SlotKey, number: int) -> dict[str, np.ndarray]:
        """What the solver left with a version. Raises as `get` does."""
        with self._reading() as db:
            row = rows.numbered(db, slot, number)
            contents = rows.parts(db, row, ("state",), base_hash=None, path=self._path)
        if "state" not in contents:
            raise _gone("state", rows.info_of(row), self._path)
        return arrays.unpack(contents["state"])

    def history(self, slot: SlotKey) -> tuple[VersionInfo, ...]:
        """Every version ever stored, by number; empty for an unknown slot."""
        with self._reading() as db:
            return tuple(rows.info_of(row) for row in rows.history(db, slot))

    def num_bytes(self, slot: SlotKey, number: int) -> int:
        """Bytes of a version's table on disk, without reading it; 0 once compacted."""
        with self._reading() as db:
            return rows.num_bytes(db, slot, number)

    def slots(self, tenant: str | None = None) -> tuple[SlotKey, ...]:
        """Slots that have a version, of one tenant or of all."""
        with self._reading() as db:
            return tuple(rows.slots(db, tenant))

    def all_live(self, base_hash: str) -> Iterator[Version | LoadFailure]:
        """Every slot's live version, one at a time.

        What cannot be served comes as a LoadFailure: one damaged or foreign adapter does not keep
        the others from being served.
        """
        with self._reading() as db:
            live = rows.all_live(db)
        for row in live:
            try:
                with self._reading() as db:
                    loaded: Version | LoadFailure = self._load(db, row, base_hash)
            except AdapterError as error:
                loaded = LoadFailure(slot=rows.slot_of(row), number=row["number"], error=error)
            yield loaded

    def close(self) -> None:
        """Wait for what is under way, then close. Idempotent; later calls raise AdapterError."""
        with self._write_lock, self._read_lock:
            self._is_closed = True
            self._drop_writer()
            self._reader.close()

    def __enter__(self) -> "AdapterStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, db: sqlite3.Connection, row: sqlite3.Row, base_hash: str | None) -> Version:
        contents = rows.parts(db, row, _SERVED, base_hash=base_hash, path=self._path)
        if "table" not in contents:
            raise _gone("table", rows.info_of(row), self._path)
        return _version(row, contents)

    @contextlib.contextmanager
    def _reading(self) -> Generator[sqlite3.Connection, None, None]:
        """The reading connection inside one read transaction."""
        with self._read_lock:
            self._check_open()
            try:
                self._reader.execute("BEGIN")
                yield self._reader
            except sqlite3.Error as error:
                raise database.translate(error, self._path) from error
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")

    @contextlib.contextmanager
    def _writing(self) -> Generator[sqlite3.Connection, None, None]:
        """The writing connection inside a transaction: committed at the end, else undone."""
        with self._write_lock:
            self._check_open()
            try:
                if self._writer is None:
                    self._writer = sqlite.connect(self._path)
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                self._drop_writer()  # closing rolls back; the next write opens a fresh one
                raise database.translate(error, self._path) from error
            finally:
                if self._writer is not None and self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def _check_open(self) -> None:
        if self._is_closed:
            raise AdapterError(f"{self._path} is closed; open the store again")

    def _drop_writer(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
            self._writer = None


def _version(row: sqlite3.Row, contents: Mapping[str, bytes]) -> Version:
    gate = contents.get("gate")
    return Version(
        info=rows.info_of(row),
        table=arrays.unpack_table(contents["table"]),
        gate=None if gate is None else arrays.unpack_gate(gate),
    )


def _gone(part: str, info: VersionInfo, path: Path) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        f"the {part} of {info.slot} version {info.number} is missing from {path}; roll the adapter "
        "back to another version, or restore the file from a backup"
    )
