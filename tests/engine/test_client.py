"""The whole engine on a small random model: alone, together, preempted, cancelled, adapted."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from reference import decoder as reference
from support.checkpoints import make_checkpoint
from support.engines import final, greedy, running_engine
from support.loras import random_lora

from engine.api import FinishReason, HeadRef, HeadTable, Job, LoraRef, SamplingParams
from engine.client import MAX_JOINED
from engine.errors import (
    DuplicateJob,
    EngineError,
    EngineStopped,
    InvalidJob,
    QueueFull,
    ShapeError,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    config, tensors = make_checkpoint(directory, "qwen3")
    return directory, config, tensors


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


async def test_greedy_tokens_captures_and_vector_match_the_reference(checkpoint):
    directory, config, tensors = checkpoint
    ids = prompt(0, 90)  # two chunks
    async with running_engine(directory) as engine:
        got = await final(engine, greedy("a", ids, 8, logprobs=3))
    tokens = list(ids)
    for step, token in enumerate(got.token_ids):
        hidden = reference.hidden_states(tensors, config, tokens)
        logits = reference.logits(tensors, hidden[-1:])[0]
        assert token == logits.argmax()
        if step == 0:
            np.testing.assert_allclose(got.prompt_vector, hidden.mean(axis=0), atol=1e-4)
        total = np.logaddexp.reduce(logits)
        order = np.argsort(-logits)[:64]
        capture = got.capture
        assert capture is not None
        np.testing.assert_allclose(
            capture.hidden[step].astype(np.float32), hidden[-1], rtol=2**-7, atol=1e-3
        )
        np.testing.assert_array_equal(capture.top_ids[step][:20], order[:20])
        np.testing.assert_allclose(capture.top_logprobs[step], logits[order] - total, atol=1e-4)
        rest = np.delete(logits, order)
        np.testing.assert_allclose(
            capture.rest_logprob[step], np.logaddexp.reduce(rest) - total, atol=1e-4
        )
        tokens.append(token)


@pytest.mark.parametrize("deterministic", [False, True])
async def test_together_and_preempted_equals_alone(checkpoint, deterministic):
    lengths = [3, 70, 129, 40, 200, 65, 16, 5, 90]
    jobs = [(f"r{i}", prompt(i, n), 120 + 10 * i) for i, n in enumerate(lengths)]
    async with running_engine(checkpoint[0], num_pages=34, deterministic=deterministic) as engine:
        alone = [await final(engine, greedy(*job)) for job in jobs]
        assert engine.stats().num_preemptions == 0
        together = await asyncio.gather(*(final(engine, greedy(*job)) for job in jobs))
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_pages + stats.num_idle_pages == stats.num_pages
    assert stats.num_recompiles == 0
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.capture is not None and other.capture is not None
        np.testing.assert_array_equal(one.capture.top_ids[:, 0], other.capture.top_ids[:, 0])
        if deterministic:
            for array in ("hidden", "top_ids", "top_logprobs", "rest_logprob"):
                np.testing.assert_array_equal(
                    getattr(one.capture, array), getattr(other.capture, array)
                )
            np.testing.assert_array_equal(one.prompt_vector, other.prompt_vector)
        else:  # candidates a rounding apart may change places; their logprobs are then as close
            for array in ("top_logprobs", "rest_logprob"):
                np.testing.assert_allclose(
                    getattr(one.capture, array), getattr(other.capture, array), rtol=1e-4, atol=1e-4
                )
            np.testing.assert_allclose(
                one.capture.hidden.astype(np.float32),
                other.capture.hidden.astype(np.float32),
                rtol=2**-7,
                atol=1e-3,
            )
            np.testing.assert_allclose(one.prompt_vector, other.prompt_vector, atol=1e-4)


async def test_closing_the_stream_frees_its_pages_at_once(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        stream = engine.generate(greedy("a", prompt(0, 100), 300))
        await anext(stream)
        before = engine.stats()
        assert before.num_free_pages < before.num_pages
        await stream.aclose()
        await engine.embed(
            Job(request_id="fence", prompt_ids=(1,))
        )  # runs after the cancel was taken
        after = engine.stats()
        assert after.num_free_pages + after.num_idle_pages == after.num_pages
        assert (
            after.num_steps - before.num_steps <= 3
        )  # one decode, the fence's prefill, at most one more


async def test_abort_ends_as_cancelled(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        stream = engine.generate(greedy("a", prompt(0, 10), 400))
        await anext(stream)
        assert engine.abort("a")
        reasons = [u.final.finish_reason async for u in stream if u.final is not None]
        assert reasons == [FinishReason.CANCELLED]
        assert not engine.abort("a")


async def test_abort_before_the_first_token_ends_every_answer(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        stream = engine.generate(greedy("a", prompt(0, 300), 40, n=3))
        begun = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # it is submitted
        assert engine.abort("a")
        updates = [await begun, *[update async for update in stream]]
        reasons = [update.final.finish_reason for update in updates if update.final is not None]
        assert reasons == [FinishReason.CANCELLED] * 3
        assert (await final(engine, greedy("a", prompt(1, 9), 5))).num_completion_tokens == 5


async def test_a_teacher_forced_pass_is_of_the_base_model(checkpoint):
    lora = LoraRef("l", 1, ("l",), random_lora(checkpoint[1], seed=1))
    async with running_engine(checkpoint[0]) as engine:
        job = replace(greedy("c", prompt(0, 20), 5), lora=lora)
        with pytest.raises(InvalidJob, match="of the base model"):
            await engine.capture(job, (1, 2))


async def test_a_slow_reader_gets_what_waited_as_one_update(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        alone = await final(engine, greedy("alone", prompt(2, 10), 30))
        stream = engine.generate(greedy("slow", prompt(2, 10), 30))
        first = await anext(stream)
        await final(engine, greedy("long", prompt(5, 10), 60))  # the other one ends meanwhile
        (rest,) = [update async for update in stream]
    assert rest.final is not None
    assert len(first.tokens) < 30
    assert [t.token_id for t in first.tokens + rest.tokens] == list(alone.token_ids)
    assert first.text + rest.text == alone.text


async def test_what_waits_for_a_slow_reader_is_joined_up_to_a_bound(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        stream = engine.generate(greedy("slow", prompt(2, 10), 300))
        first = await anext(stream)
        await final(engine, greedy("long", prompt(5, 10), 400))
        sizes = [len(update.tokens) async for update in stream]
    assert sizes[0] == MAX_JOINED
    assert len(first.tokens) + sum(sizes) == 300


async def test_what_waits_before_the_engine_ends_is_still_read(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        stream = engine.generate(greedy("cut", prompt(2, 10), 400))
        await anext(stream)
        await final(engine, greedy("other", prompt(5, 10), 20))
        engine.close()
        await engine.ended.wait()
        read = await anext(stream)
        assert read.final is None
        assert len(read.tokens) > 10
        with pytest.raises(EngineStopped):
            await anext(stream)


async def test_stops_and_lengths(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        free = await final(engine, greedy("free", prompt(3, 20), 12))
        assert free.finish_reason is FinishReason.LENGTH
        third = free.token_ids[2]
        by_id = await final(engine, greedy("id", prompt(3, 20), 12, stop_token_ids=(third,)))
        assert by_id.finish_reason is FinishReason.STOP
        assert by_id.stop_match == third
        assert by_id.token_ids == free.token_ids[: free.token_ids.index(third) + 1]
        full = await final(engine, greedy("full", prompt(4, 505), 100))
        assert full.finish_reason is FinishReason.LENGTH
        assert full.num_completion_tokens == 512 - 505


async def test_logprobs_are_of_the_adapted_distribution(checkpoint):
    directory, config, tensors = checkpoint
    ids = prompt(5, 12)
    hidden = reference.hidden_states(tensors, config, ids)[-1]
    logits = reference.logits(tensors, hidden[None])[0]
    base = int(logits.argmax())
    target = int(np.argsort(logits)[100])
    table = HeadTable(
        keys=np.zeros((1, 48), np.float32),
        token_ids=np.array([base], np.int32),
        token_keys=np.array([[50.0]], np.float32),
        const_keys=np.zeros(1, np.float32),
        row_ids=np.array([target], np.int32),
        values=np.ones((1, 1), np.float32),
    )
    head = HeadRef("pattern-1", 3, ("t", "principal", "p", "1"), table)
    job = Job(
        request_id="x",
        prompt_ids=tuple(ids),
        choose_head=lambda _: head,
        sampling=SamplingParams(temperature=0.0, max_tokens=1, logprobs=2),
        capture=True,
    )
    async with running_engine(directory) as engine:
        updates = [update async for update in engine.generate(job)]
        plain = await final(engine, greedy("y", ids, 1))
    token = updates[-1].tokens[0]
    logits[target] += 50.0
    total = np.logaddexp.reduce(logits)
    order = np.argsort(-logits)
    assert token.token_id == target
    assert token.logprob == pytest.approx(logits[target] - total, abs=1e-4)
    assert [top.token_id for top in token.top] == order[:2].tolist()
    last = updates[-1].final
    assert last is not None and last.head is head and last.capture is not None
    assert last.capture.top_ids[0, 0] == base  # captures are of the base
    assert plain.token_ids == (base,)


async def test_a_teacher_forced_pass_agrees_with_generation(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        ids = prompt(6, 37)
        answer = await final(engine, greedy("a", ids, 50))
        job = Job(request_id="s", prompt_ids=tuple(ids))
        scored = await engine.capture(job, answer.token_ids)
        assert answer.capture is not None
        np.testing.assert_array_equal(scored.capture.top_ids[:, 0], answer.capture.top_ids[:, 0])
        np.testing.assert_allclose(
            scored.capture.top_logprobs, answer.capture.top_logprobs, atol=1e-4
        )
        np.testing.assert_allclose(scored.prompt_vector, answer.prompt_vector, atol=1e-4)
        stats = engine.stats()
        assert stats.num_free_pages + stats.num_idle_pages == stats.num_pages


async def test_a_teacher_forced_pass_waits_for_users_and_loses_its_pages_first(checkpoint):
    forced = Job(request_id="s", prompt_ids=tuple(prompt(9, 300)))
    async with running_engine(checkpoint[0], num_pages=33) as engine:
        order = []

        async def user(index):
            result = await final(engine, greedy(f"u{index}", prompt(index, 200), 60))
            order.append(f"u{index}")
            return result

        async def learner():
            result = await engine.capture(forced, tuple(prompt(10, 100)))
            order.append("s")
            return result

        *_, scored = await asyncio.gather(user(0), user(1), user(2), learner())
        alone = await engine.capture(forced, tuple(prompt(10, 100)))
    assert order[-1] == "s"
    np.testing.assert_allclose(scored.capture.top_logprobs, alone.capture.top_logprobs, atol=1e-5)


def random_head(seed, rank=2):
    rng = np.random.default_rng(seed)
    table = HeadTable(
        keys=rng.standard_normal((rank, 48)).astype(np.float32),
        token_ids=np.zeros(0, np.int32),
        token_keys=np.zeros((rank, 0), np.float32),
        const_keys=np.zeros(rank, np.float32),
        row_ids=np.arange(40, dtype=np.int32) + seed,
        values=rng.standard_normal((rank, 40)).astype(np.float32),
    )
    return HeadRef(f"pattern-{seed}", 1, ("t", str(seed)), table)


def with_head(head, job):
    return replace(job, choose_head=lambda _: head)


async def test_more_heads_than_slots_wait_for_each_other(checkpoint):
    heads = [random_head(i) for i in range(9)]

    def job(index, request_id):
        return with_head(heads[index], greedy(request_id, prompt(1, 9), 20))

    async with running_engine(checkpoint[0], max_learned_slots=3) as engine:
        alone = [await final(engine, job(i, f"a{i}")) for i in range(9)]
        both = await asyncio.gather(*(final(engine, job(i, f"b{i}")) for i in range(9)))
        stats = engine.stats()
    assert [a.token_ids for a in alone] == [b.token_ids for b in both]
    assert len({a.token_ids for a in alone}) > 1
    assert stats.num_recompiles == 0
    assert stats.num_resident_heads == 2


async def test_slots_and_pages_are_never_held_against_each_other(checkpoint):
    """One slot. `parked` holds the pages that `young` needs, `young` must not keep its slot."""
    first, second = random_head(0), random_head(1)
    jobs = [
        with_head(first, greedy("opens", prompt(0, 20), 10)),
        greedy("grows", prompt(1, 20), 250),
        with_head(second, greedy("parked", prompt(2, 230), 10)),
        with_head(first, greedy("young", prompt(3, 20), 300)),  # shares the slot of `opens`
    ]
    async with running_engine(checkpoint[0], num_pages=33, max_learned_slots=2) as engine:
        alone = [await final(engine, replace(job, request_id=f"a{job.request_id}")) for job in jobs]
        together = asyncio.gather(*(final(engine, job) for job in jobs))
        both = await asyncio.wait_for(together, timeout=60)
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_pages + stats.num_idle_pages == stats.num_pages
    assert [one.token_ids for one in alone] == [other.token_ids for other in both]


async def test_an_id_is_free_again_at_once_after_a_cancel(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        alone = await final(engine, greedy("alone", prompt(1, 20), 30))
        for _ in range(5):
            stream = engine.generate(greedy("a", prompt(0, 100), 300))
            await anext(stream)
            await stream.aclose()
            again = await final(engine, greedy("a", prompt(1, 20), 30))
            assert again.finish_reason is FinishReason.LENGTH
            assert again.token_ids == alone.token_ids


async def test_what_goes_wrong_with_one_request_ends_that_one_only(checkpoint):
    def broken(_):
        raise ZeroDivisionError("a gate that cannot decide")

    wide = with_head(random_head(0, rank=4096), greedy("wide", prompt(0, 20), 8))
    lost = replace(greedy("lost", prompt(0, 20), 8), choose_head=broken)
    async with running_engine(checkpoint[0]) as engine:
        other = asyncio.ensure_future(final(engine, greedy("other", prompt(1, 30), 60)))
        with pytest.raises(ShapeError, match=r"rank 4096.*raise head_rank"):
            await final(engine, wide)
        with pytest.raises(EngineError, match="request lost failed: a gate that cannot decide"):
            await final(engine, lost)
        assert (await other).num_completion_tokens == 60
        stats = engine.stats()
        assert stats.num_free_pages + stats.num_idle_pages == stats.num_pages
        assert engine.stats().num_resident_heads == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "the prompt is empty"),
        ((1,) * 512, "has 512 tokens; the context holds 512"),
        ((1, 300), "token id 300 is outside"),
        ((-1, 5), "token id -1 is outside"),
    ],
)
async def test_bad_prompts_are_refused(checkpoint, ids, message):
    async with running_engine(checkpoint[0]) as engine:
        with pytest.raises(InvalidJob, match=message):
            await final(engine, greedy("a", ids, 4))
        with pytest.raises(InvalidJob, match=message):
            await engine.embed(Job(request_id="b", prompt_ids=ids))


async def test_duplicate_full_and_stopped(checkpoint):
    async with running_engine(checkpoint[0], max_waiting=1) as engine:
        streams = [engine.generate(greedy(f"r{i}", prompt(i, 5), 400)) for i in range(5)]
        await anext(streams[0])
        with pytest.raises(DuplicateJob, match="r0 is already running"):
            await final(engine, greedy("r0", [1], 2))
        pending = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
        await asyncio.sleep(0)  # lets the four hand their jobs over
        with pytest.raises(QueueFull, match="1 requests with 20 tokens wait; at most 1"):
            await final(engine, greedy("late", [1], 2))
        engine.close()
        with pytest.raises(EngineStopped):
            async for _ in streams[0]:
                pass
        with pytest.raises(EngineStopped):
            await final(engine, greedy("after", [1], 2))
        ended = await asyncio.gather(*pending, return_exceptions=True)
        assert isinstance(ended[-1], EngineStopped)  # the fifth waited for a row
