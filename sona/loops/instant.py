"""The instant loop: from a committed correction to a served version, on one learner thread.

Per feedback, in commit order: a first lesson from the captured states, published at once; then,
for the rest of the answer or when the states are gone, a teacher-forced pass in the engine's slack
and a second lesson. Between lessons the thread pays off sweeps that large patterns still owe. What
a lesson does is `sona.loops.teacher`; here is when it happens, and what a failure leads to:

  the disk is full, a queue is full    the feedback waits and is tried again
  the feedback cannot be learned       REJECTED, with the reason
  the answer is another model's        it stays ACCEPTED and waits for that model
  anything else                        a bug: logged and counted; the next start tries again
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from adapters.errors import AdapterError, IncompatibleAdapter, StoreUnwritable
from adapters.store import SlotKey
from engine.api import CaptureResult, Generator, Job
from engine.errors import EngineStopped, InvalidJob
from sona.errors import DiskFull, Overloaded, ShuttingDown
from sona.journal import FeedbackRecord, Journal
from sona.loops.teacher import Teacher
from sona.metrics import Metrics

log = logging.getLogger(__name__)
_PENDING_PAGE = 100
_MAX_SCORING = 4  # teacher-forced passes handed to the engine at once
_RETRY_S = 5.0
_PASSING = (DiskFull, StoreUnwritable, Overloaded)  # what may be over in a moment
_ENDING = (EngineStopped, ShuttingDown)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Pass:
    """A teacher-forced pass to be made."""

    record: FeedbackRecord
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Scored:
    """A teacher-forced pass has ended."""

    record: FeedbackRecord
    result: CaptureResult | BaseException


@dataclass(frozen=True, slots=True)
class _Call:
    """Something to run on the learner thread for somebody who waits."""

    function: Callable[[], Any]
    future: "Future[Any]"


class InstantLoop:
    """One thread that turns committed feedback into versions."""

    def __init__(
        self, journal: Journal, teacher: Teacher, generator: Generator, metrics: Metrics
    ) -> None:
        self._journal, self.teacher = journal, teacher
        self._generator, self._metrics = generator, metrics
        self._aio = asyncio.get_running_loop()
        self._inbox: queue.Queue[FeedbackRecord | _Scored | _Call | None] = queue.Queue()
        self._waiting: deque[FeedbackRecord | _Scored] = deque()  # while paused
        self._passes: deque[_Pass] = deque()  # not handed to the engine yet
        self._num_scoring = 0
        self._is_open = threading.Event()
        self._is_open.set()
        self._ending = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self._pause_reason = ""

    def start(self, *, learns: bool) -> None:
        """Take up what an earlier run left unlearned, then what comes.

        Without `learns` the thread only runs what others ask of it: rollbacks.
        """
        self.teacher.mend(learns=learns)
        after = 0
        while learns and (page := self._journal.pending(after, _PENDING_PAGE)):
            for record in page:
                self._inbox.put(record)
            after = page[-1].seq
        self._thread.start()

    def notify(self, record: FeedbackRecord) -> None:
        """A learnable feedback was committed."""
        self._inbox.put(record)

    def run(self, function: Callable[[], _T]) -> "Future[_T]":
        """Run something between two lessons, also while paused. Fails with ShuttingDown."""
        future: Future[_T] = Future()
        self._inbox.put(_Call(function, future))
        if self._is_stopped:  # asked last: a call put before the end is refused there
            self._refuse_calls()
        return future

    @property
    def is_running(self) -> bool:
        """False while paused, and once the thread has ended."""
        return self._is_open.is_set() and not self._is_stopped

    @property
    def why_not_running(self) -> str:
        """The operator's reason, or that the thread has ended."""
        if self._is_stopped:
            return "the learner has ended; the log says why: restart the server"
        return self._pause_reason

    def pause(self, reason: str) -> None:
        """Learn nothing until `resume` or the next start of the server; feedback waits."""
        self._pause_reason = reason
        self._metrics.learning_paused(True)
        self._is_open.clear()

    def resume(self) -> None:
        """Learn what waits, and go on."""
        self._pause_reason = ""
        self._metrics.learning_paused(False)
        self._is_open.set()
        self._inbox.put(_Call(lambda: None, Future()))  # wakes the thread

    def stop(self) -> None:
        """End after the lesson under way. What waits stays ACCEPTED and is taken up next time."""
        self._ending.set()
        self._inbox.put(None)  # wakes the thread
        self._thread.join()

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._take(item)
        except Exception:
            log.exception("the learner thread failed; nothing more will be learned")
        finally:
            self._is_stopped = True
            self._refuse_calls()

    def _take(self, item: FeedbackRecord | _Scored | _Call | SlotKey) -> None:
        if isinstance(item, _Call):
            _answer(item)
        elif isinstance(item, SlotKey):
            self._guarded(lambda: self.teacher.settle(item), None)
        elif isinstance(item, _Scored):
            self._num_scoring -= 1
            self._guarded(lambda: self._second_lesson(item), item.record)
            self._ask_for_passes()
        else:
            self._guarded(lambda: self._first_lesson(item), item)

    def _next(self) -> FeedbackRecord | _Scored | _Call | SlotKey | None:
        """What arrived first; with nothing waiting, a pattern that owes sweeps."""
        while not self._ending.is_set():
            if self._is_open.is_set():
                if self._waiting:
                    return self._waiting.popleft()
                if self._inbox.empty() and (slot := self.teacher.next_owing()) is not None:
                    return slot
            item = self._inbox.get()
            if item is None or isinstance(item, _Call):
                return item
            if self._is_open.is_set() and not self._waiting:
                return item
            self._waiting.append(item)  # behind those that came before it
        return None

    def _guarded(self, lesson: Callable[[], None], record: FeedbackRecord | None) -> None:
        """A failed step never touches serving; what it leads to is in the module's table."""
        try:
            lesson()
        except _ENDING:
            return
        except _PASSING as error:
            self._later(record, error)
        except IncompatibleAdapter as error:
            log.info("%s waits: %s", record.feedback_id if record else "a pattern", error)
        except (AdapterError, InvalidJob) as error:
            reason = str(error)
            self.teacher.failed(None, "")
            if record is None:
                log.warning("a pattern could not be settled: %s", error)
            else:
                self._reject(record, reason)
        except Exception:
            log.exception("a learning step failed; what was served before stays")
            self.teacher.failed(record, "internal error")

    def _reject(self, record: FeedbackRecord, reason: str) -> None:
        """Give a feedback up. What fails here is not given up a second time."""
        try:
            self.teacher.reject(record, reason)
        except _ENDING:
            return
        except _PASSING as error:
            self._later(record, error)
        except Exception:
            log.exception("feedback %s could not be given up", record.feedback_id)
            self.teacher.failed(record, "internal error")

    def _later(self, record: FeedbackRecord | None, error: Exception) -> None:
        """Try a feedback again from its beginning. Sweeps that failed come with the next lesson."""
        self.teacher.failed(record, f"{error}; it will be tried again")
        log.warning("a learning step failed and will be tried again: %s", error)
        if record is not None and not self._aio.is_closed():
            again = (_RETRY_S, self._inbox.put, record)
            self._aio.call_soon_threadsafe(self._aio.call_later, *again)

    def _first_lesson(self, record: FeedbackRecord) -> None:
        targets = self.teacher.first_lesson(record)
        if targets is not None:
            self._passes.append(_Pass(record, targets))
            self._ask_for_passes()

    def _second_lesson(self, scored: _Scored) -> None:
        if isinstance(scored.result, BaseException):
            raise scored.result
        self.teacher.second_lesson(scored.record.seq, scored.result)

    def _ask_for_passes(self) -> None:
        """Hand the engine a few passes at a time; the results come back through the inbox."""
        while self._passes and self._num_scoring < _MAX_SCORING and not self._aio.is_closed():
            self._num_scoring += 1
            asyncio.run_coroutine_threadsafe(self._score(self._passes.popleft()), self._aio)

    async def _score(self, asked: _Pass) -> None:
        """Teacher-force the right answer in the engine's slack."""
        record, name = asked.record, f"learn/{asked.record.seq}"
        try:
            job = Job(request_id=name, prompt_ids=record.prompt_ids, salt=(record.tenant, ""))
            result = await self._generator.capture(job, asked.targets)
        except Exception as error:  # handed over: the learner thread decides
            self._inbox.put(_Scored(record, error))
        else:
            self._inbox.put(_Scored(record, result))

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                if isinstance(item, _Call) and item.future.set_running_or_notify_cancel():
                    error = ShuttingDown("the server is closing; ask the next one")
                    item.future.set_exception(error)


def _answer(call: _Call) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        call.future.set_result(call.function())
    except Exception as error:
        call.future.set_exception(error)
