"""Exceptions to gRPC statuses: code, message, details, and what is logged."""

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import engine.errors
import sona.errors
from sona.rpc import status


class Aborted(Exception):
    pass


class FakeContext:
    """Keeps what an abort was given."""

    async def abort(self, code, details, trailing_metadata):
        self.code, self.text, self.trailer = code, details, trailing_metadata
        raise Aborted

    def detail(self, kind) -> Any:
        """The detail of a kind, or None."""
        packed = status_pb2.Status.FromString(dict(self.trailer)["grpc-status-details-bin"])
        assert (packed.code, packed.message) == (self.code.value[0], self.text)
        for detail in packed.details:
            found = kind()
            if detail.Unpack(found):
                return found
        return None


class Service:
    @status.unary
    async def Ask(self, request, context):
        raise request

    @status.streaming
    async def Tell(self, request, context):
        yield "first"
        raise request

    Later = status.not_built("Later")


async def refused(error) -> FakeContext:
    context = FakeContext()
    with pytest.raises(Aborted):
        await Service().Ask(error, context)
    return context


async def test_client_fault_is_told_with_the_field_and_not_logged(caplog):
    context = await refused(sona.errors.InvalidField("sampling.top_p", "top_p is 0; use more"))
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert context.text == "top_p is 0; use more"
    (violation,) = context.detail(error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("sampling.top_p", "top_p is 0; use more")
    assert context.detail(error_details_pb2.RetryInfo) is None
    assert not caplog.records


async def test_pressure_says_when_to_retry():
    context = await refused(engine.errors.QueueFull("full"))
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.detail(error_details_pb2.RetryInfo).retry_delay.seconds == 1
    info = context.detail(error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "sona")


async def test_a_job_that_never_fits_is_not_to_be_retried():
    context = await refused(engine.errors.InvalidJob("too long"))
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert context.detail(error_details_pb2.RetryInfo) is None


async def test_not_found_names_the_kind_of_resource():
    context = await refused(sona.errors.FeedbackNotFound("no f1"))
    assert context.code is grpc.StatusCode.NOT_FOUND
    assert context.detail(error_details_pb2.ResourceInfo).resource_type == "feedback"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("secret"), sona.errors.JournalCorrupt("secret")], ids=repr
)
async def test_our_fault_is_logged_once_and_not_told(error, caplog):
    context = await refused(error)
    assert context.text == "internal error"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info[1] is error


async def test_a_stream_ends_with_the_status_after_what_it_said():
    context = FakeContext()
    stream = Service().Tell(sona.errors.ShuttingDown("bye"), context)
    assert await anext(stream) == "first"
    with pytest.raises(Aborted):
        await anext(stream)
    assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_what_is_not_built_names_itself():
    context = FakeContext()
    with pytest.raises(Aborted):
        await Service().Later(None, context)
    assert context.code is grpc.StatusCode.UNIMPLEMENTED
    assert context.text == "Later is not built yet in this version"


async def test_a_long_message_fits_into_the_trailers():
    context = await refused(sona.errors.InvalidRequest("é" * 100_000))
    assert len(context.text.encode()) <= 1_000
    assert "é ... é" in context.text
