"""What users of one engine gain from each other's prefixes, and what a flood takes from them."""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator

import numpy as np

from engine.api import Final, Job, SamplingParams
from engine.client import EngineClient
from engine.config import EngineConfig
from sona.bench.figures import Figure
from sona.model import warm_up

CACHED = 1_000  # tokens of the prompt that are cached
ROUNDS = 20
PHASE_S = 10.0
PHASES = 6
FLOOD = 64  # requests that the flooding tenant has under way or waiting
_TOKENS = 48  # of an answer
_PROMPT = 32


@contextlib.asynccontextmanager
async def _engine() -> AsyncGenerator[EngineClient, None]:
    warm = await asyncio.to_thread(
        warm_up, "", "", EngineConfig(), learns=False, progress=lambda *_: None
    )
    engine = EngineClient(warm.model, warm.tokenizer, warm.plan, warm.runner)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


async def measure_prefix() -> list[Figure]:
    """Tokens computed twice over ten turns; first token with a prefix cached over without."""
    async with _engine() as engine:
        wasted = await _conversation(engine)
        ratios = []
        rng = np.random.default_rng(0)
        for round_ in range(-2, ROUNDS):
            begin = rng.integers(5, 1000, CACHED).tolist()
            cold = await _first_token(engine, [*begin, *rng.integers(5, 1000, 24).tolist()])
            hit = await _first_token(engine, [*begin, *rng.integers(5, 1000, 24).tolist()])
            if round_ >= 0:
                ratios.append(cold / hit)
    return [
        Figure("prompt tokens computed twice over ten turns, a page at most each", wasted, 16.0),
        Figure(
            f"first token with {CACHED} tokens cached, times sooner",
            statistics.median(ratios), 3.0, is_least=True,
        ),
    ]  # fmt: skip


async def _conversation(engine: EngineClient) -> float:
    """Most tokens of a turn that were computed although they had been before."""
    rng, history, known = np.random.default_rng(1), list[int](), 0
    most = 0
    for turn in range(10):
        history += rng.integers(5, 1000, 40).tolist()
        before = engine.stats().num_prompt_tokens
        final = await _final(engine, _job(f"turn-{turn}", history, session="s"))
        most = max(most, engine.stats().num_prompt_tokens - before - (len(history) - known))
        history += final.token_ids
        known = len(history) - 1  # the last token was never computed
    return float(most)


async def _first_token(engine: EngineClient, ids: list[int]) -> float:
    job = _job(f"first-{time.monotonic_ns()}", ids)
    started = time.perf_counter()
    async with contextlib.aclosing(engine.generate(job)) as updates:
        async for _ in updates:
            return time.perf_counter() - started
    raise AssertionError("a job has a first token")


async def measure_fairness() -> list[Figure]:
    """A light tenant's share beside a flood, and its latency against the same load of eight."""
    async with _engine() as engine:
        shares = []
        beside_flood, beside_eight = list[float](), list[float]()
        for _ in range(PHASES):
            shares.append(await _share(engine))
            beside_eight.append(await _latency(engine, {f"t{i}": FLOOD // 8 for i in range(8)}))
            beside_flood.append(await _latency(engine, {"flood": FLOOD}))
        ratios = [a / b for a, b in zip(beside_flood, beside_eight, strict=True)]
    return [
        Figure(
            "light tenant beside a flood: share of the tokens over its half",
            statistics.median(shares), 0.9, is_least=True,
        ),
        Figure(
            "its latency, over that beside the same load of eight tenants",
            statistics.median(ratios), 1.1,
        ),
    ]  # fmt: skip


async def _share(engine: EngineClient) -> float:
    """Tokens of a tenant that always has 16 requests waiting, over half of all tokens."""
    counts: Counter[str] = Counter()
    async with _load(engine, {"flood": FLOOD, "light": 16}, counts):
        await asyncio.sleep(PHASE_S / 4)
        counts.clear()
        await asyncio.sleep(PHASE_S)
        measured = Counter(counts)
    return measured["light"] / (sum(measured.values()) / 2)


async def _latency(engine: EngineClient, others: dict[str, int]) -> float:
    """Median seconds of one request after another of the light tenant, beside these."""
    took = []
    async with _load(engine, others, Counter()):
        await asyncio.sleep(PHASE_S / 4)
        until = time.monotonic() + PHASE_S
        for number in itertools.count():
            if time.monotonic() > until:
                break
            started = time.perf_counter()
            await _final(engine, _job(f"light-{time.monotonic_ns()}", _prompt(number), "light"))
            took.append(time.perf_counter() - started)
    return statistics.median(took)


@contextlib.asynccontextmanager
async def _load(
    engine: EngineClient, tenants: dict[str, int], counts: Counter[str]
) -> AsyncGenerator[None, None]:
    """So many requests of each tenant at all times, each followed by the next."""

    async def one(tenant: str, seat: int) -> None:
        for number in itertools.count():
            name = f"{tenant}-{seat}-{number}-{time.monotonic_ns()}"
            job = _job(name, _prompt(hash((tenant, seat, number)) & 0xFFFF), tenant)
            async for update in engine.generate(job):
                counts[tenant] += len(update.tokens)

    seats = [(tenant, seat) for tenant, count in tenants.items() for seat in range(count)]
    tasks = [asyncio.ensure_future(one(tenant, seat)) for tenant, seat in seats]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _final(engine: EngineClient, job: Job) -> Final:
    last = None
    async for update in engine.generate(job):
        last = update.final
    assert last is not None
    return last


def _job(name: str, ids: list[int], tenant: str = "", session: str | None = None) -> Job:
    sampling = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True, seed=0)
    return Job(
        request_id=name, prompt_ids=tuple(ids), sampling=sampling, tenant=tenant, salt=tenant,
        session=session,
    )  # fmt: skip


def _prompt(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 1000, _PROMPT).tolist()
