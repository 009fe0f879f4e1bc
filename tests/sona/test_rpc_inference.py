"""InferenceService over the toy engine: parsing, refusals, streams and what they leave behind."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from support.serving import serving
from support.toy_domain import LIMITS, ToyDomain, ToyInference
from support.toy_engine import ToyEngine

from engine.api import Constraint, SamplingParams
from engine.errors import QueueFull
from sona import auth
from sona.auth import LOCAL
from sona.requests import AdapterPin, ChatMessage, ChatPrompt, TextPrompt
from sona.rpc.inference import InferenceService
from sona.v1 import inference_pb2 as pb
from sona.v1.inference_pb2_grpc import InferenceServiceStub


@pytest.fixture
async def served():
    toy = ToyDomain()
    async with serving(toy) as server:
        toy.stub = InferenceServiceStub(server.channel)
        yield toy


async def refusal(call) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_generate_answers_as_worked_out_by_hand(served):
    # "bc" is 1, 2: the answer starts at 3, which is d.
    request = pb.GenerateRequest(
        text="bc", request_id="r1", sampling=pb.SamplingParams(max_tokens=3, logprobs=1)
    )
    response = await served.stub.Generate(request)
    assert response.request_id == "r1"
    (choice,) = response.choices
    assert (choice.text, list(choice.token_ids)) == ("def", [3, 4, 5])
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert choice.WhichOneof("stop_match") is None
    assert [(one.token_id, one.top[0].token_id) for one in choice.logprobs] == [
        (3, 3), (4, 4), (5, 5),
    ]  # fmt: skip
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (2, 3)
    timing = response.timing
    assert (timing.queue.ToMilliseconds(), timing.decode.ToMilliseconds()) == (250, 1000)
    assert (timing.routing.ToMilliseconds(), timing.total.ToMilliseconds()) == (0, 2000)
    (version,) = response.adapter_versions
    assert (version.name, version.version) == ("pattern-7", 3)
    assert [(span.start, span.end) for span in version.spans] == [(1, 3)]
    assert list(response.pattern_ids) == [7]


async def test_what_is_not_set_keeps_the_default(served):
    await served.stub.Generate(pb.GenerateRequest(text="a"))
    ((call, principal),) = served.inference.calls
    assert call.sampling == SamplingParams()
    assert (call.prompt, call.adapter, call.learn) == (TextPrompt("a"), "own", True)
    assert len(call.request_id) == 32
    assert principal == LOCAL


async def test_what_is_set_arrives(served):
    turns = [pb.Message(role="system", content="a"), pb.Message(role="user", content="b")]
    sampling = pb.SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, seed=7, stop=["x", "y"], stop_token_ids=[4],
        max_tokens=2, ignore_eos=True, logprobs=0, n=1, min_p=0.0, repetition_penalty=1.0,
    )  # fmt: skip
    request = pb.GenerateRequest(
        model="toy", messages=pb.Messages(messages=turns), sampling=sampling,
        adapter="pattern-3@2", learn=False, use_patterns=False, priority=0,
    )  # fmt: skip
    await served.stub.Generate(request)
    ((call, _),) = served.inference.calls
    assert call.prompt == ChatPrompt((ChatMessage("system", "a"), ChatMessage("user", "b")))
    assert call.sampling == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, seed=7, stop=("x", "y"), stop_token_ids=(4,),
        max_tokens=2, ignore_eos=True, logprobs=0,
    )  # fmt: skip
    assert (call.adapter, call.learn) == (AdapterPin("pattern-3", 2), False)


@pytest.mark.parametrize(
    "fields,field,message",
    [
        ({}, "input", "set text, messages or token_ids"),
        ({"text": ""}, "text", "prompt is empty"),
        ({"messages": pb.Messages()}, "messages", "no messages"),
        ({"messages": pb.Messages(messages=[pb.Message(content="a")])},
         "messages.messages[0].role", "role is empty"),
        ({"messages": pb.Messages(messages=[pb.Message(role="user")])}, "messages", "is empty"),
        ({"token_ids": pb.TokenIds()}, "token_ids", "no tokens"),
        ({"token_ids": pb.TokenIds(ids=[26])}, "token_ids", "has 26; the vocabulary has the"),
        ({"text": "a" * 64}, "input", "has 64 tokens; the context holds 64"),
        ({"text": "a", "adapter": "x@y"}, "adapter", "name@version"),
        ({"text": "a", "adapter": "x@" + "9" * 5_000}, "adapter", "name@version"),
        ({"text": "a", "request_id": "r" * 129}, "request_id", "129 characters"),
        ({"text": "a", "request_id": "a\nb"}, "request_id", "cannot be printed"),
    ],
)  # fmt: skip
async def test_a_prompt_that_cannot_be_answered_is_refused(served, fields, field, message):
    error = await refusal(served.stub.Generate(pb.GenerateRequest(**fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()
    assert field.encode() in dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert served.engine.jobs == []


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"temperature": float("inf")}, "sampling.temperature is inf"),
        (
            {"temperature": -0.5},
            "sampling.temperature is -0.5; use a number from 0 (greedy) to 100",
        ),
        ({"top_p": 0.0}, "sampling.top_p is 0.0; use a number above 0"),
        ({"top_p": float("nan")}, "sampling.top_p is nan"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5"),
        ({"max_tokens": 0}, "sampling.max_tokens is 0; use 1 or more"),
        ({"logprobs": 21}, "sampling.logprobs is 21; use 0 to 20"),
        ({"seed": 2**63}, "sampling.seed"),
        ({"stop": [""]}, "use texts of one character or more"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop_token_ids": [99]}, "sampling.stop_token_ids has 99"),
        ({"n": 0}, "sampling.n is 0"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_sampling_out_of_range_is_refused(served, fields, message):
    request = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**fields))
    error = await refusal(served.stub.Generate(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()


@pytest.mark.parametrize(
    "fields",
    [
        {"use_patterns": True},
        {"metadata": {"a": "b"}},
    ],
    ids=lambda fields: str(fields)[:50],
)
async def test_a_field_that_is_not_built_answers_by_name(served, fields):
    error = await refusal(served.stub.Generate(pb.GenerateRequest(text="a", **fields)))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details().startswith(f"{next(iter(fields))} ")
    assert served.engine.jobs == []


async def test_every_setting_arrives_as_it_was_sent(served):
    sampling = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": -0.5, "frequency_penalty": 0.75, "logit_bias": {2: -1.5}, "seed": 7,
        "n": 2, "min_tokens": 1, "max_tokens": 3, "stop": ("x", "xy"), "stop_token_ids": (4,),
        "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 1,
    }  # fmt: skip
    request = pb.GenerateRequest(
        text="a", sampling=pb.SamplingParams(**sampling), priority=-3, session_id="s",
        cache_salt="c", constraint=pb.Constraint(choice=pb.ChoiceList(choices=["a", "é"])),
    )  # fmt: skip
    response = await served.stub.Generate(request, timeout=50)
    assert [choice.index for choice in response.choices] == [0, 1]
    ((call, _),) = served.inference.calls
    assert call.sampling == SamplingParams(**sampling)
    assert (call.priority, call.session_id, call.cache_salt) == (-3, "s", "c")
    assert call.constraint == Constraint("choice", '["a", "é"]')
    assert 0 < call.deadline_s - time.monotonic() < 50
    await served.stub.Generate(pb.GenerateRequest(text="a"))
    (_, (plain, _)) = served.inference.calls
    assert plain.sampling == SamplingParams()
    assert (plain.constraint, plain.deadline_s) == (None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constraint": pb.Constraint()}, "no form is set"),
        ({"constraint": pb.Constraint(regex="")}, "constraint.regex has 0 bytes"),
        ({"constraint": pb.Constraint(json_schema="x" * 70_000)}, "has 70000 bytes; use 1 to"),
        ({"constraint": pb.Constraint(choice=pb.ChoiceList())}, "send one text or more"),
        ({"sampling": pb.SamplingParams(n=1000)}, "sampling.n is 1000; this server has 16"),
        ({"sampling": pb.SamplingParams(n=0)}, "sampling.n is 0"),
        ({"sampling": pb.SamplingParams(logit_bias={26: 1.0})}, "sampling.logit_bias has 26"),
        ({"sampling": pb.SamplingParams(logit_bias={1: 200.0})}, "sampling.logit_bias is"),
        ({"sampling": pb.SamplingParams(min_tokens=300)}, "sampling.min_tokens is 300"),
        ({"session_id": "x" * 129}, "session_id has 129"),
    ],
    ids=lambda each: str(each)[:40],
)
async def test_what_no_engine_could_follow_is_refused_before_any_work(served, fields, message):
    error = await refusal(served.stub.Generate(pb.GenerateRequest(text="a", **fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()
    assert served.engine.jobs == []


async def test_another_model_is_not_found(served):
    error = await refusal(served.stub.Generate(pb.GenerateRequest(text="a", model="other")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "answers for toy" in error.details()


async def test_a_full_queue_is_told_as_pressure():
    toy = ToyDomain(ToyEngine(fails_with=QueueFull("32 requests wait; at most 32 may")))
    async with serving(toy) as server:
        stub = InferenceServiceStub(server.channel)
        error = await refusal(stub.Generate(pb.GenerateRequest(text="a")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert toy.engine.live == 0


async def test_a_stream_starts_says_and_ends(served):
    request = pb.GenerateRequest(
        text="bc", request_id="r1", sampling=pb.SamplingParams(max_tokens=2)
    )
    call = served.stub.GenerateStream(pb.GenerateStreamRequest(request=request))
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "final"]
    assert (events[0].started.request_id, events[0].started.prompt_tokens) == ("r1", 2)
    assert [(list(event.delta.token_ids), event.delta.text) for event in events[1:3]] == [
        ([3], "d"), ([4], "e"),
    ]  # fmt: skip
    assert events[1].delta.logprobs == []  # not asked for
    assert events[3].final.choices[0].text == "de"


async def test_a_refused_stream_is_refused_like_a_call(served):
    call = served.stub.GenerateStream(pb.GenerateStreamRequest())
    error = await refusal(anext(aiter(call)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_job_is_gone_as_soon_as_the_stream_is_closed():
    # Parked at `yield`, where no CancelledError reaches the engine: only aclosing ends the job,
    # in the wrapper, in the service and in the domain behind it.
    engine = ToyEngine()
    auth.set_principal(LOCAL)
    request = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=9))
    context: Any = SimpleNamespace(time_remaining=lambda: None)  # all an undisturbed stream asks
    stream = InferenceService(ToyInference(engine), LIMITS).GenerateStream(
        pb.GenerateStreamRequest(request=request), context
    )
    assert (await anext(stream)).WhichOneof("event") == "started"
    await anext(stream)
    assert engine.live == 1
    await stream.aclose()
    assert engine.live == 0


async def test_a_client_that_hangs_up_ends_the_job(served):
    served.engine.may_go.clear()
    request = pb.GenerateRequest(text="a")
    call = served.stub.GenerateStream(pb.GenerateStreamRequest(request=request))
    async with asyncio.timeout(5):
        await call.read()  # started
        await served.engine.busy.wait()
        call.cancel()
        await served.engine.idle.wait()
    assert served.engine.live == 0


async def test_embed_tokenize_detokenize_and_models(served):
    embedded = await served.stub.Embed(pb.EmbedRequest(text="bcd"))
    assert (list(embedded.embedding), embedded.usage.prompt_tokens) == ([3.0, 6.0], 3)
    tokens = await served.stub.Tokenize(pb.TokenizeRequest(text="abz"))
    assert (list(tokens.token_ids), tokens.max_model_len) == ([0, 1, 25], 64)
    text = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[7, 8]))
    assert text.text == "hi"
    (model,) = (await served.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.vocab_size, model.num_parameters) == ("toy", 26, 3)


async def test_detokenize_refuses_what_no_token_is(served):
    error = await refusal(served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[30])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = await refusal(served.stub.Detokenize(pb.DetokenizeRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_score(served):
    scored = await served.stub.Score(pb.ScoreRequest(text="ab", continuation="cd"))
    assert [(one.token_id, one.logprob) for one in scored.logprobs] == [(2, -1.0), (3, -1.0)]
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (2, 2)
    error = await refusal(served.stub.Score(pb.ScoreRequest(text="a")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "there is nothing to score" in error.details()
