"""300 tenants with a pattern each on 8 device slots, and mixed requests: no program compiles."""

import asyncio
import itertools

import pytest
from support.checkpoints import make_checkpoint
from support.server import client_of, configured, running_server, until_learned

TENANTS = 300
REQUESTS = 200


@pytest.mark.timeout(400)
async def test_no_recompiles_and_every_page_returns(tmp_path):
    make_checkpoint(tmp_path / "model", "llama")
    students = [f"t{i}" for i in range(TENANTS)]
    config = configured(
        tmp_path / "data", model=tmp_path / "model", students=students,
        engine={"max_num_seqs": 8, "max_learned_slots": 8, "num_pages": 300},
    )  # fmt: skip
    async with running_server(config) as addresses:
        seats = asyncio.Semaphore(16)

        async def teach(student):
            async with seats, client_of(addresses, student) as client:
                reply = await client.generate("hello there", temperature=0.0, max_tokens=4)
                number = int(student[1:])
                sent = await client.feedback(reply.request_id, correction=f"{number:03d}")
                await until_learned(client, sent.feedback_id)

        async def ask(student, length, **sampling):
            async with seats, client_of(addresses, student) as client:
                prompt = "hello there" + "x" * length
                reply = await client.generate(prompt, **sampling)
                assert reply.usage.completion_tokens >= 1

        async def first_answer(student):
            async with seats, client_of(addresses, student) as client:
                reply = await client.generate("hello there", temperature=0.0, max_tokens=4)
                return reply.choices[0].text

        await asyncio.gather(*(teach(student) for student in students))
        samplings = itertools.cycle([
            {"temperature": 0.0, "max_tokens": 5},
            {"temperature": 0.8, "top_p": 0.9, "max_tokens": 20},
            {"temperature": 1.0, "top_k": 5, "seed": 3, "max_tokens": 9, "logprobs": 4},
            {"max_tokens": 33, "stop": ["a", "zz"]},
        ])  # fmt: skip
        await asyncio.gather(*(
            ask(students[i * 7 % TENANTS], i * 13 % 300, **next(samplings))
            for i in range(REQUESTS)
        ))  # fmt: skip
        answers = await asyncio.gather(*(first_answer(student) for student in students))
        metrics = await scrape(addresses)
    learned = sum(answer.startswith(f"{i:03d}") for i, answer in enumerate(answers))
    assert learned == TENANTS
    assert metrics["sona_recompiles_total"] == 0
    at_rest = metrics["sona_kv_pages_free"] + metrics["sona_kv_pages_idle"]
    assert at_rest == metrics["sona_kv_pages"]
    assert metrics["sona_resident_heads"] <= 7
    assert metrics["sona_adapters"] == TENANTS


async def scrape(addresses):
    """The unlabelled metrics by name, over HTTP."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{addresses.http}/metrics")).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
