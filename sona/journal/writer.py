"""One thread, one connection, one commit for everything that is waiting.

    callers ── submit ──▶ bounded queue ──▶ BEGIN · call · call · call · COMMIT ──▶ their futures

A future resolves only after the commit that holds its call. While a commit waits for the disk the
next group gathers, so a busy disk sees few commits. Nothing waits on purpose but patient calls,
which nobody is waiting for: they gather until one that is not patient comes, or for `PATIENCE_S`.
"""

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sona.errors import JournalError, Overloaded, ShuttingDown

PATIENCE_S = 0.2
_GROUP_S = 0.005  # a transaction takes no more calls this long after it began
_REST_S = 0.1  # without a call: time to checkpoint
_JOIN_S = 30.0

# One call's own fault; the rest of its group is unharmed.
_OWN_FAULTS = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError)

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Call:
    operation: Callable[[sqlite3.Connection], Any]
    num_bytes: int
    is_patient: bool
    future: Future[Any]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a future will hear once the group is committed."""

    future: Future[Any]
    result: Any
    error: Exception | None

    def send(self) -> None:
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterCounts:
    """Counters since the start, and the queue now."""

    num_queued: int
    num_commits: int
    num_failed_commits: int
    num_committed_calls: int
    num_refused_calls: int
    commit_s: float


class Writer:
    """Owns the writing connection. `submit` is for any thread."""

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        translate: Callable[[sqlite3.Error], JournalError],
        *,
        max_queued: int,
        max_queued_bytes: int,
    ) -> None:
        self._connect = connect
        self._translate = translate
        self._max_queued = max_queued
        self._max_queued_bytes = max_queued_bytes
        self._connection: sqlite3.Connection | None = connect()
        # The condition guards the queue, its bytes, is_closed, is_gathering and num_refused.
        self._changed = threading.Condition()
        self._queue: deque[_Call] = deque()
        self._queued_bytes = 0
        self._is_closed = False
        self._is_gathering = False  # the thread waits for a call that is not patient
        self._num_refused = 0
        # Written by the thread alone; readers see each number whole.
        self._has_wal = False  # commits since the last checkpoint
        self._num_commits = 0
        self._num_failed = 0
        self._num_calls = 0
        self._commit_s = 0.0
        self._thread = threading.Thread(target=self._run, name="sona-journal", daemon=True)
        self._thread.start()

    def submit(
        self,
        operation: Callable[[sqlite3.Connection], T],
        *,
        num_bytes: int = 0,
        is_patient: bool = False,
    ) -> Future[T]:
        """Queue a call. It runs inside the writer's transaction, and only there.

        What it raises reaches the future, and its own writes are undone. Cancelling the future
        before the call has started withdraws it.

        Raises:
          Overloaded: the queue is full.
          ShuttingDown: after `close`.
        """
        call: _Call = _Call(operation, num_bytes, is_patient, Future())
        with self._changed:
            if self._is_closed:
                raise ShuttingDown("the journal is closed; send the call to the next server")
            if self._queue and not self._has_room(num_bytes):
                self._num_refused += 1
                raise Overloaded(
                    f"{len(self._queue)} calls of {self._queued_bytes} bytes wait for the "
                    f"journal's disk; at most {self._max_queued} calls or "
                    f"{self._max_queued_bytes} bytes may wait: retry in a moment"
                )
            self._queue.append(call)
            self._queued_bytes += num_bytes
            if not (is_patient and self._is_gathering and self._has_room(0)):
                self._is_gathering = False
                self._changed.notify()
        return call.future

    def counts(self) -> WriterCounts:
        """Counters now."""
        return WriterCounts(
            num_queued=len(self._queue),
            num_commits=self._num_commits,
            num_failed_commits=self._num_failed,
            num_committed_calls=self._num_calls,
            num_refused_calls=self._num_refused,
            commit_s=self._commit_s,
        )

    def close(self) -> None:
        """Refuse new calls, commit those that wait, end the thread. Idempotent."""
        with self._changed:
            self._is_closed, self._is_gathering = True, False
            self._changed.notify()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise JournalError(
                f"the journal's disk did not finish within {_JOIN_S:.0f} s; calls that were not "
                "acknowledged may be lost"
            )

    def _has_room(self, num_bytes: int) -> bool:
        fits = self._queued_bytes + num_bytes <= self._max_queued_bytes
        return fits and len(self._queue) < self._max_queued

    def _take(self, *, wait_s: float | None) -> _Call | None:
        """The next call; None when none came in time, or none ever will (wait_s=None: no limit)."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._is_closed, wait_s)
            if not self._queue:
                return None
            call = self._queue.popleft()
            self._queued_bytes -= call.num_bytes
            return call

    def _gather(self, call: _Call) -> None:
        """Wait for more to commit with a patient call; for an impatient one not at all."""
        with self._changed:
            is_idle = all(other.is_patient for other in self._queue) and not self._is_closed
            self._is_gathering = call.is_patient and is_idle
            self._changed.wait_for(lambda: not self._is_gathering, PATIENCE_S)
            self._is_gathering = False

    def _run(self) -> None:
        while True:
            call = self._take(wait_s=_REST_S if self._has_wal else None)
            if call is not None:
                self._gather(call)
                started = time.perf_counter()
                self._commit_group(call)
                self._commit_s += time.perf_counter() - started
            elif self._has_wal:
                self._checkpoint()
            else:
                break
        self._drop_connection()

    def _checkpoint(self) -> None:
        """Move the log into the database while nobody waits, so that a commit seldom has to."""
        self._has_wal = False
        try:
            self._open_connection().execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:  # the log stays, and with it all that was acknowledged
            log.warning("could not move the journal's log into its database: %s", error)

    def _commit_group(self, call: _Call | None) -> None:
        answers: list[_Answer] = []
        started: list[Future[Any]] = []  # everyone who must hear of a failed commit
        try:
            connection = self._open_connection()
            connection.execute("BEGIN IMMEDIATE")
            until = time.perf_counter() + _GROUP_S
            while call is not None:
                if call.future.set_running_or_notify_cancel():
                    started.append(call.future)
                    answers.append(self._apply(connection, call))
                # The clock is read after the call: one slow call is committed alone.
                call = self._take(wait_s=0) if time.perf_counter() < until else None
            connection.execute("COMMIT")
        except Exception as error:  # whatever it is, the thread lives and nobody waits forever
            if call is not None and not started and call.future.set_running_or_notify_cancel():
                started.append(call.future)  # BEGIN failed
            self._abandon(error, started)
        else:
            self._has_wal = True
            self._num_commits += 1
            self._num_calls += len(answers)
            for answer in answers:
                answer.send()

    def _apply(self, connection: sqlite3.Connection, call: _Call) -> _Answer:
        """Run one call in a savepoint of its own. Raises what breaks the whole transaction."""
        connection.execute("SAVEPOINT call")
        try:
            result = call.operation(connection)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not isinstance(error, _OWN_FAULTS):
                raise
            connection.execute("ROLLBACK TO call")
            connection.execute("RELEASE call")
            return _Answer(call.future, None, error)
        connection.execute("RELEASE call")
        return _Answer(call.future, result, None)

    def _abandon(self, error: Exception, started: list[Future[Any]]) -> None:
        """Undo the transaction and tell everyone in it. Later calls get a fresh connection."""
        self._num_failed += 1
        log.error("a commit of %d journal calls failed", len(started), exc_info=error)
        self._drop_connection()
        for future in started:
            if isinstance(error, sqlite3.Error):
                future.set_exception(self._translate(error))
            else:
                future.set_exception(
                    JournalError(f"the call was not stored ({error}); send it again")
                )

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _drop_connection(self) -> None:
        # Closing rolls back what is open; nothing acknowledged depends on it.
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
