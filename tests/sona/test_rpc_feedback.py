"""FeedbackService over the toy domain: signals, refusals, outcomes, and the stream of many."""

import dataclasses
from typing import Any

import grpc
import grpc.aio
import pytest
from support.serving import serving
from support.toy_domain import ToyDomain

from sona.errors import FeedbackConflict
from sona.journal import Correction, FeedbackState, Preference, Score, Verdict
from sona.v1 import feedback_pb2 as pb
from sona.v1.feedback_pb2_grpc import FeedbackServiceStub


@pytest.fixture
async def served():
    toy = ToyDomain()
    async with serving(toy) as server:
        toy.stub = FeedbackServiceStub(server.channel)
        yield toy


def feedback(**fields) -> pb.SubmitFeedbackRequest:
    return pb.SubmitFeedbackRequest(**{"feedback_id": "f1", "request_id": "r1", **fields})


async def refusal(call) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize(
    "fields,signal",
    [
        ({"correction": "z"}, Correction("z")),
        ({"score": 0.0}, Score(0.0)),
        ({"score": 1.0}, Score(1.0)),
        ({"verdict": pb.VERDICT_PASS}, Verdict(True)),
        ({"verdict": pb.VERDICT_FAIL}, Verdict(False)),
        ({"preference": pb.Preference(chosen="a", rejected="b")}, Preference("a", "b")),
    ],
    ids=str,
)
async def test_a_signal_goes_in_and_comes_back(served, fields, signal):
    sent = feedback(**fields, comment="c", metadata={"k": "v"}, choice_index=2)
    outcome = await served.stub.SubmitFeedback(sent)
    assert (outcome.feedback_id, outcome.state) == ("f1", pb.FEEDBACK_STATE_ACCEPTED)
    assert not outcome.HasField("adapter_version")
    record = served.feedback.records["f1"]
    assert (record.signal, record.choice_index, record.principal) == (signal, 2, "default")
    stored = (await served.stub.GetFeedback(pb.GetFeedbackRequest(feedback_id="f1"))).feedback
    for name in ("score", "correction", "verdict", "preference", "comment", "metadata"):
        assert getattr(stored, name) == getattr(sent, name)
    assert stored.WhichOneof("signal") == sent.WhichOneof("signal")
    assert stored.create_time.ToMilliseconds() == 1_700_000_000_500
    assert (stored.answer, stored.HasField("pattern_id")) == ("bc", False)


async def test_a_duplicate_says_so_and_what_became_of_the_first(served):
    await served.stub.SubmitFeedback(feedback(correction="z"))
    served.feedback.records["f1"] = dataclasses.replace(
        served.feedback.records["f1"], state=FeedbackState.LEARNED, adapter="pattern-7",
        version=3, reason="quickly", conflicts_with=("f0",), pattern_id=7,
    )  # fmt: skip
    outcome = await served.stub.SubmitFeedback(feedback(correction="z"))
    assert outcome.state == pb.FEEDBACK_STATE_DUPLICATE
    assert outcome.reason == "submitted before; it is LEARNED: quickly"
    assert (outcome.adapter_version.name, outcome.adapter_version.version) == ("pattern-7", 3)
    assert list(outcome.conflicts_with) == ["f0"]
    stored = (await served.stub.GetFeedback(pb.GetFeedbackRequest(feedback_id="f1"))).feedback
    assert (stored.state, stored.pattern_id) == (pb.FEEDBACK_STATE_LEARNED, 7)


async def test_a_removed_feedback_tells_no_signal(served):
    await served.stub.SubmitFeedback(feedback(correction="z"))
    served.feedback.records["f1"] = dataclasses.replace(
        served.feedback.records["f1"], state=FeedbackState.REMOVED, signal=Correction("")
    )
    stored = (await served.stub.GetFeedback(pb.GetFeedbackRequest(feedback_id="f1"))).feedback
    assert stored.WhichOneof("signal") is None


@pytest.mark.parametrize(
    "fields,message",
    [
        ({}, "set score, correction, preference or verdict"),
        ({"score": 1.5}, "score is 1.5; use a number from 0 (bad) to 1 (good)"),
        ({"score": -0.1}, "score is -0.1"),
        ({"score": float("nan")}, "score is nan"),
        ({"correction": ""}, "correction is blank"),
        ({"correction": "é" * 51}, "correction has 102 bytes; the server takes 100"),
        ({"correction": "x" * 1_000_000}, "correction has 1000000 bytes"),
        ({"verdict": pb.VERDICT_UNSPECIFIED}, "verdict is not said"),
        ({"verdict": 9}, "verdict is 9"),
        ({"preference": pb.Preference(chosen="a")}, "preference.rejected is blank"),
        ({"preference": pb.Preference(chosen="a", rejected="a")}, "the same text"),
        ({"score": 1.0, "feedback_id": ""}, "feedback_id is empty"),
        ({"score": 1.0, "request_id": ""}, "request_id is empty"),
        ({"score": 1.0, "comment": "x" * 16_385}, "comment and metadata hold 16385 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_feedback_that_cannot_be_stored_is_refused(served, fields, message):
    error = await refusal(served.stub.SubmitFeedback(feedback(**fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()
    assert served.feedback.records == {}


async def test_an_unknown_feedback_is_not_found(served):
    error = await refusal(served.stub.GetFeedback(pb.GetFeedbackRequest(feedback_id="nope")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_one_outcome_each_and_a_refused_one_does_not_end_the_stream(served, caplog):
    async def submit(call, principal, *, real=served.feedback.submit):
        if call.feedback_id == "conflict":
            raise FeedbackConflict("used for other content")
        if call.feedback_id == "broken":
            raise ZeroDivisionError("secret")
        return await real(call, principal)

    served.feedback.submit = submit
    ids = ["a", "a", "conflict", "bad", "broken", "b"]
    requests = [
        pb.SubmitFeedbackStreamRequest(
            request=feedback(feedback_id=each, score=2.0 if each == "bad" else 1.0)
        )
        for each in ids
    ]
    outcomes = [each async for each in served.stub.SubmitFeedbackStream(iter(requests))]
    assert [each.feedback_id for each in outcomes] == ids
    found = [each.error.reason or pb.FeedbackState.Name(each.response.state) for each in outcomes]
    assert found == [
        "FEEDBACK_STATE_ACCEPTED", "FEEDBACK_STATE_DUPLICATE", "FEEDBACK_CONFLICT",
        "INVALID_FIELD", "INTERNAL", "FEEDBACK_STATE_ACCEPTED",
    ]  # fmt: skip
    assert outcomes[2].error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert outcomes[4].error.message == "internal error"
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


async def test_a_preview_shows_edits_and_stores_nothing(served):
    request = pb.PreviewFeedbackRequest(request_id="r1", correction="z")
    seen = await served.stub.PreviewFeedback(request)
    assert seen.would_learn
    assert not seen.HasField("pattern_id")
    (edit,) = seen.edits
    assert (edit.position, edit.old_token_id, edit.old_text) == (1, 2, "c")
    assert not edit.HasField("new_token_id")
    assert (edit.HasField("base_probability"), edit.base_probability) == (True, 0.0)
    assert list(seen.conflicts_with) == ["f0"]
    assert served.feedback.records == {}


async def test_a_preview_is_checked_like_a_submission(served):
    request = pb.PreviewFeedbackRequest(request_id="r1", score=3.0)
    error = await refusal(served.stub.PreviewFeedback(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
