"""From one feedback to a served version: the steps of a lesson, and their undoing.

Only the learner thread calls this. A step either ends with a stored, served version and the
feedback's new state in the journal, or it raises and what served before goes on serving. A crash
between the two is mended by the next start: `InstantLoop` takes up what is still ACCEPTED, and
`mend` finishes a rollback.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from adapters.store import SlotKey, Version, VersionInfo
from engine.api import ScoreResult
from sona.events import EventBus
from sona.journal import (
    Correction,
    FeedbackRecord,
    FeedbackState,
    Journal,
    Positions,
    StateChange,
)
from sona.loops.lessons import MAX_POSITIONS, as_batch, is_whole, scored_lesson
from sona.loops.patterns import Lesson, Patterns
from sona.metrics import Metrics
from sona.ports import Event, EventKind

_NOT_HELD = "in force in part: the model cannot tell some of its tokens from others that must stay"
CorrectedIds = Callable[[FeedbackRecord], tuple[int, ...]]


@dataclass(slots=True)
class LessonCounts:
    """Counters since start-up, written by the learner thread."""

    num_published: int = 0
    num_failed: int = 0
    last_publish: float | None = None  # unix seconds


class Teacher:
    """Teaches patterns from feedback and tells the journal, the metrics and the watchers."""

    def __init__(
        self,
        journal: Journal,
        patterns: Patterns,
        events: EventBus,
        target_ids: CorrectedIds,
        metrics: Metrics,
    ) -> None:
        self._journal, self.patterns, self._events = journal, patterns, events
        self._target_ids, self._metrics = target_ids, metrics
        self._owing: dict[SlotKey, None] = {}  # patterns whose sweeps are due, oldest first
        self.counts = LessonCounts()

    def mend(self, *, learns: bool) -> None:
        """Finish a rollback that an earlier run began; take up sweeps it left owing."""
        for version, undone, redone in self.patterns.last_rollbacks():
            self._tell_undone(version, undone, redone, str(version.report.get("reason", "")))
        self._owing = dict.fromkeys(self.patterns.owing() if learns else ())

    def next_owing(self) -> SlotKey | None:
        """A pattern that owes sweeps, taken off the list."""
        if not self._owing:
            return None
        slot = next(iter(self._owing))
        del self._owing[slot]
        return slot

    def first_lesson(self, record: FeedbackRecord) -> tuple[int, ...] | None:
        """Learn from the captured states. Returns the tokens to teacher-force when some are left.

        Raises AdapterError and JournalError; IncompatibleAdapter for an answer of another model.
        """
        if self._is_undone(record):
            return None
        self.patterns.check_base(record.base_hash)
        if record.prompt_vector is None:
            self.give_up(record, FeedbackState.ACCEPTED, "the prompt's state was not kept")
            return None
        slot = self._slot(record)
        if slot is None:
            return None
        targets = self._target_ids(record)
        positions = self._journal.positions(record.seq)
        if positions is None:
            return targets
        ends = is_whole(len(targets), len(positions))
        held = self.patterns.resumed(slot, record)  # an earlier run got this far
        if held is None:
            self._teach(slot, record, positions, len(targets) if ends else None)
        elif ends:
            self._publish(held, record, len(targets))
        return None if ends else targets

    def second_lesson(self, seq: int, result: ScoreResult) -> None:
        """Learn the positions that a teacher-forced pass made known. Raises as `first_lesson`."""
        record = self._journal.feedback_by_seq([seq])[0]
        if self._is_undone(record):
            return
        targets = self._target_ids(record)
        known = self._journal.positions(seq)
        positions = scored_lesson(
            targets,
            result.capture,
            skip=() if known is None else known.indices,
            is_confirmation=not isinstance(record.signal, Correction),
        )
        if positions is None:  # an earlier pass stored them before a crash
            self.first_lesson(record)
            return
        self._journal.add_positions(
            seq, positions, base_hash=record.base_hash, prompt_vector=result.prompt_vector
        ).result()
        slot = self._slot(record)
        if slot is not None:
            self._teach(slot, record, positions, len(targets))

    def settle(self, slot: SlotKey) -> None:
        """Pay off the sweeps that a large pattern owes."""
        lesson = self.patterns.settled(slot)
        if lesson is not None:
            version, _ = self.patterns.publish(lesson)
            self._published(version, None)

    def roll_back(self, slot: SlotKey, to_version: int, reason: str) -> tuple[FeedbackRecord, ...]:
        """Serve an earlier version's content as a new version. Returns the feedback undone by it.

        Feedback that comes back into force, when a later version is restored, is LEARNED again.
        """
        version, undone, redone = self.patterns.rolled_back(slot, to_version, reason)
        self._owing.pop(slot, None)
        self._tell_undone(version.info, undone, redone, reason)
        return self._journal.feedback_by_seq(undone)

    def give_up(self, record: FeedbackRecord, state: FeedbackState, reason: str) -> None:
        """Keep the feedback, say why it is not learned, and do not try again."""
        change = StateChange(state=state, reason=reason, is_learnable=False)
        self._journal.set_state([record.seq], change).result()
        if state is FeedbackState.REJECTED:
            self._emit(record, EventKind.FEEDBACK_REJECTED, reason=reason)

    def failed(self, record: FeedbackRecord | None, reason: str) -> None:
        """Count a step that came to nothing, and say so to who watches."""
        self.counts.num_failed += 1
        self._metrics.learning_step_failed()
        if record is not None:
            self._emit(record, EventKind.LEARNING_FAILED, reason=reason)

    def _slot(self, record: FeedbackRecord) -> SlotKey | None:
        """The pattern to teach; a confirmation outside every pattern has none and is kept."""
        is_correction = isinstance(record.signal, Correction)
        slot = self.patterns.slot_for(record, may_begin=is_correction)
        if slot is None:
            reason = "confirms an answer outside every pattern; there is nothing to hold"
            self.give_up(record, FeedbackState.ACCEPTED, reason)
        return slot

    def _teach(
        self, slot: SlotKey, record: FeedbackRecord, positions: Positions, num_targets: int | None
    ) -> None:
        """Solve, store, serve, and say so. The time between states and table is observed."""
        started = time.perf_counter()
        lesson = self.patterns.taught(slot, record, as_batch(record.feedback_id, positions))
        solved_s = time.perf_counter() - started
        handed_s = self._publish(lesson, record, num_targets)
        step = "sweeps" if lesson.state.is_settled else "first"
        self._metrics.instant_update(step, solved_s + handed_s)

    def _publish(self, lesson: Lesson, record: FeedbackRecord, num_targets: int | None) -> float:
        """Store and serve a lesson; the seconds spent outside the store.

        `num_targets` is the length of the right answer once all of it is learned, else None.
        """
        version, handed_s = self.patterns.publish(lesson)
        self._published(version, record)
        if not lesson.state.is_settled:
            self._owing[lesson.slot] = None
        is_held = record.feedback_id not in lesson.report.lost
        is_learned = is_held and num_targets is not None
        change = StateChange(
            state=FeedbackState.LEARNED if is_learned else FeedbackState.ACCEPTED,
            adapter=version.slot.adapter_name,
            version=version.number,
            reason="" if num_targets is None else _reservation(num_targets, is_held=is_held),
            conflicts_with=lesson.report.conflicts_with or None,
            pattern_id=version.slot.pattern_id,
            is_learnable=None if num_targets is None or is_held else False,
        )
        self._journal.set_state([record.seq], change).result()
        if is_learned:
            self._emit(record, EventKind.FEEDBACK_LEARNED, version)
        return handed_s

    def _tell_undone(
        self, info: VersionInfo, undone: tuple[int, ...], redone: tuple[int, ...], reason: str
    ) -> None:
        """Give feedback the state that a rollback means for it, where it has another one."""
        why = reason or f"rolled back to version {info.restores}"
        lost = info.report.get("lost", ())
        commits = []
        for record in self._journal.feedback_by_seq((*undone, *redone)):
            state, text = FeedbackState.LEARNED, ""
            if record.seq in undone:
                state, text = FeedbackState.ROLLED_BACK, why
            elif record.feedback_id in lost:
                state, text = FeedbackState.ACCEPTED, _NOT_HELD
            if record.state is not state:
                change = StateChange(
                    state=state, adapter=info.slot.adapter_name, version=info.number, reason=text
                )
                commits.append(self._journal.set_state([record.seq], change))
        for commit in commits:
            commit.result()

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
        """Learned, rolled back or removed while it waited."""
        found = self._journal.feedback_by_seq([record.seq])
        return not found or found[0].state is not FeedbackState.ACCEPTED

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


def _reservation(num_targets: int, *, is_held: bool) -> str:
    """What has to be said of a feedback that is in force, if anything."""
    if not is_held:
        return _NOT_HELD
    if num_targets <= MAX_POSITIONS:
        return ""
    return (
        f"{MAX_POSITIONS} of {num_targets} tokens are learned, the wrong and uncertain ones first"
    )
