"""The asyncio client. Replies are the messages of `sona.v1`."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self

import grpc.aio

from sona.client import calls
from sona.client.calls import PromptLike
from sona.v1 import (
    control_pb2,
    control_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    learning_pb2,
    learning_pb2_grpc,
)


class AsyncClient:
    """A client on the running event loop. Use it with `async with`, or `close` it."""

    def __init__(
        self,
        address: str = calls.DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        timeout_s: float | None = 120.0,  # of one call; `events` has none
    ) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=calls.OPTIONS)
        self._metadata = calls.credentials(api_key)
        self._timeout_s = timeout_s
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._learning = learning_pb2_grpc.LearningServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connection."""
        await self._channel.close(None)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server takes connections. Raises TimeoutError."""
        await asyncio.wait_for(self._channel.channel_ready(), timeout_s)

    async def generate(self, prompt: PromptLike, **options: Any) -> inference_pb2.GenerateResponse:
        """The whole answer. Options: those of `calls.generate_request`, sampling included."""
        request = calls.generate_request(prompt, **options)
        return await self._inference.Generate(request, **self._call())

    async def stream(
        self, prompt: PromptLike, **options: Any
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        """The answer as it comes. Closing the generator ends the request."""
        request = inference_pb2.GenerateStreamRequest(
            request=calls.generate_request(prompt, **options)
        )
        call = self._inference.GenerateStream(request, **self._call())
        try:
            async for event in call:
                yield event
        finally:
            call.cancel()

    async def embed(self, prompt: PromptLike) -> list[float]:
        """The prompt's vector under the base model: pooled, centred, of length 1."""
        request = inference_pb2.EmbedRequest(**calls.prompt_fields(prompt))
        response = await self._inference.Embed(request, **self._call())
        return list(response.embedding)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids the model would see."""
        request = inference_pb2.TokenizeRequest(**calls.prompt_fields(prompt))
        response = await self._inference.Tokenize(request, **self._call())
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids."""
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids)
        return (await self._inference.Detokenize(request, **self._call())).text

    async def models(self) -> list[inference_pb2.Model]:
        """What is served."""
        request = inference_pb2.ListModelsRequest()
        return list((await self._inference.ListModels(request, **self._call())).models)

    async def feedback(self, request_id: str, **signal: Any) -> feedback_pb2.SubmitFeedbackResponse:
        """Say something about an answer. Arguments: those of `calls.feedback_request`.

        Without a feedback_id one is made: pass your own to be able to repeat the call safely.
        """
        request = calls.feedback_request(request_id, **signal)
        return await self._feedback.SubmitFeedback(request, **self._call())

    async def get_feedback(self, feedback_id: str) -> feedback_pb2.Feedback:
        """What became of a feedback."""
        request = feedback_pb2.GetFeedbackRequest(feedback_id=feedback_id)
        return (await self._feedback.GetFeedback(request, **self._call())).feedback

    async def preview(self, request_id: str, **signal: Any) -> feedback_pb2.PreviewFeedbackResponse:
        """What a feedback would change; nothing is stored."""
        request = calls.preview_request(calls.feedback_request(request_id, **signal))
        return await self._feedback.PreviewFeedback(request, **self._call())

    async def learning_status(self) -> learning_pb2.GetStatusResponse:
        """Whether the server learns, and what waits."""
        return await self._learning.GetStatus(learning_pb2.GetStatusRequest(), **self._call())

    async def pause_learning(self, reason: str = "") -> None:
        """Stop learning on the whole server. Needs an operator's key."""
        request = learning_pb2.PauseLearningRequest(reason=reason)
        await self._learning.PauseLearning(request, **self._call())

    async def resume_learning(self) -> None:
        """Learn what waits, and go on. Needs an operator's key."""
        await self._learning.ResumeLearning(learning_pb2.ResumeLearningRequest(), **self._call())

    async def adapters(self) -> list[learning_pb2.Adapter]:
        """Every adapter the caller may see."""
        found: list[learning_pb2.Adapter] = []
        token = ""
        while True:
            request = learning_pb2.ListAdaptersRequest(page_token=token)
            page = await self._learning.ListAdapters(request, **self._call())
            found.extend(page.adapters)
            token = page.next_page_token
            if not token:
                return found

    async def adapter(
        self, name: str, *, scope: str = "", owner: str = ""
    ) -> learning_pb2.GetAdapterResponse:
        """One adapter with its versions, newest first."""
        fields = calls.adapter_fields(name, scope, owner)
        request = learning_pb2.GetAdapterRequest(**fields)
        return await self._learning.GetAdapter(request, **self._call())

    async def rollback(
        self,
        name: str,
        *,
        to_version: int | None = None,  # None: take back the last feedback; 0: before learning
        scope: str = "",
        owner: str = "",
        reason: str = "",
    ) -> learning_pb2.RollbackAdapterResponse:
        """Write a version that equals an earlier one."""
        request = calls.rollback_request(
            name, to_version=to_version, scope=scope, owner=owner, reason=reason
        )
        return await self._learning.RollbackAdapter(request, **self._call())

    async def load_adapter(
        self, name: str, path: str, *, any_base: bool = False
    ) -> learning_pb2.Adapter:
        """Serve a LoRA from a directory of the server, or replace the one of that name.

        One that says it was trained on another model is refused, unless `any_base`.
        """
        request = learning_pb2.LoadAdapterRequest(name=name, path=path, any_base=any_base)
        return (await self._learning.LoadAdapter(request, **self._call())).adapter

    async def unload_adapter(self, name: str) -> None:
        """Forget a LoRA; requests under way keep it."""
        request = learning_pb2.UnloadAdapterRequest(name=name)
        await self._learning.UnloadAdapter(request, **self._call())

    async def score(
        self, prompt: PromptLike, continuation: str, *, adapter: str = ""
    ) -> inference_pb2.ScoreResponse:
        """How likely a continuation is; nothing is generated."""
        request = inference_pb2.ScoreRequest(
            continuation=continuation, adapter=adapter, **calls.prompt_fields(prompt)
        )
        return await self._inference.Score(request, **self._call())

    async def events(self, *kinds: str) -> AsyncGenerator[learning_pb2.Event, None]:
        """Events from now on; kinds by name ("adapter_published"), none: all."""
        request = learning_pb2.WatchEventsRequest(kinds=calls.event_kinds(kinds))
        call = self._learning.WatchEvents(request, metadata=self._metadata)
        try:
            async for response in call:
                yield response.event
        finally:
            call.cancel()

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        """Version, model, hardware, plan, and who the caller is."""
        return await self._control.GetServerInfo(control_pb2.GetServerInfoRequest(), **self._call())

    async def abort(self, request_id: str) -> bool:
        """End a running request. False when nothing of that name ran."""
        request = control_pb2.AbortRequestRequest(request_id=request_id)
        return (await self._control.AbortRequest(request, **self._call())).aborted

    def _call(self) -> dict[str, Any]:
        return {"metadata": self._metadata, "timeout": self._timeout_s}
