"""The patterns being taught: solver states in memory, versions in the store, both per slot.

Only the learner thread touches this. A state that is not in memory is folded again from the
feedback that the live version holds; what is served is never recomputed, it is loaded.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from adapters import head
from adapters.base_rows import HeadRows
from adapters.batch import Batch
from adapters.errors import IncompatibleAdapter
from adapters.gate import Gate
from adapters.state import HeadState
from adapters.store import AdapterStore, SlotKey, Version, VersionDraft, VersionInfo
from adapters.table import TableLimits, TableReport, export
from sona.journal import FeedbackRecord, FeedbackState, Journal
from sona.loops.lessons import as_batch
from sona.routing import Routing

Seqs = tuple[int, ...]  # journal numbers of feedback
_MAX_STATES = 64  # solver states kept in memory
_SETTLED_AT_ONCE = 32  # edits up to which the sweeps run with the first step


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A pattern after a step, not stored yet."""

    slot: SlotKey
    state: HeadState
    gate: Gate
    report: head.SolveReport
    seqs: frozenset[int]  # feedback in force


class Patterns:
    """Owner of the solver states."""

    def __init__(
        self,
        store: AdapterStore,
        journal: Journal,
        routing: Routing,
        head_rows: HeadRows,
        limits: TableLimits,
        base_hash: str,
    ) -> None:
        self._store, self._journal, self._routing = store, journal, routing
        self._head_rows, self._limits, self._base_hash = head_rows, limits, base_hash
        self._states: OrderedDict[SlotKey, HeadState] = OrderedDict()

    def slot_for(self, record: FeedbackRecord, *, may_begin: bool) -> SlotKey | None:
        """The caller's pattern for this feedback; a new one when none fires and it may begin."""
        if record.pattern_id is not None:
            return _slot(record, record.pattern_id)
        assert record.prompt_vector is not None
        caller = (record.tenant, record.principal)
        live = self._routing.match(caller, record.prompt_vector)
        if live is not None:
            return _slot(record, live.slot.pattern_id)
        return _slot(record, self._store.new_pattern_id()) if may_begin else None

    def check_base(self, base_hash: str) -> None:
        """Raise IncompatibleAdapter when states of this base model mean nothing here."""
        if base_hash != self._base_hash:
            raise IncompatibleAdapter(
                f"the answer is of the base model {base_hash[:12]}, the one served is "
                f"{self._base_hash[:12]}; serve that model again to learn from it"
            )

    def taught(self, slot: SlotKey, record: FeedbackRecord, batch: Batch) -> Lesson:
        """The pattern with one batch more. Raises CandidateRejected; nothing changes then."""
        state = self._state(slot)
        step = head.learn if state.num_edits < _SETTLED_AT_ONCE else head.add
        state, report = step(state, batch, self._head_rows)
        seqs = self._seqs(slot) | {record.seq}
        return Lesson(slot, state, self._gate(slot, record), report, seqs)

    def resumed(self, slot: SlotKey, record: FeedbackRecord) -> Lesson | None:
        """The pattern as it is when it already holds this feedback; None when it does not."""
        live = self._routing.live(slot)
        if live is None or record.seq not in self._seqs(slot):
            return None
        state = self._state(slot)
        if record.feedback_id not in state.feedback_ids:
            return None
        state, report = head.settle(state)
        return Lesson(slot, state, live.gate, report, self._seqs(slot))

    def settled(self, slot: SlotKey) -> Lesson | None:
        """The pattern after the sweeps it still owes; None when it owes none."""
        live = self._routing.live(slot)
        if live is None:
            return None
        state, report = head.settle(self._state(slot))  # folded again after a restart: settled
        return Lesson(slot, state, live.gate, report, self._seqs(slot))

    def publish(self, lesson: Lesson) -> tuple[Version, float]:
        """Store, then serve. Returns the version and the seconds spent outside the store."""
        started = time.perf_counter()
        table, report = export(lesson.state, self._limits)
        newest = self._newest(lesson.slot)
        draft = VersionDraft(
            kind="edit" if report.is_exact else "truncate",
            parent=0 if newest is None else newest.number,
            created=time.time(),
            base_hash=self._base_hash,
            feedback_seqs=tuple(sorted(lesson.seqs)),
            table=table,
            gate=lesson.gate,
            report={**_figures(lesson.report, report), "owes_sweeps": not lesson.state.is_settled},
        )
        solved_s = time.perf_counter() - started
        version = self._store.put(lesson.slot, draft)
        started = time.perf_counter()
        self._routing.publish(version)
        self._keep(lesson.slot, lesson.state)
        return version, solved_s + time.perf_counter() - started

    def owing(self) -> list[SlotKey]:
        """Slots whose live version was published with sweeps still to be paid off."""
        live = self._routing.all_live()
        return [item.slot for item in live if item.info.report.get("owes_sweeps")]

    def rolled_back(
        self, slot: SlotKey, to_version: int, reason: str
    ) -> tuple[Version, Seqs, Seqs]:
        """Serve an earlier version's content as a new version; the feedback undone and redone."""
        before = self._seqs(slot)
        figures = {info.number: info.report for info in self._store.history(slot)}
        report = {**figures.get(to_version, {}), "owes_sweeps": False, "reason": reason}
        version = self._store.rollback(slot, to_version, report=report)
        if version.info.base_hash == self._base_hash:
            self._routing.publish(version)
        self._states.pop(slot, None)
        return version, *_moved(before, version.info)

    def last_rollbacks(self) -> list[tuple[VersionInfo, Seqs, Seqs]]:
        """Slots whose newest version is a rollback, with the feedback it undid and redid."""
        found = []
        for slot in self._store.slots():
            *older, newest = self._store.history(slot)
            if newest.restores is not None and older:
                found.append((newest, *_moved(frozenset(older[-1].feedback_seqs), newest)))
        return found

    def conflicts(self, slot: SlotKey, batch: Batch) -> tuple[str, ...]:
        """Ids of feedback that a batch would contradict. Changes nothing."""
        _, report = head.add(self._state(slot), batch, self._head_rows)
        return report.conflicts_with

    def _state(self, slot: SlotKey) -> HeadState:
        state = self._states.get(slot)
        if state is None:
            empty = HeadState.empty(self._routing.generic.metric)
            state = head.replay(empty, self._log(slot), self._head_rows)
            self._keep(slot, state)
        return state

    def _log(self, slot: SlotKey) -> Iterable[Batch]:
        """The batches of the feedback in force, oldest first."""
        seqs = self._seqs(slot)
        if not seqs:
            return
        states = (FeedbackState.LEARNED, FeedbackState.ACCEPTED)
        for item in self._journal.pattern_feedback(slot.pattern_id, states):
            if item.record.seq in seqs and item.positions is not None:
                yield as_batch(item.record.feedback_id, item.positions)

    def _keep(self, slot: SlotKey, state: HeadState) -> None:
        self._states[slot] = state
        self._states.move_to_end(slot)
        while len(self._states) > _MAX_STATES:
            self._states.popitem(last=False)

    def _newest(self, slot: SlotKey) -> VersionInfo | None:
        """The slot's newest version; only one that answers nothing has to be looked up."""
        live = self._routing.live(slot)
        if live is not None:
            return live.info
        history = self._store.history(slot)
        return history[-1] if history else None

    def _seqs(self, slot: SlotKey) -> frozenset[int]:
        """Feedback in force in the slot."""
        newest = self._newest(slot)
        return frozenset() if newest is None else frozenset(newest.feedback_seqs)

    def _gate(self, slot: SlotKey, record: FeedbackRecord) -> Gate:
        """The gate with this feedback's prompt, counted once per feedback."""
        generic, vector = self._routing.generic, record.prompt_vector
        assert vector is not None
        live = self._routing.live(slot)
        if live is None:
            return Gate.born(generic.unit(vector), generic)
        if record.seq in self._seqs(slot):
            return live.gate
        return live.gate.with_prompt(generic.unit(vector), generic)


def _moved(before: frozenset[int], after: VersionInfo) -> tuple[Seqs, Seqs]:
    now = set(after.feedback_seqs)
    return tuple(sorted(before - now)), tuple(sorted(now - before))


def _slot(record: FeedbackRecord, pattern_id: int) -> SlotKey:
    return SlotKey(
        tenant=record.tenant, scope="principal", owner=record.principal, pattern_id=pattern_id
    )


def _figures(solve: head.SolveReport, table: TableReport) -> dict[str, object]:
    """Figures on the pattern's own positions, for the version's row. No claim beyond them."""
    return {
        "num_edits": solve.num_edits,
        "num_constraints": solve.num_constraints,
        "num_failing": solve.num_failing,
        "lost": list(solve.lost),
        "form": table.form,
        "rank": table.rank,
        "num_rows": table.num_rows,
        "num_edits_kept": table.num_kept_after,
        "num_constraints_holding": table.num_holding_after,
    }
