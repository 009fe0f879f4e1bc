"""From replies to the wire: feedback and learning."""

from collections.abc import Collection

from adapters.loras import LoraInfo
from adapters.store.records import Scope
from sona.journal.records import (
    Correction,
    FeedbackOutcome,
    FeedbackRecord,
    FeedbackState,
    Preference,
    Score,
    Signal,
    Verdict,
)
from sona.ports import AdapterInfo, Event, EventKind, LearningState, Revision
from sona.requests import Preview
from sona.rpc.convert import timestamp
from sona.v1 import common_pb2, feedback_pb2, learning_pb2

_STATE = {
    FeedbackState.ACCEPTED: feedback_pb2.FEEDBACK_STATE_ACCEPTED,
    FeedbackState.LEARNED: feedback_pb2.FEEDBACK_STATE_LEARNED,
    FeedbackState.REJECTED: feedback_pb2.FEEDBACK_STATE_REJECTED,
    FeedbackState.QUARANTINED: feedback_pb2.FEEDBACK_STATE_QUARANTINED,
    FeedbackState.ROLLED_BACK: feedback_pb2.FEEDBACK_STATE_ROLLED_BACK,
    FeedbackState.REMOVED: feedback_pb2.FEEDBACK_STATE_REMOVED,
}
_SCOPE: dict[Scope, "common_pb2.Scope.ValueType"] = {
    "principal": common_pb2.SCOPE_PRINCIPAL,
    "tenant": common_pb2.SCOPE_TENANT,
}
_LEARNING = {
    LearningState.RUNNING: learning_pb2.LEARNING_STATE_RUNNING,
    LearningState.PAUSED: learning_pb2.LEARNING_STATE_PAUSED,
    LearningState.DISABLED: learning_pb2.LEARNING_STATE_DISABLED,
}
_KIND = {
    "edit": learning_pb2.REVISION_KIND_EDIT,
    "rollback": learning_pb2.REVISION_KIND_ROLLBACK,
    "truncate": learning_pb2.REVISION_KIND_TRUNCATE,
}
_EVENT = {
    EventKind.FEEDBACK_ACCEPTED: learning_pb2.EVENT_KIND_FEEDBACK_ACCEPTED,
    EventKind.FEEDBACK_LEARNED: learning_pb2.EVENT_KIND_FEEDBACK_LEARNED,
    EventKind.FEEDBACK_REJECTED: learning_pb2.EVENT_KIND_FEEDBACK_REJECTED,
    EventKind.ADAPTER_PUBLISHED: learning_pb2.EVENT_KIND_ADAPTER_PUBLISHED,
    EventKind.ADAPTER_ROLLED_BACK: learning_pb2.EVENT_KIND_ADAPTER_ROLLED_BACK,
    EventKind.LEARNING_PAUSED: learning_pb2.EVENT_KIND_LEARNING_PAUSED,
    EventKind.LEARNING_RESUMED: learning_pb2.EVENT_KIND_LEARNING_RESUMED,
    EventKind.LEARNING_FAILED: learning_pb2.EVENT_KIND_LEARNING_FAILED,
    EventKind.ADAPTER_UNLOADED: learning_pb2.EVENT_KIND_ADAPTER_UNLOADED,
}


def learning_state(state: LearningState) -> "learning_pb2.LearningState.ValueType":
    return _LEARNING[state]


def feedback_state(state: FeedbackState) -> "feedback_pb2.FeedbackState.ValueType":
    return _STATE[state]


def scope_of(scope: int) -> Scope | None:
    """The other way: None where it is not said, or not known."""
    return next((name for name, value in _SCOPE.items() if value == scope), None)


def event_kinds(kinds: Collection[int]) -> frozenset[EventKind]:
    """The other way; what is not known is left out."""
    return frozenset(kind for kind, value in _EVENT.items() if value in kinds)


def outcome(done: FeedbackOutcome) -> feedback_pb2.SubmitFeedbackResponse:
    """A duplicate says so, and names the state of the first submission in its reason."""
    record = done.record
    reason, state = record.reason, _STATE[record.state]
    if done.is_duplicate:
        state = feedback_pb2.FEEDBACK_STATE_DUPLICATE
        reason = f"submitted before; it is {record.state}" + (f": {reason}" if reason else "")
    return feedback_pb2.SubmitFeedbackResponse(
        feedback_id=record.feedback_id,
        state=state,
        adapter_version=_learned_version(record),
        reason=reason,
        conflicts_with=record.conflicts_with,
    )


def feedback(record: FeedbackRecord) -> feedback_pb2.Feedback:
    stored = feedback_pb2.Feedback(
        feedback_id=record.feedback_id,
        request_id=record.request_id,
        choice_index=record.choice_index,
        comment=record.comment,
        metadata=record.metadata,
        state=_STATE[record.state],
        adapter_version=_learned_version(record),
        reason=record.reason,
        conflicts_with=record.conflicts_with,
        create_time=timestamp(record.created),
        principal=record.principal,
        answer=record.answer.text,
        pattern_id=record.pattern_id,
    )
    if record.state is not FeedbackState.REMOVED:
        _set_signal(stored, record.signal)
    return stored


def _set_signal(target: feedback_pb2.Feedback, signal: Signal) -> None:
    match signal:
        case Correction(text):
            target.correction = text
        case Score(value):
            target.score = value
        case Verdict(is_pass):
            passed, failed = feedback_pb2.VERDICT_PASS, feedback_pb2.VERDICT_FAIL
            target.verdict = passed if is_pass else failed
        case Preference(chosen, rejected):
            target.preference.chosen = chosen
            target.preference.rejected = rejected


def preview(seen: Preview) -> feedback_pb2.PreviewFeedbackResponse:
    return feedback_pb2.PreviewFeedbackResponse(
        would_learn=seen.would_learn,
        reason=seen.reason,
        pattern_id=seen.pattern_id,
        edits=[
            feedback_pb2.PreviewEdit(
                position=edit.position,
                old_token_id=edit.old_token_id,
                old_text=edit.old_text,
                new_token_id=edit.new_token_id,
                new_text=edit.new_text,
                base_probability=edit.base_probability,
            )
            for edit in seen.edits
        ],
        conflicts_with=seen.conflicts_with,
    )


def adapter(info: AdapterInfo) -> learning_pb2.Adapter:
    return learning_pb2.Adapter(
        name=info.slot.adapter_name,
        pattern_id=info.slot.pattern_id,
        scope=_SCOPE[info.slot.scope],
        owner=info.slot.owner,
        version=info.version,
        num_edits=info.num_edits,
        num_constraints=info.num_constraints,
        size_bytes=info.num_bytes,
        create_time=timestamp(info.created),
        update_time=timestamp(info.updated),
        kind=learning_pb2.ADAPTER_KIND_HEAD,
    )


def lora(info: LoraInfo) -> learning_pb2.Adapter:
    return learning_pb2.Adapter(
        name=info.name,
        scope=common_pb2.SCOPE_TENANT,
        version=info.version,
        size_bytes=info.num_bytes,
        create_time=timestamp(info.created),
        update_time=timestamp(info.created),
        kind=learning_pb2.ADAPTER_KIND_LORA,
        rank=info.rank,
    )


def revision(one: Revision) -> learning_pb2.AdapterRevision:
    return learning_pb2.AdapterRevision(
        version=one.info.number,
        parent=one.info.parent,
        kind=_KIND[one.info.kind],
        restores=one.info.restores,
        create_time=timestamp(one.info.created),
        feedback_ids=one.feedback_ids,
        reason=one.reason,
        available=one.info.has_arrays,
    )


def event(happened: Event) -> learning_pb2.Event:
    version = None
    if happened.adapter:
        version = common_pb2.AdapterVersion(name=happened.adapter, version=happened.version)
    unspecified = common_pb2.SCOPE_UNSPECIFIED
    return learning_pb2.Event(
        time=timestamp(happened.time),
        kind=_EVENT[happened.kind],
        feedback_id=happened.feedback_id,
        adapter_version=version,
        scope=unspecified if happened.scope is None else _SCOPE[happened.scope],
        principal=happened.principal,
        reason=happened.reason,
    )


def _learned_version(record: FeedbackRecord) -> common_pb2.AdapterVersion | None:
    if record.adapter is None or record.version is None:
        return None
    return common_pb2.AdapterVersion(name=record.adapter, version=record.version)
