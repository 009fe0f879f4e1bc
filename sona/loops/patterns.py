"""The patterns being taught: solver states in memory, versions in the store, both per slot.

Only the learner thread touches this. A state that is not in memory is folded again from the
feedback that the live version holds; what is served is never recomputed, it is loaded.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
from sona.loops.lessons import as_batch, is_whole
from sona.routing import Routing

TargetIds = Callable[[FeedbackRecord], tuple[int, ...]]
"""The tokens that a feedback wants to hear."""
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
    partial: frozenset[str]  # ids of feedback of which only a beginning is learned yet


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A solver state in memory, and the ids of feedback of which it holds a beginning only."""

    state: HeadState
    partial: frozenset[str]


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
        target_ids: TargetIds,
    ) -> None:
        self._store, self._journal, self._routing = store, journal, routing
        self._head_rows, self._limits, self._base_hash = head_rows, limits, base_hash
        self.target_ids = target_ids
        self._held: OrderedDict[SlotKey, _Held] = OrderedDict()

    def slot_for(self, record: FeedbackRecord, *, may_begin: bool) -> SlotKey | None:
        """The caller's pattern for this feedback; a new one when none fires and it may begin."""
        known = self.slot_of(record)
        if known is not None:
            return known
        assert record.prompt_vector is not None
        caller = (record.tenant, record.principal)
        live = self._routing.match(caller, record.prompt_vector)
        if live is not None:
            return _slot(record, live.slot.pattern_id)
        return _slot(record, self._store.new_pattern_id()) if may_begin else None

    def slot_of(self, record: FeedbackRecord) -> SlotKey | None:
        """The pattern that a feedback was given to; None before that."""
        return None if record.pattern_id is None else _slot(record, record.pattern_id)

    def check_base(self, base_hash: str) -> None:
        """Raise IncompatibleAdapter when states of this base model mean nothing here."""
        if base_hash != self._base_hash:
            raise IncompatibleAdapter(
                f"the answer came from other weights below the head ({base_hash[:12]}) than the "
                f"ones that learn ({self._base_hash[:12]}): a LoRA shaped it, or another base "
                "model was served; it is kept"
            )

    def taught(
        self, slot: SlotKey, record: FeedbackRecord, batch: Batch, *, is_whole: bool
    ) -> Lesson:
        """The pattern with one batch more. Raises CandidateRejected; nothing changes then."""
        held = self._state(slot)
        step = head.learn if held.state.num_edits < _SETTLED_AT_ONCE else head.add
        state, report = step(held.state, batch, self._head_rows)
        own = frozenset({record.feedback_id})
        partial = held.partial - own if is_whole else held.partial | own
        seqs = self._seqs(slot) | {record.seq}
        return Lesson(slot, state, self._gate(slot, record), report, seqs, partial)

    def resumed(self, slot: SlotKey, record: FeedbackRecord, *, is_whole: bool) -> Lesson | None:
        """The pattern as it is when it already holds this feedback; None when it does not.

        `is_whole`: the journal has all positions of it. A state that has its beginning only is
        folded again then: the rest was stored, and learning it failed.
        """
        live = self._routing.live(slot)
        if live is None or record.seq not in self._seqs(slot):
            return None
        held = self._state(slot)
        if record.feedback_id not in held.state.feedback_ids:
            return None
        if is_whole and record.feedback_id in held.partial:
            held = self._folded(slot, self._seqs(slot))
        return self._settled(slot, held, live.gate)

    def settled(self, slot: SlotKey) -> Lesson | None:
        """The pattern after the sweeps it still owes; None when it owes none."""
        live = self._routing.live(slot)
        if live is None:
            return None
        return self._settled(slot, self._state(slot), live.gate)

    def without(self, slot: SlotKey, seq: int) -> Lesson:
        """The pattern as if one of its feedbacks had never come: what is left is folded again."""
        seqs = self._seqs(slot) - {seq}
        held = self._folded(slot, seqs)
        vectors = [record.prompt_vector for record in self._journal.feedback_by_seq(seqs)]
        generic = self._routing.generic
        units = [generic.unit(vector) for vector in vectors if vector is not None]
        gate = Gate.born(units[0], generic)
        for unit in units[1:]:
            gate = gate.with_prompt(unit, generic)
        state, report = head.settle(held.state)
        return Lesson(slot, state, gate, report, seqs, held.partial)

    def _settled(self, slot: SlotKey, held: "_Held", gate: Gate) -> Lesson:
        state, report = head.settle(held.state)  # folded again after a restart: settled
        return Lesson(slot, state, gate, report, self._seqs(slot), held.partial)

    def publish(self, lesson: Lesson, *, reason: str = "") -> tuple[Version, float]:
        """Store, then serve. Returns the version and the seconds spent outside the store."""
        started = time.perf_counter()
        table, report = export(lesson.state, self._limits)
        newest = self.newest(lesson.slot)
        figures = {
            **_figures(lesson.report, report),
            "owes_sweeps": not lesson.state.is_settled,
            "partial": sorted(lesson.partial),
            "reason": reason,
        }
        draft = VersionDraft(
            kind="edit" if report.is_exact else "truncate",
            parent=0 if newest is None else newest.number,
            created=time.time(),
            base_hash=self._base_hash,
            feedback_seqs=tuple(sorted(lesson.seqs)),
            table=table,
            gate=lesson.gate,
            report=figures,
        )
        solved_s = time.perf_counter() - started
        version = self._store.put(lesson.slot, draft)
        started = time.perf_counter()
        self._routing.publish(version)
        self._keep(lesson.slot, _Held(lesson.state, lesson.partial))
        return version, solved_s + time.perf_counter() - started

    def owing(self) -> list[SlotKey]:
        """Slots whose live version was published with sweeps still to be paid off."""
        live = self._routing.all_live()
        return [item.slot for item in live if item.info.report.get("owes_sweeps")]

    def rolled_back(self, slot: SlotKey, to_version: int, reason: str) -> Version:
        """Serve an earlier version's content as a new version."""
        figures = {info.number: info.report for info in self._store.history(slot)}
        report = {**figures.get(to_version, {}), "owes_sweeps": False, "reason": reason}
        version = self._store.rollback(slot, to_version, report=report)
        if version.info.base_hash == self._base_hash:
            self._routing.publish(version)
        self._held.pop(slot, None)
        return version

    def histories(self) -> Iterator[tuple[VersionInfo, ...]]:
        """The versions of every slot, oldest first."""
        return (self._store.history(slot) for slot in self._store.slots())

    def undo_target(self, slot: SlotKey, seqs: frozenset[int]) -> int | None:
        """The newest version that holds these feedbacks, each of them whole, and no other."""
        if not seqs:
            return 0
        for info in reversed(self._store.history(slot)):
            is_whole = info.has_arrays and not info.report.get("partial")
            if is_whole and info.base_hash == self._base_hash and seqs == set(info.feedback_seqs):
                return info.number
        return None

    def conflicts(self, slot: SlotKey, batch: Batch) -> tuple[str, ...]:
        """Ids of feedback that a batch would contradict. Changes nothing."""
        _, report = head.add(self._state(slot).state, batch, self._head_rows)
        return report.conflicts_with

    def _state(self, slot: SlotKey) -> "_Held":
        held = self._held.get(slot)
        if held is None:
            held = self._folded(slot, self._seqs(slot))
            self._keep(slot, held)
        return held

    def _folded(self, slot: SlotKey, seqs: frozenset[int]) -> "_Held":
        """Learned anew from the journal, oldest feedback first."""
        state = HeadState.empty(self._routing.generic.metric)
        partial: set[str] = set()
        if not seqs:
            return _Held(state, frozenset())
        states = (FeedbackState.LEARNED, FeedbackState.ACCEPTED)
        for item in self._journal.pattern_feedback(slot.pattern_id, states):
            record, positions = item.record, item.positions
            if record.seq in seqs and positions is not None:
                batch = as_batch(record.feedback_id, positions)
                state, _ = head.learn(state, batch, self._head_rows)
                if not is_whole(len(self.target_ids(record)), len(positions)):
                    partial.add(record.feedback_id)
        return _Held(state, frozenset(partial))

    def _keep(self, slot: SlotKey, held: "_Held") -> None:
        self._held[slot] = held
        self._held.move_to_end(slot)
        while len(self._held) > _MAX_STATES:
            self._held.popitem(last=False)

    def newest(self, slot: SlotKey) -> VersionInfo | None:
        """The slot's newest version; only one that answers nothing has to be looked up."""
        live = self._routing.live(slot)
        if live is not None:
            return live.info
        history = self._store.history(slot)
        return history[-1] if history else None

    def _seqs(self, slot: SlotKey) -> frozenset[int]:
        """Feedback in force in the slot."""
        newest = self.newest(slot)
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
        "lost": list(table.lost),
        "replaced": list(table.replaced),
        "form": table.form,
        "rank": table.rank,
        "num_rows": table.num_rows,
        "num_edits_kept": table.num_kept_after,
        "num_constraints_holding": table.num_holding_after,
    }
