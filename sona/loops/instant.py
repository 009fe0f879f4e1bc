"""The instant loop: from a committed correction to a served version, on one learner thread.

Per feedback, in commit order: a first lesson from the captured states, published at once; then,
for the rest of the answer or when the states are gone, a teacher-forced pass in the engine's slack
and a second lesson. Between lessons the thread pays off sweeps that large patterns still owe. A
step that fails is counted and logged; the versions that serve stay as they were.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from adapters.errors import AdapterError
from adapters.store import SlotKey, Version
from engine.api import Generator, ScoreResult
from sona.events import EventBus
from sona.journal import (
    Correction,
    FeedbackRecord,
    FeedbackState,
    Journal,
    Positions,
    StateChange,
)
from sona.loops.lessons import as_batch, scored_lesson
from sona.loops.patterns import Lesson, Patterns
from sona.metrics import Metrics
from sona.ports import Event, EventKind

log = logging.getLogger(__name__)
CorrectedIds = Callable[[FeedbackRecord], tuple[int, ...]]
_PENDING_PAGE = 100
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Scored:
    """A teacher-forced pass has ended."""

    record: FeedbackRecord
    result: ScoreResult | BaseException


@dataclass(frozen=True, slots=True)
class _Call:
    """Something to run on the learner thread for somebody who waits."""

    function: Callable[[], Any]
    future: "Future[Any]"


@dataclass(slots=True)
class InstantCounts:
    """Counters since start-up, written by the learner thread."""

    num_published: int = 0
    num_failed: int = 0
    last_publish: float | None = None  # unix seconds


class InstantLoop:
    """One thread that turns committed feedback into versions."""

    def __init__(
        self,
        journal: Journal,
        patterns: Patterns,
        generator: Generator,
        events: EventBus,
        target_ids: CorrectedIds,
        metrics: Metrics,
    ) -> None:
        self._journal, self._patterns = journal, patterns
        self._generator, self._events = generator, events
        self._target_ids, self._metrics = target_ids, metrics
        self._aio = asyncio.get_running_loop()
        self._inbox: queue.Queue[FeedbackRecord | _Scored | _Call | None] = queue.Queue()
        self._owing: dict[SlotKey, None] = {}  # patterns whose sweeps are due, oldest first
        self._scoring: set[asyncio.Future[ScoreResult]] = set()
        self._is_open = threading.Event()
        self._is_open.set()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self.counts = InstantCounts()
        self.pause_reason = ""

    def start(self, *, learns: bool) -> None:
        """Take up what an earlier run left unlearned, then what comes.

        Without `learns` the thread only runs what others ask of it: rollbacks.
        """
        after = 0
        while learns and (page := self._journal.pending(after, _PENDING_PAGE)):
            for record in page:
                self._inbox.put(record)
            after = page[-1].seq
        self._owing = dict.fromkeys(self._patterns.owing()) if learns else {}
        self._thread.start()

    def notify(self, record: FeedbackRecord) -> None:
        """A learnable feedback was committed."""
        self._inbox.put(record)

    def run(self, function: Callable[[], _T]) -> "Future[_T]":
        """Run something between two lessons, also while paused."""
        future: Future[_T] = Future()
        self._inbox.put(_Call(function, future))
        return future

    @property
    def is_running(self) -> bool:
        """False while paused."""
        return self._is_open.is_set()

    def pause(self, reason: str) -> None:
        """Learn nothing until `resume`; feedback waits."""
        self.pause_reason = reason
        self._metrics.learning_paused(True)
        self._is_open.clear()

    def resume(self) -> None:
        """Learn what waits, and go on."""
        self.pause_reason = ""
        self._metrics.learning_paused(False)
        self._is_open.set()
        self._inbox.put(_Call(lambda: None, Future()))  # wakes the thread

    def stop(self) -> None:
        """End after the lesson under way. What waits stays ACCEPTED and is taken up next time."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting: list[FeedbackRecord | _Scored] = []  # while paused
        while True:
            item = self._next(waiting)
            if item is None:
                return
            if isinstance(item, _Call):
                _answer(item)
            elif isinstance(item, SlotKey):
                self._guarded(lambda slot=item: self._settle(slot), None)
            elif not self._is_open.is_set():
                waiting.append(item)
            elif isinstance(item, _Scored):
                self._guarded(lambda scored=item: self._second_lesson(scored), item.record)
            else:
                self._guarded(lambda record=item: self._first_lesson(record), item)

    def _next(
        self, waiting: list[FeedbackRecord | _Scored]
    ) -> FeedbackRecord | _Scored | _Call | SlotKey | None:
        """What arrived first; with nothing waiting, a pattern that owes sweeps."""
        if waiting and self._is_open.is_set():
            return waiting.pop(0)
        if self._owing and self._is_open.is_set():
            try:
                return self._inbox.get_nowait()
            except queue.Empty:
                slot = next(iter(self._owing))
                del self._owing[slot]
                return slot
        return self._inbox.get()

    def _guarded(self, lesson: Callable[[], None], record: FeedbackRecord | None) -> None:
        """A failed step never touches serving: it is counted, logged, and the old version stays."""
        try:
            lesson()
        except AdapterError as error:
            self._failed()
            if record is None:
                log.warning("a pattern could not be settled: %s", error)
            else:
                self._give_up(record, FeedbackState.REJECTED, str(error))
        except Exception:
            self._failed()
            log.exception("a learning step failed; what was served before stays")
            if record is not None:
                self._emit(record, EventKind.LEARNING_FAILED, reason="internal error")

    def _failed(self) -> None:
        self.counts.num_failed += 1
        self._metrics.learning_step_failed()

    def _first_lesson(self, record: FeedbackRecord) -> None:
        """Learn from the captured states, then ask for those that are missing."""
        if self._is_undone(record):
            return
        if record.prompt_vector is None:
            self._give_up(record, FeedbackState.ACCEPTED, "the prompt's state was not kept")
            return
        is_correction = isinstance(record.signal, Correction)
        slot = self._patterns.slot_for(record, may_begin=is_correction)
        if slot is None:
            reason = "confirms an answer outside every pattern; there is nothing to hold"
            self._give_up(record, FeedbackState.ACCEPTED, reason)
            return
        targets = self._target_ids(record)
        positions = self._journal.positions(record.seq)
        if positions is not None:
            is_whole = set(range(len(targets))) <= set(positions.indices)
            held = self._patterns.resumed(slot, record)  # an earlier run got this far
            if held is None:
                self._teach(slot, record, positions, is_whole=is_whole)
            elif is_whole:
                self._publish(held, record, is_whole=True)
            if is_whole:
                return
        self._score(record, targets)

    def _score(self, record: FeedbackRecord, targets: tuple[int, ...]) -> None:
        """Teacher-force the right answer in the engine's slack; the result comes back here."""

        async def score() -> None:
            try:
                result = await self._generator.score(
                    f"learn/{record.seq}", record.prompt_ids, targets
                )
            except Exception as error:  # handed over: the learner thread decides
                self._inbox.put(_Scored(record, error))
            else:
                self._inbox.put(_Scored(record, result))

        asyncio.run_coroutine_threadsafe(score(), self._aio)

    def _second_lesson(self, scored: _Scored) -> None:
        """Learn the positions that a teacher-forced pass made known."""
        record = self._journal.feedback_by_seq([scored.record.seq])[0]
        if self._is_undone(record):
            return
        if isinstance(scored.result, BaseException):
            raise scored.result
        known = self._journal.positions(record.seq)
        positions = scored_lesson(
            self._target_ids(record),
            scored.result.capture,
            skip=() if known is None else known.indices,
            is_confirmation=not isinstance(record.signal, Correction),
        )
        assert positions is not None, "a pass was asked for although nothing was missing"
        stored = self._journal.add_positions(
            record.seq,
            positions,
            base_hash=record.base_hash,
            prompt_vector=scored.result.prompt_vector,
        )
        is_correction = isinstance(record.signal, Correction)
        slot = self._patterns.slot_for(record, may_begin=is_correction)
        if slot is None:
            reason = "confirms an answer outside every pattern; there is nothing to hold"
            self._give_up(record, FeedbackState.ACCEPTED, reason)
            return
        stored.result()
        self._teach(slot, record, positions, is_whole=True)

    def _teach(
        self, slot: SlotKey, record: FeedbackRecord, positions: Positions, *, is_whole: bool
    ) -> None:
        """Solve, store, serve, and say so. The time between states and table is observed."""
        started = time.perf_counter()
        lesson = self._patterns.taught(slot, record, as_batch(record.feedback_id, positions))
        solved_s = time.perf_counter() - started
        handed_s = self._publish(lesson, record, is_whole=is_whole)
        step = "sweeps" if lesson.state.is_settled else "first"
        self._metrics.instant_update(step, solved_s + handed_s)

    def _publish(self, lesson: Lesson, record: FeedbackRecord, *, is_whole: bool) -> float:
        """Store and serve a lesson of this feedback; the seconds spent outside the store."""
        version, handed_s = self._patterns.publish(lesson)
        self._published(version, record)
        if not lesson.state.is_settled:
            self._owing[lesson.slot] = None
        change = StateChange(
            state=FeedbackState.LEARNED if is_whole else FeedbackState.ACCEPTED,
            adapter=version.slot.adapter_name,
            version=version.number,
            conflicts_with=lesson.report.conflicts_with or None,
            pattern_id=version.slot.pattern_id,
        )
        self._journal.set_state([record.seq], change).result()
        if is_whole:
            self._emit(record, EventKind.FEEDBACK_LEARNED, version)
        return handed_s

    def _settle(self, slot: SlotKey) -> None:
        lesson = self._patterns.settled(slot)
        if lesson is not None:
            version, _ = self._patterns.publish(lesson)
            self._published(version, None)

    def _published(self, version: Version, record: FeedbackRecord | None) -> None:
        now = time.time()
        self.counts.num_published += 1
        self.counts.last_publish = now
        self._metrics.version_published(
            version.info.kind, None if record is None else now - record.created
        )
        event = Event(
            time=now,
            kind=EventKind.ADAPTER_PUBLISHED,
            principal=version.slot.owner,
            feedback_id="" if record is None else record.feedback_id,
            adapter=version.slot.adapter_name,
            version=version.number,
            scope=version.slot.scope,
        )
        self._events.emit_threadsafe(version.slot.tenant, event)

    def _is_undone(self, record: FeedbackRecord) -> bool:
        """Rolled back or removed while it waited."""
        found = self._journal.feedback_by_seq([record.seq])
        return not found or found[0].state is not FeedbackState.ACCEPTED

    def _give_up(self, record: FeedbackRecord, state: FeedbackState, reason: str) -> None:
        """Keep the feedback, say why it is not learned, and do not try again."""
        change = StateChange(state=state, reason=reason, is_learnable=False)
        self._journal.set_state([record.seq], change).result()
        if state is FeedbackState.REJECTED:
            self._emit(record, EventKind.FEEDBACK_REJECTED, reason=reason)

    def _emit(
        self,
        record: FeedbackRecord,
        kind: EventKind,
        version: Version | None = None,
        reason: str = "",
    ) -> None:
        event = Event(
            time=time.time(), kind=kind, principal=record.principal,
            feedback_id=record.feedback_id,
            adapter="" if version is None else version.slot.adapter_name,
            version=0 if version is None else version.number,
            scope=None if version is None else version.slot.scope,
            reason=reason,
        )  # fmt: skip
        self._events.emit_threadsafe(record.tenant, event)


def _answer(call: _Call) -> None:
    try:
        call.future.set_result(call.function())
    except Exception as error:
        call.future.set_exception(error)
