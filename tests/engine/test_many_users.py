"""Many users at once: shared prefixes, several answers, LoRAs, forms, all in one batch."""

import asyncio
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from reference import decoder as reference
from support.checkpoints import make_checkpoint
from support.engines import final, finals, greedy, is_at_rest, running_engine
from support.loras import random_lora

from engine.api import Constraint, HeadRef, HeadTable, Job, LoraRef, SamplingParams
from engine.errors import DeadlinePassed, InvalidJob

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
EXPLODING = json.dumps(  # 6^12 alternatives
    {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(6)]}
            for i in range(12)
        ]
    }
)
FORMS = {
    "json_schema": Constraint("json_schema", SCHEMA),
    "regex": Constraint("regex", "[a-c]{3}-[0-9]{2}"),
    "grammar": Constraint("grammar", 'start: "<" WORD ">" \n WORD: /[a-z]{2,5}/'),
    "choice": Constraint("choice", '["yes", "no", "maybe so"]'),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    config, tensors = make_checkpoint(directory, "qwen3")
    return directory, config, tensors


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def lora(checkpoint, seed, version=1, rank=4):
    table = random_lora(checkpoint[1], seed=seed + 100 * version, rank=rank)
    return LoraRef(f"lora-{seed}", version, ("t", f"lora-{seed}"), table)


def head(seed, version=1):
    rng = np.random.default_rng([seed, version])
    table = HeadTable(
        keys=rng.standard_normal((2, 48)).astype(np.float32),
        token_ids=np.zeros(0, np.int32),
        token_keys=np.zeros((2, 0), np.float32),
        const_keys=np.zeros(2, np.float32),
        row_ids=np.arange(40, dtype=np.int32) + seed,
        values=rng.standard_normal((2, 40)).astype(np.float32),
    )
    return HeadRef(f"pattern-{seed}", version, ("t", str(seed)), table)


async def test_a_prefix_of_an_older_lora_version_is_never_read_by_a_newer_one(checkpoint):
    ids = prompt(0, 100)
    old, new = lora(checkpoint, 1, version=1), lora(checkpoint, 1, version=2)
    async with running_engine(checkpoint[0], max_loras=2) as engine:
        cold = await final(engine, replace(greedy("cold", ids, 12), lora=new))
    async with running_engine(checkpoint[0], max_loras=2) as engine:
        before = await final(engine, replace(greedy("old", ids, 12), lora=old))
        after = await final(engine, replace(greedy("new", ids, 12), lora=new))
        again = await final(engine, replace(greedy("again", ids, 12), lora=new))
        base = await final(engine, greedy("base", ids, 12))
    assert before.token_ids != after.token_ids == cold.token_ids == again.token_ids
    assert [x.num_cached_tokens for x in (before, after, again, base)] == [0, 0, 96, 0]
    np.testing.assert_array_equal(after.prompt_vector, cold.prompt_vector)
    np.testing.assert_allclose(again.prompt_vector, cold.prompt_vector, rtol=1e-6, atol=1e-6)


async def test_a_head_edit_leaves_cached_prefixes_valid(checkpoint):
    ids = prompt(1, 100)
    old, new = head(1, version=1), head(1, version=2)

    def job(name, chosen):
        return replace(greedy(name, ids, 12), choose_head=lambda _: chosen)

    async with running_engine(checkpoint[0]) as engine:
        cold = await final(engine, job("cold", new))
    async with running_engine(checkpoint[0]) as engine:
        before = await final(engine, job("old", old))
        after = await final(engine, job("new", new))
    assert before.token_ids != after.token_ids == cold.token_ids
    assert (before.num_cached_tokens, after.num_cached_tokens) == (0, 96)
    np.testing.assert_allclose(after.prompt_vector, cold.prompt_vector, rtol=1e-6, atol=1e-6)


async def test_salts_share_nothing_and_turns_of_a_conversation_everything(checkpoint):
    ids = prompt(2, 70)
    async with running_engine(checkpoint[0]) as engine:
        first = await final(engine, greedy("a", ids, 40))
        salted = await final(engine, replace(greedy("b", ids, 40), salt="other"))
        turn = [*ids, *first.token_ids, *prompt(3, 9)]
        second = await final(engine, greedy("c", turn, 8))
        before = engine.stats().num_prompt_tokens
        third = await final(engine, greedy("d", [*turn, *second.token_ids, 5], 8))
        computed = engine.stats().num_prompt_tokens - before
    assert (first.num_cached_tokens, salted.num_cached_tokens) == (0, 0)
    assert second.num_cached_tokens == (70 + 39) // 16 * 16  # the answer's own pages as well
    cold = reference.hidden_states(checkpoint[2], checkpoint[1], turn)
    np.testing.assert_allclose(second.prompt_vector, cold.mean(axis=0), atol=1e-4)
    assert computed == len(turn) + 8 + 1 - third.num_cached_tokens <= 16 + 1


@pytest.mark.parametrize("deterministic", [False, True])
async def test_several_answers_are_those_of_single_requests_on_one_prompt(
    checkpoint, deterministic
):
    ids, sampling = prompt(4, 90), {"temperature": 1.0, "seed": 11, "ignore_eos": True}
    settings = {"deterministic": deterministic, "max_num_seqs": 4}
    async with running_engine(checkpoint[0], **settings) as engine:
        alone = []
        for index in range(4):
            one = SamplingParams(**{**sampling, "seed": 11 + index}, max_tokens=30)
            job = Job(request_id=f"r{index}", prompt_ids=tuple(ids), sampling=one, salt=index)
            alone.append(await final(engine, job))
        before = engine.stats()
        many = SamplingParams(**sampling, n=4, max_tokens=30)
        job = Job(request_id="n", prompt_ids=tuple(ids), sampling=many, salt="n", capture=True)
        answers = await finals(engine, job)
        after = engine.stats()
        busy = asyncio.ensure_future(final(engine, greedy("busy", prompt(5, 20), 60)))
        await asyncio.sleep(0)
        crowded = await finals(engine, replace(job, request_id="m", salt="m"))
        await busy
        assert is_at_rest(engine.stats())
    assert [one.token_ids for one in answers] == [one.token_ids for one in alone]
    assert [one.token_ids for one in crowded] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in answers}) == 4
    assert after.num_prompt_tokens - before.num_prompt_tokens == 90  # once for all
    assert all(len(one.capture.hidden) == 30 for one in answers)


async def test_prompt_logprobs_are_of_the_adapted_distribution_hit_or_not(checkpoint):
    directory, config, tensors = checkpoint
    ids = prompt(6, 70)
    hidden = reference.hidden_states(tensors, config, ids)
    edited = head(3)
    logits = reference.logits(tensors, hidden)
    u = hidden @ edited.table.keys.T
    logits[:, edited.table.row_ids] += u @ edited.table.values
    want = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    job = replace(greedy("a", ids, 2, prompt_logprobs=3), choose_head=lambda _: edited)
    async with running_engine(directory) as engine:
        first = await final(engine, job)
        second = await final(engine, replace(job, request_id="b"))
        plain = await final(engine, greedy("c", ids, 2))
        one = await final(engine, greedy("d", ids[:1], 1, prompt_logprobs=0))
    assert (second.num_cached_tokens, plain.num_cached_tokens) == (0, 64)
    assert one.prompt_tokens == plain.prompt_tokens == ()
    for answer in (first, second):
        assert [token.token_id for token in answer.prompt_tokens] == ids[1:]
        for at, token in enumerate(answer.prompt_tokens):
            assert token.logprob == pytest.approx(want[at, ids[at + 1]], abs=1e-4)
            best = [top.logprob for top in token.top]
            np.testing.assert_allclose(best, np.sort(want[at])[::-1][:3], atol=1e-4)


async def test_score_is_what_generation_would_have_said(checkpoint):
    ids = prompt(7, 60)
    edited = head(5)
    async with running_engine(checkpoint[0]) as engine:
        job = replace(greedy("a", ids, 40, logprobs=0), choose_head=lambda _: edited)
        updates = [update async for update in engine.generate(job)]
        told = [token for update in updates for token in update.tokens]
        answer = tuple(token.token_id for token in told)
        scored = await engine.score(replace(job, request_id="s"), answer)
        assert is_at_rest(engine.stats())
    assert scored.head is edited
    assert scored.num_cached_tokens == 48  # up to the last token of the prompt
    assert [token.token_id for token in scored.tokens] == list(answer)
    for mine, theirs in zip(scored.tokens, told, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("settings", [{}, {"deterministic": True}, {"splits_step": True}], ids=str)
async def test_answers_keep_to_their_form_and_so_do_their_states(checkpoint, kind, settings):
    async with running_engine(checkpoint[0], **settings) as engine:
        for seed in range(4):
            sampling = SamplingParams(temperature=1.5, seed=seed, max_tokens=200)
            job = Job(
                request_id=f"r{seed}", prompt_ids=tuple(prompt(seed, 20)), sampling=sampling,
                constraint=FORMS[kind], capture=True,
            )  # fmt: skip
            answer = await final(engine, job)
            assert_in_form(kind, answer)
            assert answer.token_ids[-1] == 256  # its end was drawn like any other token
            assert answer.capture is not None
            forced = await engine.capture(replace(job, request_id="c"), answer.token_ids)
            np.testing.assert_array_equal(
                forced.capture.top_ids[:, 0], answer.capture.top_ids[:, 0]
            )
            np.testing.assert_allclose(
                forced.capture.top_logprobs, answer.capture.top_logprobs, atol=2e-4
            )
            drawn = [
                token
                async for update in engine.generate(
                    replace(job, request_id="l", sampling=replace(sampling, logprobs=1))
                )
                for token in update.tokens
            ]
            assert all(token.logprob is not None for token in drawn)
        assert engine.stats().num_recompiles == 0


def assert_in_form(kind, answer):
    text = answer.text
    if kind == "json_schema":
        value = json.loads(text)
        assert set(value) == {"a", "b"} and type(value["a"]) is int and value["b"] in ("x", "yz")
    elif kind == "choice":
        assert text in ("yes", "no", "maybe so")
    else:
        pattern = "[a-c]{3}-[0-9]{2}" if kind == "regex" else "<[a-z]{2,5}>"
        assert re.fullmatch(pattern, text)


async def test_answers_of_one_request_keep_to_its_form_each_for_itself(checkpoint):
    sampling = SamplingParams(temperature=1.5, seed=1, max_tokens=100, n=4)
    texts = set()
    async with running_engine(checkpoint[0]) as engine:
        for kind, form in FORMS.items():
            job = Job(
                request_id=kind, prompt_ids=tuple(prompt(1, 20)), sampling=sampling,
                constraint=form,
            )  # fmt: skip
            for answer in await finals(engine, job):
                assert_in_form(kind, answer)
                texts.add(answer.text)
    assert len(texts) > len(FORMS)


async def test_tokens_without_a_choice_are_not_drawn(checkpoint):
    text = "every word of this is said already"
    form = Constraint("choice", json.dumps([text]))
    async with running_engine(checkpoint[0]) as engine:
        sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=100)
        job = Job(request_id="a", prompt_ids=(1,), sampling=sampling, constraint=form)
        assert (await final(engine, job)).text == text
        assert engine.stats().num_steps < 6  # the prompt, a token, a chunk of what follows, the end


async def test_a_complete_form_ends_where_no_end_may_be_said(checkpoint):
    sampling = SamplingParams(
        temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, stop_token_ids=(7,)
    )
    async with running_engine(checkpoint[0]) as engine:
        form = Constraint("regex", "bc")
        job = Job(request_id="a", prompt_ids=(1,), sampling=sampling, constraint=form)
        answer = await final(engine, job)
    assert (answer.text, answer.num_completion_tokens) == ("bc", 2)


async def test_every_bias_and_every_stop_at_once_fit(checkpoint):
    sampling = SamplingParams(
        temperature=1.0, seed=1, max_tokens=9, min_tokens=5,
        logit_bias={token_id: -1.0 for token_id in range(300)},
        stop_token_ids=tuple(range(64)),
    )  # fmt: skip
    async with running_engine(checkpoint[0]) as engine:
        answer = await final(engine, Job(request_id="a", prompt_ids=(1,), sampling=sampling))
    assert answer.num_completion_tokens >= 5


@pytest.mark.parametrize("rank", [5, 12])
async def test_a_lora_says_the_same_whatever_its_slot_could_hold(checkpoint, rank):
    answers = []
    for most in (rank, 16):
        async with running_engine(checkpoint[0], max_loras=1, max_lora_rank=most) as engine:
            job = replace(greedy("a", prompt(3, 20), 12), lora=lora(checkpoint, 1, rank=rank))
            answers.append((await final(engine, job)).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("json_schema", "{"), "json_schema cannot be read"),
        (Constraint("json_schema", '{"type": "nope"}'), "cannot be used: .*nope"),
        (Constraint("regex", "a(?=b)"), "look-ahead"),
        (Constraint("json_schema", EXPLODING), "schema too large"),
        (Constraint("grammar", "start: foo"), "unknown name"),
        (Constraint("regex", "a" * 70_000), "has 70000 bytes"),
    ],
    ids=lambda each: str(each)[:40],
)
async def test_a_broken_form_is_refused_and_nobody_notices(checkpoint, constraint, message):
    async with running_engine(checkpoint[0]) as engine:
        other = asyncio.ensure_future(final(engine, greedy("other", prompt(1, 20), 30)))
        with pytest.raises(InvalidJob, match=message):
            await final(engine, replace(greedy("bad", [1], 5), constraint=constraint))
        assert (await other).num_completion_tokens == 30


async def test_more_loras_than_slots_wait_for_each_other(checkpoint):
    loras = [lora(checkpoint, seed) for seed in range(7)]

    def job(index, name):
        return replace(greedy(f"{name}{index}", prompt(1, 20), 15), lora=loras[index])

    async with running_engine(checkpoint[0], max_loras=2) as engine:
        alone = [await final(engine, job(i, "a")) for i in range(7)]
        both = await asyncio.gather(*(final(engine, job(i, "b")) for i in range(7)))
        stats = engine.stats()
    assert [one.token_ids for one in alone] == [one.token_ids for one in both]
    assert len({one.token_ids for one in alone}) > 3
    assert (stats.num_recompiles, stats.num_resident_loras) == (0, 2)


async def test_a_lora_that_does_not_fit_is_refused_before_any_work(checkpoint):
    wide = lora(checkpoint, 1, rank=17)
    other = LoraRef("other", 1, ("o",), random_lora({**checkpoint[1], "hidden_size": 32}, seed=1))
    async with running_engine(checkpoint[0], max_loras=2) as engine:
        with pytest.raises(InvalidJob, match="rank 17; a slot holds 16"):
            await final(engine, replace(greedy("a", [1], 5), lora=wide))
        with pytest.raises(InvalidJob, match="this model takes"):
            await final(engine, replace(greedy("b", [1], 5), lora=other))
        assert engine.stats().num_steps == 0
    async with running_engine(checkpoint[0], max_loras=0) as engine:
        with pytest.raises(InvalidJob, match="started without LoRA slots"):
            await final(engine, replace(greedy("c", [1], 5), lora=lora(checkpoint, 1)))


async def test_a_late_job_is_not_begun(checkpoint):
    async with running_engine(checkpoint[0]) as engine:
        with pytest.raises(DeadlinePassed, match="was not begun"):
            await final(engine, replace(greedy("late", prompt(0, 20), 5), deadline_s=0.0))
        stats = engine.stats()
    assert stats.num_steps == 0
    assert is_at_rest(stats)


def any_job(rng, checkpoint, index, loras):
    """A request of any kind, made from one seed."""
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.2]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.02]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        logit_bias=rng.choice([{}, {7: 2.0, 99: -3.0}]),
        min_tokens=rng.choice([0, 6]),
        max_tokens=rng.randint(6, 40),
        stop=rng.choice([(), ("ab", "b")]),
        logprobs=rng.choice([None, 2]),
        seed=index,
        ignore_eos=rng.random() < 0.5,
    )
    form = rng.choice([None, None, *FORMS.values()])
    chosen = rng.choice([None, head(index % 5)])
    beginning = prompt(index % 3, rng.choice([16, 40, 64]))
    return Job(
        request_id=f"r{index}",
        prompt_ids=tuple([*beginning, *prompt(1000 + index, rng.randint(1, 60))]),
        sampling=sampling,
        choose_head=(lambda _: chosen) if chosen is not None else None,
        lora=rng.choice([None, *loras]),
        constraint=form,
        tenant=f"t{index % 4}",
        priority=rng.choice([0, 0, 1]),
        capture=rng.random() < 0.5,
        session=rng.choice([None, f"s{index % 3}"]),
    )


@pytest.mark.timeout(600)
async def test_64_streams_of_every_kind_equal_themselves_alone_to_the_bit(checkpoint):
    rng = random.Random(0)
    loras = [lora(checkpoint, seed, rank=rng.choice([2, 4, 8, 16])) for seed in range(16)]
    jobs = [any_job(rng, checkpoint, index, loras) for index in range(64)]
    cancelled = set(rng.sample(range(64), 12))
    settings = {
        "deterministic": True, "max_num_seqs": 8, "max_loras": 4, "num_pages": 34,
        "max_learned_slots": 4,
    }  # fmt: skip
    async with running_engine(checkpoint[0], **{**settings, "num_pages": 200}) as engine:
        alone = [await final(engine, job) for job in jobs]

    async def run(engine, index):
        if index not in cancelled:
            return await final(engine, jobs[index])
        stream = engine.generate(jobs[index])
        async for update in stream:
            if update.final is not None or len(update.tokens) > 0:
                break
        await stream.aclose()
        return None

    async with running_engine(checkpoint[0], **settings) as engine:
        together = await asyncio.gather(*(run(engine, index) for index in range(64)))
        await engine.embed(Job(request_id="fence", prompt_ids=(1,)))
        stats = engine.stats()
    assert stats.num_recompiles == 0
    assert is_at_rest(stats)
    assert stats.num_preemptions > 0
    for index, (one, other) in enumerate(zip(alone, together, strict=True)):
        if other is None:
            continue
        assert one.token_ids == other.token_ids, index
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        np.testing.assert_array_equal(one.prompt_vector, other.prompt_vector)
        if one.capture is not None:
            for array in ("hidden", "top_ids", "top_logprobs", "rest_logprob"):
                np.testing.assert_array_equal(
                    getattr(one.capture, array), getattr(other.capture, array)
                )
