"""The journal: requests and feedback on disk, acknowledged only after their commit."""

import contextlib
import functools
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from adapters.store import sqlite
from sona.errors import (
    FeedbackNotFound,
    Overloaded,
    RequestNotFound,
    ShuttingDown,
)
from sona.journal import codec, reads, schema, writes
from sona.journal.records import (
    FeedbackDraft,
    FeedbackOutcome,
    FeedbackRecord,
    FeedbackState,
    JournalCounts,
    PatternFeedback,
    Positions,
    RequestRecord,
    StateChange,
)
from sona.journal.writer import Writer

_NUM_READERS = 4
_READER_WAIT_S = 5.0
_SOLVED_STATES = (FeedbackState.ACCEPTED, FeedbackState.LEARNED)


class Journal:
    """Owns journal.db. Every method is for any thread.

    Methods that write return at once with a future that resolves after the commit (in asyncio:
    `await asyncio.wrap_future(...)`), or raise Overloaded or ShuttingDown. A future may carry,
    beside what its method names, DiskFull, JournalCorrupt or another JournalError. Calls are
    applied in the order of submission.
    """

    def __init__(
        self,
        path: Path,
        *,
        retention_s: float = 86_400.0,  # of requests
        max_queued: int = 1_024,  # calls
        max_queued_bytes: int = 64 * 2**20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the journal.

        Raises:
          JournalCorrupt, DiskFull, JournalError: the file cannot be used.
        """
        self._path = path
        self._retention_s = retention_s
        self._clock = clock
        schema.create(path)
        self._translate = functools.partial(schema.translate, path=path)
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        try:
            for _ in range(_NUM_READERS):
                self._readers.put(sqlite.connect(path, is_reader=True))
            self._writer = Writer(
                functools.partial(sqlite.connect, path),
                self._translate,
                max_queued=max_queued,
                max_queued_bytes=max_queued_bytes,
            )
        except sqlite3.Error as error:
            while not self._readers.empty():
                self._readers.get().close()
            raise self._translate(error) from error
        # Requests on their way to the disk: an answer's feedback may overtake its commit.
        self._arriving_lock = threading.Lock()
        self._arriving: dict[tuple[str, str], RequestRecord] = {}
        self._is_closed = False

    def record_request(self, request: RequestRecord) -> Future[None]:
        """Store a request, with the next feedback or soon. `request` finds it from now on.

        The future raises RequestExists. Requests sent with learn=false are not given to the
        journal at all.
        """
        key = (request.tenant, request.request_id)
        with self._arriving_lock:
            self._arriving.setdefault(key, request)
        try:
            future = self._writer.submit(
                lambda db: writes.insert_request(db, request, oldest=self._oldest()),
                num_bytes=_request_bytes(request),
                is_patient=True,
            )
        except (Overloaded, ShuttingDown):
            self._arrived(key, request)
            raise
        future.add_done_callback(lambda _: self._arrived(key, request))
        return future

    def request(self, tenant: str, request_id: str) -> RequestRecord:
        """A request within retention. Raises RequestNotFound."""
        # In this order: a request leaves `_arriving` only after its commit. What is on disk wins,
        # because an arriving one may turn out to reuse its id.
        with self._arriving_lock:
            arriving = self._arriving.get((tenant, request_id))
        with self._reader() as db:
            found = reads.find_request(db, tenant, request_id, oldest=self._oldest()) or arriving
        if found is None:
            raise RequestNotFound(writes.missing_request(request_id))
        return found

    def has_request(self, tenant: str, request_id: str) -> bool:
        """Whether the tenant has used this request_id within retention."""
        with self._arriving_lock:
            if (tenant, request_id) in self._arriving:
                return True
        with self._reader() as db:
            return reads.has_request(db, tenant, request_id, oldest=self._oldest())

    def add_feedback(
        self, draft: FeedbackDraft, positions: Positions | None = None
    ) -> Future[FeedbackOutcome]:
        """Store a feedback, what it needs of its request, and captured positions, all or nothing.

        The future raises FeedbackConflict, RequestNotFound, ForeignRequest, or InvalidRequest for
        a choice that the request does not have. The same id and content again changes nothing and
        yields the present state as a duplicate.
        """
        rows = [] if positions is None else codec.pack_positions(positions)
        _, payload = codec.dump_signal(draft.signal)
        return self._writer.submit(
            lambda db: writes.insert_feedback(db, draft, rows, oldest=self._oldest()),
            num_bytes=_num_bytes(rows) + len(payload) + len(draft.comment),
        )

    def add_positions(
        self,
        seq: int,
        positions: Positions,
        *,
        base_hash: str,
        prompt_vector: np.ndarray | None = None,
    ) -> Future[None]:
        """Add positions captured later on `base_hash`; one with the same index is renewed.

        Positions captured on another base model are dropped. The future raises FeedbackNotFound.
        """
        rows = codec.pack_positions(positions)
        return self._writer.submit(
            lambda db: writes.put_positions(
                db, seq, rows, base_hash=base_hash, prompt_vector=prompt_vector
            ),
            num_bytes=_num_bytes(rows),
        )

    def set_state(self, seqs: Iterable[int], change: StateChange) -> Future[int]:
        """Change feedback that is there and not REMOVED; the future has their number."""
        assert change.state is not FeedbackState.REMOVED, "only `remove` also erases the content"
        wanted = tuple(seqs)
        return self._writer.submit(lambda db: writes.change_state(db, wanted, change))

    def remove(self, seqs: Iterable[int], *, reason: str) -> Future[int]:
        """Erase content and positions for good; the future has the number of feedback removed.

        The id, the content's hash and the state REMOVED stay, so a retry is not taken as new.
        """
        wanted = tuple(seqs)
        return self._writer.submit(lambda db: writes.remove_feedback(db, wanted, reason))

    def purge(self, now: float | None = None, *, limit: int = 1_000) -> Future[int]:
        """Delete expired requests, at most `limit`; call again while the number equals it."""
        oldest = (self._clock() if now is None else now) - self._retention_s
        return self._writer.submit(lambda db: writes.purge_requests(db, oldest=oldest, limit=limit))

    def feedback(self, tenant: str, feedback_id: str) -> FeedbackRecord:
        """One feedback by the client's id. Raises FeedbackNotFound."""
        with self._reader() as db:
            record = reads.find_feedback(db, tenant, feedback_id)
        if record is None:
            raise FeedbackNotFound(
                f"no feedback {feedback_id!r}; give the feedback_id of an accepted submission"
            )
        return record

    def feedback_by_seq(self, seqs: Iterable[int]) -> tuple[FeedbackRecord, ...]:
        """Those that exist, by rising seq."""
        with self._reader() as db:
            return tuple(reads.feedback_by_seq(db, seqs))

    def pending(self, after_seq: int = 0, limit: int = 100) -> tuple[FeedbackRecord, ...]:
        """Learnable ACCEPTED feedback after the cursor, by rising seq.

        Seqs rise in commit order: what is committed after this call comes after the cursor.
        """
        with self._reader() as db:
            return tuple(reads.pending(db, after_seq, limit))

    def pattern_feedback(
        self, pattern_id: int, states: Iterable[FeedbackState] = _SOLVED_STATES
    ) -> tuple[PatternFeedback, ...]:
        """A pattern's feedback in these states with positions, by rising seq, of one moment."""
        with self._reader() as db:
            return tuple(reads.of_pattern(db, pattern_id, states))

    def positions(self, seq: int) -> Positions | None:
        """A feedback's positions by rising index; None when it has none."""
        with self._reader() as db:
            return reads.positions(db, seq)

    def counts(self) -> JournalCounts:
        """What the journal holds and has done."""
        with self._reader() as db:
            num_requests, num_feedback, num_pending = reads.counts(db)
        writer = self._writer.counts()
        return JournalCounts(
            num_requests=num_requests,
            num_feedback=num_feedback,
            num_pending=num_pending,
            num_queued=writer.num_queued,
            num_commits=writer.num_commits,
            num_failed_commits=writer.num_failed_commits,
            num_committed_calls=writer.num_committed_calls,
            num_refused_calls=writer.num_refused_calls,
            commit_s=writer.commit_s,
            file_bytes=sum(_file_bytes(f"{self._path}{suffix}") for suffix in ("", "-wal")),
        )

    def close(self) -> None:
        """Commit what waits, then close. Idempotent; later calls raise ShuttingDown."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._writer.close()
        finally:
            with contextlib.suppress(queue.Empty):  # a read that hangs keeps its connection
                for _ in range(_NUM_READERS):
                    self._readers.get(timeout=_READER_WAIT_S).close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _oldest(self) -> float:
        return self._clock() - self._retention_s

    def _arrived(self, key: tuple[str, str], request: RequestRecord) -> None:
        with self._arriving_lock:
            if self._arriving.get(key) is request:
                del self._arriving[key]

    @contextlib.contextmanager
    def _reader(self) -> Generator[sqlite3.Connection, None, None]:
        """A connection inside one read transaction, so several queries see one moment."""
        if self._is_closed:
            raise ShuttingDown("the journal is closed; ask the next server")
        try:
            connection = self._readers.get(timeout=_READER_WAIT_S)
        except queue.Empty:
            raise Overloaded(
                f"{_NUM_READERS} readers of the journal were busy for {_READER_WAIT_S:.0f} s; "
                "retry in a moment"
            ) from None
        try:
            connection.execute("BEGIN")
            yield connection
        except sqlite3.Error as error:
            raise self._translate(error) from error
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._readers.put(connection)


def _request_bytes(request: RequestRecord) -> int:
    ids = len(request.prompt_ids) + sum(len(choice.token_ids) for choice in request.choices)
    text = len(request.prompt_text or "") + sum(len(choice.text) for choice in request.choices)
    vector = 0 if request.prompt_vector is None else request.prompt_vector.nbytes
    return 4 * ids + text + vector


def _num_bytes(rows: list[codec.PositionRow]) -> int:
    return sum(len(row[-1]) for row in rows)


def _file_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
