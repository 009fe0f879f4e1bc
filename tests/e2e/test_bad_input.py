"""Everything a caller can get wrong: a specific status, a message that helps, and life goes on."""

from typing import Any

import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from support.checkpoints import make_checkpoint
from support.server import client_of, configured, running_server

from sona.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")
CODE = grpc.StatusCode
WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1_500)}}
ENDLESS = {
    "$defs": {
        "t": {
            "type": "object",
            "properties": {"c": {"$ref": "#/$defs/t"}},
            "required": ["c"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/t",
}
# Some 2^60 alternatives when they are written out.
EXPLODING = {
    "$ref": "#/$defs/d0",
    "$defs": {
        **{
            f"d{i}": {
                "allOf": [
                    {"anyOf": [{"minLength": i}, {"$ref": f"#/$defs/d{i + 1}"}]},
                    {"anyOf": [{"maxLength": 99 - i}, {"$ref": f"#/$defs/d{i + 1}"}]},
                ]
            }
            for i in range(60)
        },
        "d60": {"type": "string"},
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint(model, "llama")
    config = configured(
        tmp_path_factory.mktemp("data"), model=model, students=("ann", "bob"),
        engine={"max_num_seqs": 4, "max_learned_slots": 8},
    )  # fmt: skip
    async with running_server(config) as addresses:
        yield addresses


@pytest_asyncio.fixture(loop_scope="module")
async def ann(server):
    async with client_of(server, "ann") as client:
        yield client
        reply = await client.generate("still serving?", max_tokens=2)
        assert reply.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "options", "code", "message"),
    [
        ("", {}, CODE.INVALID_ARGUMENT, "empty"),
        ([], {}, CODE.INVALID_ARGUMENT, "no tokens"),
        ("x" * 600, {}, CODE.INVALID_ARGUMENT, "600 tokens; the context holds 512"),
        ([1, 300], {}, CODE.INVALID_ARGUMENT, "300"),
        ("a", {"temperature": -1.0}, CODE.INVALID_ARGUMENT, "temperature is -1"),
        ("a", {"temperature": np.nan}, CODE.INVALID_ARGUMENT, "temperature is nan"),
        ("a", {"top_p": 0.0}, CODE.INVALID_ARGUMENT, "top_p is 0"),
        ("a", {"max_tokens": 0}, CODE.INVALID_ARGUMENT, "max_tokens is 0"),
        ("a", {"adapter": "pattern-99"}, CODE.NOT_FOUND, "pattern-99"),
        ("a", {"adapter": "nosuch"}, CODE.NOT_FOUND, "nosuch"),
        ("a", {"adapter": f"pattern-{10**22}"}, CODE.NOT_FOUND, "no adapter"),
        ("a", {"top_k": 2**31}, CODE.INVALID_ARGUMENT, "0 (all) to 2147483647"),
        ("a", {"model": "gpt"}, CODE.NOT_FOUND, "'gpt' is not served"),
        ("a", {"n": 0}, CODE.INVALID_ARGUMENT, "sampling.n is 0"),
        ("a", {"n": 1000}, CODE.INVALID_ARGUMENT, "sampling.n is 1000; this server has 4"),
        ("a", {"min_p": 2.0}, CODE.INVALID_ARGUMENT, "sampling.min_p is 2"),
        ("a", {"repetition_penalty": 0.0}, CODE.INVALID_ARGUMENT, "repetition_penalty is 0"),
        ("a", {"presence_penalty": 2.5}, CODE.INVALID_ARGUMENT, "presence_penalty is 2.5"),
        ("a", {"frequency_penalty": np.inf}, CODE.INVALID_ARGUMENT, "frequency_penalty is inf"),
        ("a", {"logit_bias": {300: 1.0}}, CODE.INVALID_ARGUMENT, "logit_bias has 300; the vocab"),
        ("a", {"logit_bias": {3: np.nan}}, CODE.INVALID_ARGUMENT, "logit_bias"),
        ("a", {"logprobs": 1000}, CODE.INVALID_ARGUMENT, "logprobs is 1000"),
        ("a", {"min_tokens": 9, "max_tokens": 3}, CODE.INVALID_ARGUMENT, "min_tokens is 9"),
        ("a", {"stop": [""]}, CODE.INVALID_ARGUMENT, "stop is ('',); use texts of one"),
        ("a", {"stop": ["x"] * 17}, CODE.INVALID_ARGUMENT, "use at most 16"),
        ("a", {"stop_token_ids": [300]}, CODE.INVALID_ARGUMENT, "stop_token_ids has 300"),
        ("a", {"session_id": "s" * 129}, CODE.INVALID_ARGUMENT, "session_id has 129"),
        ("a", {"cache_salt": "\n"}, CODE.INVALID_ARGUMENT, "cache_salt"),
        ("a", {"choice": []}, CODE.INVALID_ARGUMENT, "choice has 0 texts"),
        ("a", {"choice": ["a", ""]}, CODE.INVALID_ARGUMENT, "choice has an empty text"),
        ("a", {"regex": "("}, CODE.INVALID_ARGUMENT, "regex"),
        ("a", {"grammar": "start: nosuch"}, CODE.INVALID_ARGUMENT, "nosuch"),
        ("a", {"json_schema": "{"}, CODE.INVALID_ARGUMENT, "json_schema"),
        ("a", {"json_schema": {"type": "number", "enum": ["x"]}}, CODE.INVALID_ARGUMENT, "schema"),
        ("a", {"json_schema": {"enum": ["x" * 2**20]}}, CODE.INVALID_ARGUMENT, "bytes; use 1 to"),
        ("a", {"json_schema": EXPLODING}, CODE.INVALID_ARGUMENT, "json_schema"),
        ("a", {"regex": "a{1000000}"}, CODE.INVALID_ARGUMENT, "tokens at once; a context holds"),
        ("a", {"regex": r"[^\s\S]"}, CODE.INVALID_ARGUMENT, "no text fits it"),
        (
            "a",
            {"regex": "(a|b)a{1000000}"},
            CODE.INVALID_ARGUMENT,
            "cannot be followed any further",
        ),
        ("a", {"json_schema": {"$ref": "#"}}, CODE.INVALID_ARGUMENT, "no text fits it"),
        ("a", {"json_schema": ENDLESS}, CODE.INVALID_ARGUMENT, "tokens at once; a context holds"),
        ("a", {"json_schema": WIDE}, CODE.INVALID_ARGUMENT, "json_schema cannot be used"),
        ("a" * 4_000_000, {}, CODE.INVALID_ARGUMENT, "has 4000000 characters; a context of 512"),
        ("a", {"logit_bias": dict.fromkeys(range(257), 999.0)}, CODE.INVALID_ARGUMENT, "257 entr"),
    ],
)
async def test_generate_refuses(ann, prompt, options, code, message):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.generate(prompt, **options)
    assert refused.value.code() is code
    assert message in str(refused.value.details())


@pytest.mark.parametrize(
    ("signal", "code", "message"),
    [
        ({"score": 1.5}, CODE.INVALID_ARGUMENT, "1.5"),
        ({"score": -0.1}, CODE.INVALID_ARGUMENT, "-0.1"),
        ({"score": np.nan}, CODE.INVALID_ARGUMENT, "nan"),
        ({"correction": "x" * 2**20}, CODE.INVALID_ARGUMENT, "65536"),
        ({"correction": "x" * 600}, CODE.INVALID_ARGUMENT, "the context holds 512"),
    ],
)
async def test_feedback_refuses(ann, signal, code, message):
    reply = await ann.generate("hello", max_tokens=3, temperature=0.0)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.feedback(reply.request_id, **signal)
    assert refused.value.code() is code
    assert message in str(refused.value.details())


async def test_the_smallest_top_p_is_the_best_token(ann):
    best = await ann.generate("a", max_tokens=4, temperature=0.0)
    for tiny in ({"top_p": 1e-40}, {"temperature": 1e-40}):
        reply = await ann.generate("a", max_tokens=4, **{"temperature": 1.0, **tiny})
        assert reply.choices[0].token_ids == best.choices[0].token_ids


async def test_a_correction_that_says_the_same_is_refused(ann):
    reply = await ann.generate("hello", max_tokens=3, temperature=0.0)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.feedback(reply.request_id, correction=reply.choices[0].text)
    assert refused.value.code() is CODE.INVALID_ARGUMENT


async def test_unknown_and_foreign_requests_are_refused(server, ann):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.feedback("never-made", score=1.0)
    assert refused.value.code() is CODE.NOT_FOUND
    reply = await ann.generate("hello", max_tokens=3)
    async with client_of(server, "bob") as bob:  # another tenant: it does not even exist
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await bob.feedback(reply.request_id, score=1.0)
    assert refused.value.code() is CODE.NOT_FOUND


async def test_requests_that_are_not_to_be_kept_leave_nothing(ann):
    reply = await ann.generate("hello", max_tokens=3, learn=False)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.feedback(reply.request_id, score=1.0)
    assert refused.value.code() is CODE.NOT_FOUND


async def test_a_used_request_id_is_refused(ann):
    await ann.generate("hello", max_tokens=3, request_id="mine")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.generate("hello", max_tokens=3, request_id="mine")
    assert refused.value.code() is CODE.ALREADY_EXISTS


async def test_wrong_and_missing_keys_are_refused(server, ann):
    channel = grpc.aio.insecure_channel(server.grpc)
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateRequest(text="a")
    stream = inference_pb2.GenerateStreamRequest(request=request)
    for metadata in ((), (("authorization", "Bearer wrong"),)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(request, metadata=metadata)
        assert refused.value.code() is CODE.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.GenerateStream(stream, metadata=metadata):
                pass
        assert refused.value.code() is CODE.UNAUTHENTICATED
    await channel.close(None)
