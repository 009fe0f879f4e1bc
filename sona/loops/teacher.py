"""From one feedback to a served version: the steps of a lesson, and their undoing.

Only the learner thread calls this. A step either ends with a stored, served version and the
feedback's new state in the journal, or it raises and what served before goes on serving. A crash
between the two is mended by the next start: `InstantLoop` takes up what is still ACCEPTED, and
`mend` finishes a rollback.
"""

import contextlib
import time
from dataclasses import dataclass, replace

from adapters.errors import AdapterError, AdapterNotFound, CandidateRejected, StoreUnwritable
from adapters.store import SlotKey, Version, VersionInfo
from engine.api import CaptureResult
from sona.errors import FeedbackNotFound
from sona.events import EventBus
from sona.journal import (
    Correction,
    FeedbackRecord,
    FeedbackState,
    Journal,
    Positions,
    StateChange,
)
from sona.loops.lessons import as_batch, is_whole, scored_lesson
from sona.loops.patterns import Lesson, Patterns
from sona.loops.standing import moved, standing
from sona.metrics import Metrics
from sona.ports import Event, EventKind


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
        metrics: Metrics,
    ) -> None:
        self._journal, self.patterns, self._events = journal, patterns, events
        self._metrics = metrics
        self._owing: dict[SlotKey, None] = {}  # patterns whose sweeps are due, oldest first
        self.counts = LessonCounts()

    def mend(self, *, learns: bool) -> None:
        """Tell the journal what an earlier run stored and did not tell; take up what it owed."""
        for *older, newest in self.patterns.histories():
            self._agree(newest, older[-1] if older else None)
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
        targets = self.patterns.target_ids(record)
        positions = self._journal.positions(record.seq)
        if positions is None:
            return targets
        ends = is_whole(len(targets), len(positions))
        held = self.patterns.resumed(slot, record, is_whole=ends)  # an earlier run got this far
        if held is None:
            self._teach(slot, record, positions, is_whole=ends)
        elif ends:
            self._publish(held, record)
        return None if ends else targets

    def second_lesson(self, seq: int, result: CaptureResult) -> None:
        """Learn the positions that a teacher-forced pass made known. Raises as `first_lesson`."""
        record = self._journal.feedback_by_seq([seq])[0]
        if self._is_undone(record):
            return
        targets = self.patterns.target_ids(record)
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
            self._teach(slot, record, positions, is_whole=True)

    def settle(self, slot: SlotKey) -> None:
        """Pay off the sweeps that a large pattern owes."""
        lesson = self.patterns.settled(slot)
        if lesson is not None:
            self._publish(lesson, None)

    def undo(self, slot: SlotKey, reason: str) -> tuple[FeedbackRecord, ...]:
        """Take back the last feedback in force, the whole of it. Returns the feedback undone."""
        before = self._newest(slot)
        if not before.feedback_seqs:
            raise CandidateRejected(f"nothing is in force in {slot}; there is nothing to undo")
        return self._without(slot, max(before.feedback_seqs), reason)

    def _without(self, slot: SlotKey, seq: int, reason: str) -> tuple[FeedbackRecord, ...]:
        """Take one feedback out and leave the others as if it had never come.

        Where a version holds exactly the others, it is restored; else they are learned anew from
        the journal.
        """
        before = self._newest(slot)
        target = self.patterns.undo_target(slot, frozenset(before.feedback_seqs) - {seq})
        if target is not None:
            return self.roll_back(slot, target, reason)
        self.patterns.check_base(before.base_hash)
        version, _ = self.patterns.publish(self.patterns.without(slot, seq), reason=reason)
        return self._taken_back(slot, before, version)

    def roll_back(self, slot: SlotKey, to_version: int, reason: str) -> tuple[FeedbackRecord, ...]:
        """Serve an earlier version's content as a new version. Returns the feedback undone by it.

        Feedback that comes back into force, when a later version is restored, is LEARNED again.
        """
        before = self._newest(slot)
        return self._taken_back(slot, before, self.patterns.rolled_back(slot, to_version, reason))

    def _newest(self, slot: SlotKey) -> VersionInfo:
        newest = self.patterns.newest(slot)
        if newest is None:
            raise AdapterNotFound(f"no {slot}; ListAdapters names those that exist")
        return newest

    def _taken_back(
        self, slot: SlotKey, before: VersionInfo, version: Version
    ) -> tuple[FeedbackRecord, ...]:
        self._owing.pop(slot, None)
        self._agree(version.info, before)
        return self._journal.feedback_by_seq(
            set(before.feedback_seqs) - set(version.info.feedback_seqs)
        )

    def give_up(self, record: FeedbackRecord, state: FeedbackState, reason: str) -> None:
        """Keep the feedback, say why it is not learned, and do not try again."""
        change = StateChange(state=state, reason=reason, is_learnable=False)
        self._journal.set_state([record.seq], change).result()

    def reject(self, record: FeedbackRecord, reason: str) -> None:
        """Give up a feedback that can never be learned; what was learned of it is taken back."""
        record = self._journal.feedback_by_seq([record.seq])[0]
        slot = self.patterns.slot_of(record)
        newest = None if slot is None else self.patterns.newest(slot)
        if slot is not None and newest is not None and record.seq in newest.feedback_seqs:
            try:
                self._without(slot, record.seq, reason)
            except StoreUnwritable:
                raise
            except AdapterError as error:  # the others cannot be folded, or not be read
                reason = f"{reason}; what was learned of it still serves: {error}"
        self.give_up(record, FeedbackState.REJECTED, reason)
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
        self, slot: SlotKey, record: FeedbackRecord, positions: Positions, *, is_whole: bool
    ) -> None:
        """Solve, store, serve, and say so. The time between states and table is observed."""
        started = time.perf_counter()
        batch = as_batch(record.feedback_id, positions)
        lesson = self.patterns.taught(slot, record, batch, is_whole=is_whole)
        solved_s = time.perf_counter() - started
        handed_s = self._publish(lesson, record)
        step = "sweeps" if lesson.state.is_settled else "first"
        self._metrics.instant_update(step, solved_s + handed_s)

    def _publish(self, lesson: Lesson, record: FeedbackRecord | None) -> float:
        """Store and serve a lesson, of a feedback or of none; seconds spent outside the store."""
        before = self.patterns.newest(lesson.slot)
        version, handed_s = self.patterns.publish(lesson)
        self._published(version, record)
        if not lesson.state.is_settled:
            self._owing[lesson.slot] = None
        self._agree(version.info, before, record, lesson.report.conflicts_with)
        return handed_s

    def _agree(
        self,
        info: VersionInfo,
        before: VersionInfo | None,
        own: FeedbackRecord | None = None,
        conflicts: tuple[str, ...] = (),
    ) -> None:
        """Give feedback the state that a version means for it, where it was another before.

        `own` is the feedback that the version was made for, `conflicts` what that contradicted.
        """
        commits = []
        for record in self._touched(info, before, own):
            now = self._standing(record, info)
            is_own = own is not None and record.seq == own.seq
            if is_own or (record.state, record.reason) != (now.state, now.reason):
                change = replace(
                    now,
                    adapter=info.slot.adapter_name,
                    version=info.number,
                    pattern_id=info.slot.pattern_id,
                    conflicts_with=(conflicts or None) if is_own else None,
                )
                commits.append((record, now, self._journal.set_state([record.seq], change)))
        for record, now, commit in commits:
            commit.result()
            self._tell(record, info, now)

    def _tell(self, record: FeedbackRecord, info: VersionInfo, now: StateChange) -> None:
        """The event of a feedback's new state; one rolled back has its adapter's."""
        if now.state is FeedbackState.LEARNED:
            self._emit(record, EventKind.FEEDBACK_LEARNED, info)
        elif now.state is FeedbackState.ACCEPTED and now.reason:
            self._emit(record, EventKind.LEARNING_FAILED, info, now.reason)

    def _touched(
        self, info: VersionInfo, before: VersionInfo | None, own: FeedbackRecord | None
    ) -> list[FeedbackRecord]:
        """Feedback that came, went, or stands otherwise than before; and `own`."""
        seqs, names = moved(before, info)
        if own is not None:
            seqs.add(own.seq)
        records = {record.seq: record for record in self._journal.feedback_by_seq(seqs)}
        for name in names:
            with contextlib.suppress(FeedbackNotFound):  # removed in the meantime
                record = self._journal.feedback(info.slot.tenant, name)
                records[record.seq] = record
        return list(records.values())

    def _standing(self, record: FeedbackRecord, info: VersionInfo) -> StateChange:
        return standing(record, info, len(self.patterns.target_ids(record)))

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
        info: VersionInfo | None = None,
        reason: str = "",
    ) -> None:
        event = Event(
            time=time.time(), kind=kind, principal=record.principal,
            feedback_id=record.feedback_id,
            adapter="" if info is None else info.slot.adapter_name,
            version=0 if info is None else info.number,
            scope=None if info is None else info.slot.scope,
            reason=reason,
        )  # fmt: skip
        self._events.emit_threadsafe(record.tenant, event)
