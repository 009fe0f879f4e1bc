"""The engine for many users, as they meet it on the wire: time, pressure, prefixes, forms, n."""

import asyncio
import json
from typing import Any

import grpc.aio
import jsonschema
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support.checkpoints import make_checkpoint
from support.server import client_of, configured, running_server, until_learned

from sona.v1 import feedback_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")
CODE = grpc.StatusCode
GREEDY = {"temperature": 0.0, "ignore_eos": True}
LONG = "the same words at the beginning of every question that is asked here, and then: "


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint(model, "qwen3")
    config = configured(
        tmp_path_factory.mktemp("data"), model=model, students=("ann", "bob"),
        engine={"max_num_seqs": 4, "max_waiting": 4, "max_learned_slots": 8, "num_pages": 200},
    )  # fmt: skip
    async with running_server(config) as addresses:
        yield addresses


@pytest_asyncio.fixture(loop_scope="module")
async def ann(server):
    async with client_of(server, "ann") as client:
        yield client
        reply = await client.generate("still serving?", max_tokens=2)
        assert reply.usage.completion_tokens == 2


def retry_delay(refused: Any):
    status = rpc_status.from_call(refused)
    assert status is not None
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToTimedelta().total_seconds()
    return None


async def test_a_request_that_cannot_finish_in_time_is_not_begun(server):
    async with client_of(server, "ann") as measured:  # the engine learns its own pace
        await measured.generate(LONG, max_tokens=200, **GREEDY)
    async with client_of(server, "ann", timeout_s=0.05) as hasty:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await hasty.generate(LONG, max_tokens=400, **GREEDY)
    assert refused.value.code() is CODE.DEADLINE_EXCEEDED


async def test_a_full_queue_says_when_to_come_again(ann):
    crowd = [ann.generate(LONG, max_tokens=60, **GREEDY) for _ in range(24)]
    outcomes: list[Any] = await asyncio.gather(*crowd, return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    served = [one for one in outcomes if not isinstance(one, BaseException)]
    assert len(served) + len(refused) == 24
    assert len(served) >= 8  # as many as run and wait
    assert refused, "4 run and 4 wait; 24 came"
    for each in refused:
        assert each.code() is CODE.RESOURCE_EXHAUSTED
        assert 0 < (retry_delay(each) or 0) <= 600
    assert len({tuple(one.choices[0].token_ids) for one in served}) == 1


async def test_a_prefix_is_cached_within_its_salt_alone(server, ann):
    prompt = "a prompt that nobody has sent before this test, long enough for some whole pages"
    first = await ann.generate(prompt, max_tokens=8, **GREEDY)
    assert first.usage.cached_prompt_tokens == 0
    again = await ann.generate(prompt, max_tokens=8, **GREEDY)
    num_prompt = again.usage.prompt_tokens
    assert num_prompt - 16 <= again.usage.cached_prompt_tokens < num_prompt
    assert again.choices[0].token_ids == first.choices[0].token_ids
    salted = await ann.generate(prompt, max_tokens=8, cache_salt="mine", **GREEDY)
    assert salted.usage.cached_prompt_tokens == 0
    async with client_of(server, "bob") as bob:
        foreign = await bob.generate(prompt, max_tokens=8, **GREEDY)
    assert foreign.usage.cached_prompt_tokens == 0
    assert foreign.choices[0].token_ids == first.choices[0].token_ids


async def test_a_session_outlives_a_crowd_of_strangers(ann):
    """200 pages of 16; the strangers need 40 prompts of 25 pages and more."""
    talk = "once upon a time there was a conversation that someone meant to come back to"
    options = {"max_tokens": 4, **GREEDY}
    await ann.generate(talk, session_id="tale", **options)
    forgotten = "somebody else who said as much, and who never named a session to be kept in"
    await ann.generate(forgotten, **options)
    for at in range(40):
        await ann.generate(f"{at:03}" + "x" * 400, **options)
    kept = await ann.generate(talk, session_id="tale", **options)
    assert kept.usage.cached_prompt_tokens >= kept.usage.prompt_tokens - 16
    gone = await ann.generate(forgotten, **options)
    assert gone.usage.cached_prompt_tokens == 0


async def test_answers_of_one_request_take_feedback_each_for_itself(ann):
    reply = await ann.generate(LONG, n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    assert [one.index for one in reply.choices] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in reply.choices}) > 1
    assert reply.usage.completion_tokens == 18
    sent = await ann.feedback(reply.request_id, choice_index=2, correction="so it is")
    learned = await until_learned(ann, sent.feedback_id)
    assert learned.state == feedback_pb2.FEEDBACK_STATE_LEARNED
    again = await ann.generate(LONG, temperature=0.0, max_tokens=30)
    assert again.choices[0].text.startswith("so it is")  # the answer was cut: so is its end
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.feedback(reply.request_id, choice_index=3, score=1.0)
    assert refused.value.code() is CODE.INVALID_ARGUMENT


async def test_deltas_name_their_answer(ann):
    texts = ["", "", ""]
    final = None
    async for event in ann.stream(LONG, n=3, temperature=1.5, seed=9, max_tokens=12):
        if event.HasField("delta"):
            texts[event.delta.choice_index] += event.delta.text
        elif event.HasField("final"):
            final = event.final
    assert final is not None
    assert texts == [one.text for one in final.choices]


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"choice": ["yes", "no", "né 🌍"]}, lambda text: text in ("yes", "no", "né 🌍")),
        ({"regex": r"[0-9]{4}-[0-9]{2}"}, lambda text: len(text) == 7 and text[4] == "-"),
        ({"grammar": 'start: "a" "b"+ "c"'}, lambda text: text[0] + text[-1] == "ac"),
    ],
)
async def test_an_answer_has_its_form(ann, form, fits):
    for seed in range(5):
        reply = await ann.generate("x", temperature=1.0, seed=seed, max_tokens=60, **form)
        answer = reply.choices[0]
        assert answer.finish_reason != 0
        if len(answer.token_ids) < 60:
            assert fits(answer.text), answer.text


async def test_an_answer_fits_its_schema_while_learning_goes_on(ann):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "maximum": 99}},
        "required": ["kind", "n"],
        "additionalProperties": False,
    }
    crowd = [
        ann.generate("say", json_schema=schema, temperature=1.0, seed=seed, max_tokens=80)
        for seed in range(6)
    ]
    for reply in await asyncio.gather(*crowd):
        if len(reply.choices[0].token_ids) < 80:
            jsonschema.validate(json.loads(reply.choices[0].text), schema)


async def test_stop_strings_that_overlap_end_the_answer_at_the_first(ann):
    whole = (await ann.generate("abc", max_tokens=40, **GREEDY)).choices[0].text
    start, text = 5, whole[5:8]
    assert len(text) == 3
    stops = [text, text[1:], whole[start - 1 : start + 4]]
    reply = await ann.generate("abc", max_tokens=40, stop=stops, **GREEDY)
    first = min(at for at in map(whole.find, stops) if at >= 0)
    assert reply.choices[0].text == whole[:first]


async def test_logprobs_of_the_prompt_and_of_a_continuation_agree(ann):
    ids = await ann.tokenize("one two three")
    both = await ann.generate(ids, max_tokens=1, prompt_logprobs=0, **GREEDY)
    scored = await ann.score("one two", " three", adapter="none")
    of_prompt = [one.logprob for one in both.prompt_logprobs]
    of_rest = [one.logprob for one in scored.logprobs]
    assert len(of_prompt) == len(ids) - 1
    assert of_prompt[-len(of_rest) :] == pytest.approx(of_rest, abs=1e-4)
