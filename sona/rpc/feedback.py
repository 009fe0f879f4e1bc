"""FeedbackService: parse, delegate to `sona.ports.Feedback`, convert."""

from collections.abc import AsyncGenerator, AsyncIterator

from sona import checks
from sona.auth import Principal, current_principal
from sona.checks import Limits
from sona.ports import Feedback
from sona.rpc import convert_learning, parse
from sona.rpc.status import (
    Context,
    log_if_ours,
    public_message,
    reason_of,
    status_of,
    streaming,
    unary,
)
from sona.v1 import common_pb2, feedback_pb2
from sona.v1.feedback_pb2_grpc import FeedbackServiceServicer


class FeedbackService(FeedbackServiceServicer):
    """One instance per process; holds no per-request state."""

    def __init__(self, feedback: Feedback, limits: Limits) -> None:
        self._feedback = feedback
        self._limits = limits

    @unary
    async def SubmitFeedback(
        self, request: feedback_pb2.SubmitFeedbackRequest, context: Context
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """The reply comes after the commit."""
        return await self._submit(request, current_principal())

    @streaming
    async def SubmitFeedbackStream(
        self,
        request_iterator: AsyncIterator[feedback_pb2.SubmitFeedbackStreamRequest],
        context: Context,
    ) -> AsyncGenerator[feedback_pb2.SubmitFeedbackStreamResponse, None]:
        """One outcome each, in order. A refused feedback does not end the stream."""
        principal = current_principal()
        async for item in request_iterator:
            answer = feedback_pb2.SubmitFeedbackStreamResponse(feedback_id=item.request.feedback_id)
            try:
                answer.response.CopyFrom(await self._submit(item.request, principal))
            except Exception as error:
                log_if_ours(error, "SubmitFeedbackStream")
                answer.error.CopyFrom(_call_error(error))
            yield answer

    @unary
    async def GetFeedback(
        self, request: feedback_pb2.GetFeedbackRequest, context: Context
    ) -> feedback_pb2.GetFeedbackResponse:
        """A stored feedback and what became of it."""
        principal = current_principal()
        checks.check_id("feedback_id", request.feedback_id)
        record = await self._feedback.get(request.feedback_id, principal)
        return feedback_pb2.GetFeedbackResponse(feedback=convert_learning.feedback(record))

    @unary
    async def PreviewFeedback(
        self, request: feedback_pb2.PreviewFeedbackRequest, context: Context
    ) -> feedback_pb2.PreviewFeedbackResponse:
        """What it would change; nothing is stored."""
        principal = current_principal()
        call = parse.preview_call(request, self._limits)
        return convert_learning.preview(await self._feedback.preview(call, principal))

    async def _submit(
        self, request: feedback_pb2.SubmitFeedbackRequest, principal: Principal
    ) -> feedback_pb2.SubmitFeedbackResponse:
        call = parse.feedback_call(request, self._limits)
        return convert_learning.outcome(await self._feedback.submit(call, principal))


def _call_error(error: Exception) -> common_pb2.CallError:
    return common_pb2.CallError(
        code=status_of(error).value[0],
        message=public_message(error),
        reason=reason_of(error),
    )
