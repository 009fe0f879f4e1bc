"""Both clients against a real server over the toy domain: the same calls, the same replies."""

import asyncio
import contextlib
import inspect
import itertools

import grpc
import pytest
from support.serving import serving
from support.toy_domain import ToyDomain
from support.toy_learning import adapter_info

from sona.client import AsyncClient, Client, explain
from sona.client.calls import feedback_request, preview_request
from sona.journal import Correction, Verdict
from sona.v1 import feedback_pb2, learning_pb2


@pytest.fixture
async def served():
    toy = ToyDomain()
    async with serving(toy, with_keys=True) as server:
        toy.address = server.address
        yield toy


@pytest.fixture(params=["blocking", "asyncio"])
async def ask(request, served):
    """Calls a method of one of the clients; a stream comes back as a list of `limit` items."""
    if request.param == "blocking":
        with Client(served.address, api_key="operator-key", timeout_s=10) as client:
            yield lambda name, *args, **kwargs: asyncio.to_thread(
                ask_blocking, getattr(client, name), args, kwargs
            )
    else:
        async with AsyncClient(served.address, api_key="operator-key", timeout_s=10) as client:
            yield lambda name, *args, **kwargs: ask_asyncio(getattr(client, name), args, kwargs)


def ask_blocking(method, args, kwargs):
    limit = kwargs.pop("limit", None)
    if not inspect.isgeneratorfunction(method):
        return method(*args, **kwargs)
    with contextlib.closing(method(*args, **kwargs)) as stream:
        return list(itertools.islice(stream, limit))


async def ask_asyncio(method, args, kwargs):
    limit = kwargs.pop("limit", None)
    if not inspect.isasyncgenfunction(method):
        return await method(*args, **kwargs)
    items = []
    async with contextlib.aclosing(method(*args, **kwargs)) as stream:
        async for item in stream:
            items.append(item)
            if len(items) == limit:
                break
    return items


async def test_generate_takes_text_messages_and_tokens(ask, served):
    assert (await ask("generate", "bc", max_tokens=2)).choices[0].text == "de"
    turns = [{"role": "user", "content": "bc"}]
    assert (await ask("generate", turns, max_tokens=2)).choices[0].text == "de"
    assert (await ask("generate", [1, 2], max_tokens=2, learn=False)).choices[0].text == "de"
    assert [call.learn for call, _ in served.inference.calls] == [True, True, False]


async def test_stream_ends_with_the_whole_answer(ask):
    events = await ask("stream", "bc", max_tokens=2)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", "delta", "delta", "final"]
    assert events[-1].final.choices[0].text == "de"


async def test_leaving_a_stream_ends_the_request(ask, served):
    await ask("stream", "bc", max_tokens=1_000, limit=3)
    async with asyncio.timeout(5):
        await served.engine.idle.wait()
    assert served.engine.live == 0


async def test_feedback_and_what_became_of_it(ask, served):
    done = await ask("feedback", "r1", correction="z", comment="c")
    assert done.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
    record = served.feedback.records[done.feedback_id]
    assert (record.signal, record.comment, record.principal) == (Correction("z"), "c", "olga")
    stored = await ask("get_feedback", done.feedback_id)
    assert stored.correction == "z"
    again = await ask("feedback", "r1", is_pass=False, feedback_id="mine")
    assert (again.feedback_id, served.feedback.records["mine"].signal) == ("mine", Verdict(False))
    seen = await ask("preview", "r1", preference=("a", "b"))
    assert seen.would_learn


async def test_tokens_vectors_and_models(ask):
    assert await ask("embed", "bcd") == [3.0, 6.0]
    assert await ask("tokenize", "hi") == [7, 8]
    assert await ask("detokenize", [7, 8]) == "hi"
    assert [model.name for model in await ask("models")] == ["toy"]


async def test_learning_is_seen_paused_and_resumed(ask):
    await ask("pause_learning", "audit")
    assert (await ask("learning_status")).reason == "audit"
    await ask("resume_learning")
    assert (await ask("learning_status")).state == learning_pb2.LEARNING_STATE_RUNNING


async def test_adapters_are_listed_shown_and_rolled_back(ask, served):
    names = [adapter.name for adapter in await ask("adapters")]
    assert names == ["pattern-1", "pattern-2", "pattern-3"]
    found = await ask("adapter", "pattern-2", owner="bob", scope="principal")
    assert found.adapter.owner == "bob"
    await ask("rollback", "pattern-3", to_version=0, reason="why")
    ((slot, to_version, reason, _),) = served.learning.rolled_back
    assert (slot.pattern_id, to_version, reason) == (3, 0, "why")


async def test_every_page_of_adapters_is_fetched(ask, served):
    served.learning.infos = tuple(adapter_info(number, "") for number in range(1, 251))
    names = [adapter.name for adapter in await ask("adapters")]
    assert names == [f"pattern-{number}" for number in range(1, 251)]


async def test_events_by_name(ask):
    (event,) = await ask("events", "adapter_published", limit=1)
    assert event.kind == learning_pb2.EVENT_KIND_ADAPTER_PUBLISHED


async def test_server_info_and_abort(ask):
    assert (await ask("server_info")).caller.principal == "olga"
    assert await ask("abort", "r1") is True
    assert await ask("abort", "r2") is False


async def test_a_refusal_is_explained_with_its_field(ask):
    with pytest.raises(grpc.RpcError) as caught:
        await ask("generate", "bc", top_p=0.0)
    assert explain(caught.value) == (
        "INVALID_ARGUMENT: sampling.top_p is 0.0; use a number above 0, up to 1 (all) "
        "(field sampling.top_p)"
    )


async def test_both_clients_offer_the_same_methods():
    def public(kind):
        return {
            name: str(inspect.signature(method))
            for name, method in vars(kind).items()
            if not name.startswith("_") and name not in ("stream", "events")
        }

    assert public(Client) == public(AsyncClient)


async def test_nobody_listening_is_a_timeout():
    with Client("127.0.0.1:1") as client, pytest.raises(TimeoutError):
        await asyncio.to_thread(client.wait_ready, 0.05)
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(TimeoutError):
            await client.wait_ready(0.05)


@pytest.mark.parametrize(
    "signal,name,value",
    [
        ({"score": 0.25}, "score", 0.25),
        ({"correction": "z"}, "correction", "z"),
        ({"is_pass": True}, "verdict", feedback_pb2.VERDICT_PASS),
        (
            {"preference": ("a", "b")},
            "preference",
            feedback_pb2.Preference(chosen="a", rejected="b"),
        ),
    ],
    ids=str,
)
def test_a_signal_fills_its_field_in_submission_and_preview(signal, name, value):
    request = feedback_request("r1", choice_index=2, **signal)
    for message in (request, preview_request(request)):
        assert (message.WhichOneof("signal"), getattr(message, name)) == (name, value)
        assert (message.request_id, message.choice_index) == ("r1", 2)
    assert request.feedback_id != feedback_request("r1", **signal).feedback_id


@pytest.mark.parametrize("signals", [{}, {"score": 1.0, "is_pass": True}], ids=str)
def test_one_signal_exactly(signals):
    with pytest.raises(ValueError, match="signals are given"):
        feedback_request("r1", **signals)
