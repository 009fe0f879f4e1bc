"""What was said about answers: bound to its request, aligned, committed, handed to the loop."""

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from adapters.align import align
from adapters.batch import Batch
from adapters.errors import IncompatibleAdapter
from adapters.store import SlotKey
from engine.api import Capture
from engine.text import Tokenizer
from sona.auth import Principal
from sona.captures import CaptureRing
from sona.checks import Limits, check_correction
from sona.errors import FeedbackNotFound, ForeignRequest, InvalidField, SonaError
from sona.events import EventBus
from sona.journal import (
    Choice,
    Correction,
    FeedbackDraft,
    FeedbackKind,
    FeedbackOutcome,
    FeedbackRecord,
    Journal,
    Positions,
    RequestRecord,
    is_learnable,
)
from sona.loops.instant import InstantLoop
from sona.loops.lessons import as_batch, captured_lesson, scored_lesson
from sona.metrics import Metrics
from sona.ports import Event, EventKind
from sona.requests import FeedbackCall, Preview, PreviewEdit
from sona.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackService:
    """Implements `sona.ports.Feedback`. The journal owns what is stored."""

    journal: Journal
    captures: CaptureRing
    tokenizer: Tokenizer
    routing: Routing
    events: EventBus
    loop: InstantLoop | None  # None: the server does not learn
    metrics: Metrics
    limits: Limits

    async def submit(self, call: FeedbackCall, principal: Principal) -> FeedbackOutcome:
        """Store a feedback; returns after its commit. Raises what `sona.ports.Feedback` lists."""
        kind = FeedbackKind(type(call.signal).__name__.lower())
        try:
            draft, positions = await asyncio.to_thread(self._prepared, call, principal)
            stored = self.journal.add_feedback(draft, positions)
            stored.add_done_callback(self._stored)  # also when the caller has gone by then
            outcome = await asyncio.shield(asyncio.wrap_future(stored))
        except SonaError:
            self.metrics.feedback_submitted(kind, "refused")
            raise
        self.metrics.feedback_submitted(kind, "duplicate" if outcome.is_duplicate else "accepted")
        return outcome

    def _stored(self, stored: "Future[FeedbackOutcome]") -> None:
        """On the journal's thread, after the commit: tell who watches, and the learner."""
        if stored.cancelled() or stored.exception() is not None:
            return
        record = stored.result().record
        if stored.result().is_duplicate:
            return
        accepted = Event(
            time=record.created, kind=EventKind.FEEDBACK_ACCEPTED,
            principal=record.principal, feedback_id=record.feedback_id,
        )  # fmt: skip
        self.events.emit_threadsafe(record.tenant, accepted)
        if self.loop is not None and is_learnable(record.signal):
            self.loop.notify(record)

    async def get(self, feedback_id: str, principal: Principal) -> FeedbackRecord:
        """A feedback the caller may see: its own, or any of its tenant for an operator."""
        record = await asyncio.to_thread(self.journal.feedback, principal.tenant, feedback_id)
        if record.principal != principal.name and not principal.has_role("operator"):
            raise FeedbackNotFound(
                f"no feedback {feedback_id!r}; give the feedback_id of a submission of yours"
            )
        return record

    async def preview(self, call: FeedbackCall, principal: Principal) -> Preview:
        """What the feedback would change. Stores nothing."""
        preview, lesson = await asyncio.to_thread(self._preview, call, principal)
        if self.loop is None or lesson is None:
            return preview
        slot, batch = lesson
        patterns = self.loop.teacher.patterns
        found = await asyncio.wrap_future(self.loop.run(lambda: patterns.conflicts(slot, batch)))
        return replace(preview, conflicts_with=found)

    def _request(self, call: FeedbackCall, principal: Principal) -> tuple[RequestRecord, Choice]:
        request = self.journal.request(principal.tenant, call.request_id)
        if request.principal != principal.name:
            raise ForeignRequest(
                f"request {call.request_id!r} was made by another principal; feedback comes from "
                "whoever made the request"
            )
        if call.choice_index >= len(request.choices):
            raise InvalidField(
                "choice_index",
                f"choice_index is {call.choice_index}; request {call.request_id!r} has "
                f"{len(request.choices)} choices, counted from 0",
            )
        return request, request.choices[call.choice_index]

    def _prepared(
        self, call: FeedbackCall, principal: Principal
    ) -> tuple[FeedbackDraft, Positions | None]:
        """The draft, and what can be learned from the answer's own states."""
        request, answer = self._request(call, principal)
        positions = None
        capture = self.captures.get(principal.tenant, call.request_id, call.choice_index)
        if isinstance(call.signal, Correction):
            check_correction(call.signal.text, answer.text)
            corrected = corrected_ids(self.tokenizer, call.signal.text, answer.token_ids)
            self._check_fits(request, corrected)
            if capture is not None:
                positions = captured_lesson(answer.token_ids, corrected, capture)
        elif is_learnable(call.signal) and capture is not None:
            positions = scored_lesson(answer.token_ids, capture, is_confirmation=True)
        draft = FeedbackDraft(
            tenant=principal.tenant,
            principal=principal.name,
            feedback_id=call.feedback_id,
            request_id=call.request_id,
            choice_index=call.choice_index,
            signal=call.signal,
            comment=call.comment,
            metadata=call.metadata,
            created=time.time(),
        )
        return draft, positions

    def _check_fits(self, request: RequestRecord, corrected: tuple[int, ...]) -> None:
        """Refuse a correction that no pass over prompt and answer could hold."""
        num_tokens = len(request.prompt_ids) + len(corrected)
        if num_tokens > self.limits.max_model_len:
            raise InvalidField(
                "correction",
                f"the prompt has {len(request.prompt_ids)} tokens and the correction "
                f"{len(corrected)}; the context holds {self.limits.max_model_len} in all. Send a "
                "shorter correction",
            )

    def _preview(
        self, call: FeedbackCall, principal: Principal
    ) -> tuple[Preview, tuple[SlotKey, Batch] | None]:
        """What would change, and what the learner would be asked to hold where states are kept."""
        request, answer = self._request(call, principal)
        live = None
        if request.prompt_vector is not None:
            caller = (principal.tenant, principal.name)
            live = self.routing.match(caller, request.prompt_vector)
        why_not = self._why_not(call, request, is_in_pattern=live is not None)
        preview = Preview(
            would_learn=not why_not,
            reason=why_not,
            pattern_id=None if live is None else live.slot.pattern_id,
        )
        if not isinstance(call.signal, Correction):
            return preview, None
        check_correction(call.signal.text, answer.text)
        corrected = corrected_ids(self.tokenizer, call.signal.text, answer.token_ids)
        self._check_fits(request, corrected)
        capture = self.captures.get(principal.tenant, call.request_id, call.choice_index)
        preview = replace(preview, edits=(self._edit(capture, answer, corrected),))
        positions = None
        if capture is not None and live is not None and not why_not:
            positions = captured_lesson(answer.token_ids, corrected, capture)
        if live is None or positions is None:
            return preview, None
        return preview, (live.slot, as_batch("", positions))

    def _why_not(self, call: FeedbackCall, request: RequestRecord, *, is_in_pattern: bool) -> str:
        """Why a feedback would be stored and not learned; empty when it would be learned."""
        if self.loop is None:
            return "stored, not learned: this server was started without learning"
        if request.prompt_vector is None:
            return "stored, not learned: the prompt's state was not kept"
        try:
            self.loop.teacher.patterns.check_base(request.base_hash)
        except IncompatibleAdapter as error:
            return f"stored, not learned: {error}"
        if isinstance(call.signal, Correction):
            return ""
        if is_learnable(call.signal) and is_in_pattern:
            return ""
        return (
            "stored, not learned: only corrections, PASS verdicts and scores of 1 on answers of a "
            "learned pattern are learned"
        )

    def _edit(
        self, capture: Capture | None, answer: Choice, corrected: tuple[int, ...]
    ) -> PreviewEdit:
        """The first token that the correction changes."""
        found = align(answer.token_ids, corrected)
        old, new = found.generated_next, found.corrected_next
        probability = None
        if capture is not None and new is not None and found.num_common < len(capture.hidden):
            hit = np.flatnonzero(capture.top_ids[found.num_common] == new)
            if len(hit):
                probability = float(np.exp(capture.top_logprobs[found.num_common, hit[0]]))
        return PreviewEdit(
            position=found.num_common,
            old_token_id=old,
            old_text="" if old is None else self.tokenizer.decode([old]),
            new_token_id=new,
            new_text="" if new is None else self.tokenizer.decode([new]),
            base_probability=probability,
        )


def corrected_ids(
    tokenizer: Tokenizer, correction: str, answer_ids: tuple[int, ...]
) -> tuple[int, ...]:
    """The correction as the model would have said it: ids, and the end that the answer had.

    An answer that was cut off has no end; the correction is then learned without one as well,
    unless it is shorter than the answer, which only an end can say.
    """
    ids = tokenizer.encode_continuation(correction)
    last = answer_ids[-1] if answer_ids else None
    if last in tokenizer.eos_ids:
        return (*ids, last)
    is_beginning = answer_ids[: len(ids)] == tuple(ids)
    return (*ids, min(tokenizer.eos_ids)) if is_beginning and tokenizer.eos_ids else tuple(ids)


def target_ids(tokenizer: Tokenizer, record: FeedbackRecord) -> tuple[int, ...]:
    """The ids a stored feedback asks for: the correction's, or the confirmed answer's own."""
    if isinstance(record.signal, Correction):
        return corrected_ids(tokenizer, record.signal.text, record.answer.token_ids)
    return record.answer.token_ids
