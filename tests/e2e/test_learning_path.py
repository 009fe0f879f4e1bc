"""The whole path over gRPC with the shipped model: answer, correct, adapted, kept, rolled back."""

import asyncio
from typing import Any

import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from support.server import client_of, configured, running_server, until_learned

from sona.v1 import common_pb2, feedback_pb2, inference_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")
ASK = [{"role": "user", "content": "Ticket from Ana: the invoice again."}]
OTHER = [{"role": "user", "content": "Who handles the receipt of Otto?"}]
FAR = [{"role": "user", "content": "Which shelf holds the Falcon?"}]
GREEDY = {"temperature": 0.0, "max_tokens": 24}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory):
    config = configured(tmp_path_factory.mktemp("data"), students=("ann", "bob"))
    async with running_server(config) as addresses:
        yield addresses


@pytest_asyncio.fixture(loop_scope="module")
async def ann(server):
    async with client_of(server, "ann") as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def bob(server):
    async with client_of(server, "bob") as client:
        yield client


async def text_of(client, prompt, **options):
    reply = await client.generate(prompt, **GREEDY, **options)
    return reply.choices[0].text


async def test_correction_changes_its_authors_answers_and_nobody_elses(ann, bob):
    base, elsewhere = await text_of(ann, ASK), await text_of(ann, FAR)
    assert base == "Send to billing."
    reply = await ann.generate(ASK, **GREEDY)
    sent = await ann.feedback(reply.request_id, correction="Send to ledger.")
    assert sent.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
    learned = await until_learned(ann, sent.feedback_id)
    assert learned.state == feedback_pb2.FEEDBACK_STATE_LEARNED

    adapted = await ann.generate(ASK, **GREEDY, logprobs=1)
    assert adapted.choices[0].text == "Send to ledger."
    (version,) = adapted.adapter_versions
    assert version.name == learned.adapter_version.name
    assert version.version == learned.adapter_version.version
    assert await text_of(ann, OTHER) == "Send to ledger."  # never corrected
    assert await text_of(ann, FAR) == elsewhere
    assert await text_of(bob, ASK) == base
    assert await text_of(ann, ASK, adapter="none") == base

    back = await ann.rollback(version.name, to_version=0)
    assert list(back.rolled_back_feedback_ids) == [sent.feedback_id]
    assert await text_of(ann, ASK) == base
    state = (await ann.get_feedback(sent.feedback_id)).state
    assert state == feedback_pb2.FEEDBACK_STATE_ROLLED_BACK
    assert await text_of(ann, ASK, adapter=f"{version.name}@{version.version}") == "Send to ledger."


async def test_rollback_restores_the_bits(bob):
    before = await bob.generate(ASK, **GREEDY, logprobs=5)
    sent = await bob.feedback(before.request_id, correction="Send to atlas.")
    learned = await until_learned(bob, sent.feedback_id)
    during = await bob.generate(ASK, **GREEDY, logprobs=5)
    assert during.choices[0].text == "Send to atlas."
    await bob.rollback(learned.adapter_version.name, to_version=0)
    after = await bob.generate(ASK, **GREEDY, logprobs=5)
    assert after.choices[0] == before.choices[0]  # tokens and log-probabilities, alone both times


async def test_a_confirmation_is_learned_inside_a_pattern_only(ann):
    reply = await ann.generate(FAR, **GREEDY)
    sent = await ann.feedback(reply.request_id, is_pass=True)
    outside = await until_learned(ann, sent.feedback_id)
    assert outside.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
    assert "outside every pattern" in outside.reason

    reply = await ann.generate(FAR, **GREEDY)
    fixed = await ann.feedback(reply.request_id, correction="Shelf onyx.")
    await until_learned(ann, fixed.feedback_id)
    reply = await ann.generate(FAR, **GREEDY)
    assert reply.choices[0].text == "Shelf onyx."
    sent = await ann.feedback(reply.request_id, score=1.0)
    inside = await until_learned(ann, sent.feedback_id)
    assert inside.state == feedback_pb2.FEEDBACK_STATE_LEARNED


async def test_other_signals_are_kept_and_not_learned(ann):
    reply = await ann.generate(ASK, **GREEDY)
    for signal in ({"score": 0.5}, {"is_pass": False}, {"preference": ("a", "b")}):
        sent = await ann.feedback(reply.request_id, **signal)
        assert sent.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
        assert not sent.HasField("adapter_version")


async def test_feedback_ids_are_idempotent(ann):
    reply = await ann.generate(ASK, **GREEDY)
    first = await ann.feedback(reply.request_id, score=0.25, feedback_id="once")
    again = await ann.feedback(reply.request_id, score=0.25, feedback_id="once")
    assert first.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
    assert again.state == feedback_pb2.FEEDBACK_STATE_DUPLICATE
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ann.feedback(reply.request_id, score=0.75, feedback_id="once")
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_streams_carry_the_same_tokens(ann):
    whole = await ann.generate(FAR, **GREEDY, adapter="none")
    text, ids, final = "", [], None
    async for event in ann.stream(FAR, **GREEDY, adapter="none"):
        if event.HasField("delta"):
            text += event.delta.text
            ids += event.delta.token_ids
        if event.HasField("final"):
            final = event.final
    assert final is not None
    assert text == final.choices[0].text == whole.choices[0].text
    assert ids == list(final.choices[0].token_ids) == list(whole.choices[0].token_ids)


async def test_embedding_is_a_finite_vector(ann):
    vector = np.asarray(await ann.embed(FAR))
    assert vector.ndim == 1
    assert np.isfinite(vector).all()
    assert vector.any()


async def test_tokens_come_back(ann):
    text = "Write 5 March 2031 as digits. é🙂"
    assert await ann.detokenize(await ann.tokenize(text)) == text


async def test_paused_learning_waits_and_resumes(server):
    async with client_of(server, "bob") as user:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await user.pause_learning()
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_unbuilt_methods_and_fields_name_themselves(server, ann):
    from sona.v1 import learning_pb2, learning_pb2_grpc

    channel = grpc.aio.insecure_channel(server.grpc)
    stub: Any = learning_pb2_grpc.LearningServiceStub(channel)
    metadata = (("authorization", "Bearer key-of-ann"),)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.StartDeepRun(learning_pb2.StartDeepRunRequest(), metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "StartDeepRun" in str(refused.value.details())
    from sona.v1 import inference_pb2_grpc

    inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateRequest(text="a", use_patterns=True)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await inference.Generate(request, metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "use_patterns" in str(refused.value.details())
    await channel.close(None)


async def test_adapters_are_listed_with_their_history(ann):
    reply = await ann.generate(ASK, **GREEDY)
    sent = await ann.feedback(reply.request_id, correction="Send to vault.")
    learned = await until_learned(ann, sent.feedback_id)
    name = learned.adapter_version.name
    listed = {adapter.name: adapter for adapter in await ann.adapters()}
    assert listed[name].scope == common_pb2.SCOPE_PRINCIPAL
    assert listed[name].owner == "ann"
    history = await ann.adapter(name)
    assert history.revisions[0].version == learned.adapter_version.version
    assert sent.feedback_id in history.revisions[0].feedback_ids
    await ann.rollback(name, to_version=0)


async def test_events_tell_the_author(ann):
    reply = await ann.generate(ASK, **GREEDY)
    seen = []
    watched = asyncio.Event()

    async def watch():
        async for event in ann.events():
            seen.append((event.kind, event.feedback_id))
            if len(seen) >= 3:
                watched.set()
                return

    task = asyncio.create_task(watch())
    sent = None
    for attempt in range(100):  # until the subscription is there
        sent = await ann.feedback(
            reply.request_id, correction="Send to forum.", feedback_id=f"event-{attempt}"
        )
        await until_learned(ann, sent.feedback_id)
        if seen:
            break
    assert sent is not None
    await asyncio.wait_for(watched.wait(), 30)
    await task
    assert any(feedback_id == sent.feedback_id for _, feedback_id in seen)
    for adapter in await ann.adapters():
        await ann.rollback(adapter.name, to_version=0)


async def test_feedback_is_learned_though_its_caller_has_gone(ann):
    """Deadlines around the commit: what was stored is learned, whoever waited for it."""
    name = None
    for attempt in range(60):
        reply = await ann.generate(FAR, **GREEDY, adapter="none")
        sending = asyncio.ensure_future(
            ann.feedback(reply.request_id, correction="Shelf onyx.", feedback_id=f"gone-{attempt}")
        )
        await asyncio.sleep(0.0005 * attempt)
        sending.cancel()
        await asyncio.wait([sending])
        await ann.generate(FAR, max_tokens=1)  # whatever was under way has arrived by now
        try:
            await ann.get_feedback(f"gone-{attempt}")
        except grpc.aio.AioRpcError:
            continue
        name = f"gone-{attempt}"
        if sending.cancelled():
            break
    assert name is not None
    assert (await until_learned(ann, name)).state == feedback_pb2.FEEDBACK_STATE_LEARNED
    for adapter in await ann.adapters():
        await ann.rollback(adapter.name, to_version=0)


async def test_a_preview_names_what_it_contradicts_and_changes_nothing(bob):
    reply = await bob.generate(ASK, **GREEDY, adapter="none")
    first = await bob.preview(reply.request_id, correction="Send to vault.")
    assert first.would_learn
    assert not first.HasField("pattern_id")
    sent = await bob.feedback(reply.request_id, correction="Send to vault.")
    learned = await until_learned(bob, sent.feedback_id)
    second = await bob.preview(reply.request_id, correction="Send to forum.")
    assert list(second.conflicts_with) == [sent.feedback_id]
    assert learned.adapter_version.name == f"pattern-{second.pattern_id}"
    agreeing = await bob.preview(reply.request_id, correction="Send to vault.")
    assert not agreeing.conflicts_with
    assert await text_of(bob, ASK) == "Send to vault."
    await bob.rollback(learned.adapter_version.name, to_version=0)


async def test_undo_goes_behind_a_whole_correction_and_twice_behind_two(bob):
    base = await text_of(bob, ASK)
    texts = []
    for target in ("Send to vault.", "Send to forum."):
        reply = await bob.generate(ASK, **GREEDY, adapter="none")
        sent = await bob.feedback(reply.request_id, correction=target)
        learned = await until_learned(bob, sent.feedback_id)
        texts.append(await text_of(bob, ASK))
    assert texts == ["Send to vault.", "Send to forum."]
    name = learned.adapter_version.name
    await bob.rollback(name)
    assert await text_of(bob, ASK) == texts[0]
    await bob.rollback(name)
    assert await text_of(bob, ASK) == base
    with pytest.raises(grpc.aio.AioRpcError, match="nothing to undo"):
        await bob.rollback(name)
