"""InferenceService: parse, delegate to `sona.ports.Inference`, convert."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from sona import checks
from sona.auth import current_principal
from sona.checks import Limits
from sona.errors import InvalidField
from sona.ports import Inference
from sona.requests import Delta, GenerateReply, Started
from sona.rpc import convert, parse
from sona.rpc.status import Context, deadline_of, streaming, unary
from sona.v1 import inference_pb2
from sona.v1.inference_pb2_grpc import InferenceServiceServicer


class InferenceService(InferenceServiceServicer):
    """One instance per process; holds no per-request state."""

    def __init__(self, inference: Inference, limits: Limits) -> None:
        self._inference = inference
        self._limits = limits

    @unary
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """The whole answer. However the call ends, the engine job ends with it."""
        principal = current_principal()
        call = parse.generate_call(request, self._limits, deadline_of(context))
        reply: GenerateReply | None = None
        async with aclosing(self._inference.generate(call, principal)) as events:
            async for event in events:
                if isinstance(event, GenerateReply):
                    reply = event
        assert reply is not None, "generate() must end with a GenerateReply"
        return convert.reply(reply)

    @streaming
    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        """Tokens as they come. However the stream ends, the engine job ends with it."""
        principal = current_principal()
        call = parse.generate_call(request.request, self._limits, deadline_of(context))
        async with aclosing(self._inference.generate(call, principal)) as events:
            async for event in events:
                yield _event(event)

    @unary
    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: Context
    ) -> inference_pb2.EmbedResponse:
        """The prompt's vector."""
        principal = current_principal()
        call = parse.embed_call(request, self._limits, deadline_of(context))
        reply = await self._inference.embed(call, principal)
        return inference_pb2.EmbedResponse(
            embedding=reply.vector.tolist(), usage=convert.usage(reply.usage)
        )

    @unary
    async def Score(
        self, request: inference_pb2.ScoreRequest, context: Context
    ) -> inference_pb2.ScoreResponse:
        """How likely a continuation is."""
        principal = current_principal()
        call = parse.score_call(request, self._limits, deadline_of(context))
        return convert.score(await self._inference.score(call, principal))

    @unary
    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """The ids the model would see. An empty text has none."""
        current_principal()
        checks.check_model(request.model, self._limits)
        prompt = parse.prompt(request)
        checks.check_chars(prompt, self._limits)
        return inference_pb2.TokenizeResponse(
            token_ids=await self._inference.tokenize(prompt),
            max_model_len=self._limits.max_model_len,
        )

    @unary
    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """The text of ids."""
        current_principal()
        checks.check_model(request.model, self._limits)
        token_ids = tuple(request.token_ids)
        if not token_ids:
            raise InvalidField("token_ids", "there are no tokens; send at least one")
        checks.check_token_ids("token_ids", token_ids, self._limits)
        return inference_pb2.DetokenizeResponse(text=await self._inference.detokenize(token_ids))

    @unary
    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """What is served."""
        current_principal()
        return inference_pb2.ListModelsResponse(
            models=[convert.model(info) for info in self._inference.models()]
        )


def _event(event: Started | Delta | GenerateReply) -> inference_pb2.GenerateStreamResponse:
    match event:
        case Started():
            return inference_pb2.GenerateStreamResponse(started=convert.started(event))
        case Delta():
            return inference_pb2.GenerateStreamResponse(delta=convert.delta(event))
        case GenerateReply():
            return inference_pb2.GenerateStreamResponse(final=convert.reply(event))
