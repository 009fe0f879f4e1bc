"""`sona bench latency`: how soon a correction is served, and what learning costs everybody else.

idle      acknowledgement → first token of a new request that names the new version
loaded    the same beside an open-loop load of half the measured capacity
beside    inter-token time at that load with a multi-token correction a second, from a new student
          every eight, against the same without learning: none kept, scores for corrections

The phases of `beside` alternate in one server and under one load that never stops: two processes
that do the same differ by more than what is measured (up to 1.4 here, with either of them the
slower one), and a load that starts anew has nothing steady to compare. Its requests come at even
distances there; by chance they would come by a tenth more or less from phase to phase.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from sona.bench import results
from sona.bench.child import Child, child_server
from sona.bench.statistics import quantile
from sona.bench.tasks import Convention, Item
from sona.client import AsyncClient

_STUDENTS = 8
_PER_STUDENT = 8  # corrections
_CAPACITY_S = 5.0
_PHASE_S = 2.0  # short: the machine around us changes from one second to the next
_SETTLE_S = 0.5  # before each phase: requests of the one before it end
_PHASES = 100  # of each kind, alternating
_TAUGHT = 3 * _PHASES // _PER_STUDENT  # students; a phase has three corrections, two of them timed
_IDLE_MS = 50.0
_RATIO = 1.05
_MAX_TRIES = 500
_LOAD_TOKENS = 64  # of an answer of the load: long enough to have a steady stream


@dataclass(slots=True)
class _Samples:
    """Seconds."""

    edited: list[float] = field(default_factory=list)  # to the first version
    absorbed: list[float] = field(default_factory=list)  # to the whole correction
    first_token: list[float] = field(default_factory=list)  # of unlearned requests beside it


@dataclass(slots=True)
class _Stream:
    """What the load saw, in seconds."""

    learn: bool = True  # of requests from now on: states and tokens are kept for feedback
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def run(*, output: Path | None = None) -> int:
    """Measure, print, write; the exit status is 1 when a bound is missed."""
    return asyncio.run(_run(Console(soft_wrap=True), output))


async def _run(console: Console, output: Path | None) -> int:
    students = [f"s{i}" for i in range(2 * _STUDENTS)]
    taught = [f"t{i}" for i in range(_TAUGHT)]
    async with child_server(["load", *students, *taught]) as learning:
        rate = await _capacity(learning)
        console.print(f"capacity {rate:.1f} requests of {_LOAD_TOKENS} tokens a second")
        idle = await _delays(learning, students[:_STUDENTS])
        async with learning.client("load") as client, _load(client, rate / 2) as seen:
            loaded = await _delays(learning, students[_STUDENTS : 2 * _STUDENTS])
            loaded.first_token = seen.first_token
        ratios = await _beside(learning, rate / 2, taught)
    results.write(output, "sona bench latency", _figures(rate, idle, loaded, ratios))
    return _show(console, idle, loaded, ratios)


def _figures(
    rate: float, idle: _Samples, loaded: _Samples, ratios: list[float]
) -> dict[str, object]:
    series = {
        "first token of an unlearned request, half load": loaded.first_token,
        "idle, first edit": idle.edited,
        "idle, whole correction": idle.absorbed,
        "half load, first edit": loaded.edited,
        "half load, whole correction": loaded.absorbed,
    }
    return {
        "capacity_requests_per_s": rate,
        "seconds": {
            name: {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "n": len(values)}
            for name, values in series.items()
        },
        "inter_token_ratio_on_to_off": ratios,
    }


async def _capacity(child: Child) -> float:
    """Requests a second with sixteen always under way, streamed as those of the load."""
    seen = _Stream()

    async def ask_on(client: AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            await _watched(client, seen)

    async with child.client("load") as client:
        await client.generate(_LOAD_PROMPT, **_LOAD)
        until = time.monotonic() + _CAPACITY_S
        await asyncio.gather(*(ask_on(client, until) for _ in range(16)))
    return len(seen.first_token) / _CAPACITY_S


_LOAD_PROMPT = [{"role": "user", "content": "Repeat: ledger vault atlas bridge"}]
_LOAD = {
    "temperature": 0.0, "max_tokens": _LOAD_TOKENS, "ignore_eos": True, "adapter": "none",
}  # fmt: skip


@contextlib.asynccontextmanager
async def _load(
    client: AsyncClient, rate: float, *, is_even: bool = False
) -> AsyncIterator[_Stream]:
    """Requests at random times, or at even distances, `rate` a second, while the context lasts."""
    seen, rng = _Stream(), np.random.default_rng(0)

    async def arrive() -> None:
        due = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(_watched(client, seen))
                due += 1 / rate if is_even else float(rng.exponential(1 / rate))
                await asyncio.sleep(due - time.monotonic())

    task = asyncio.create_task(arrive())
    try:
        yield seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _watched(client: AsyncClient, seen: _Stream) -> None:
    """One streamed request, with its first and its later tokens timed."""
    last, is_first = time.monotonic(), True
    async for event in client.stream(_LOAD_PROMPT, **_LOAD, learn=seen.learn):
        if event.HasField("delta") and event.delta.token_ids:
            now = time.monotonic()
            if is_first:
                seen.first_token.append(now - last)
            else:
                seen.between.append((now - last) / len(event.delta.token_ids))
            last, is_first = now, False


async def _delays(child: Child, students: list[str]) -> _Samples:
    """Correct tickets one after the other; time each until it is served."""
    samples = _Samples()
    for index, student in enumerate(students):
        convention = Convention("F2", "", index)
        lessons = convention.teach_items(np.random.default_rng(index), _PER_STUDENT)
        async with child.client(student) as client:
            for item in lessons:
                await _one_delay(client, item, convention.apply(item) or "", samples)
    return samples


async def _one_delay(client: AsyncClient, item: Item, target: str, samples: _Samples) -> None:
    before = await _version(client, item)
    reply = await client.generate(item.messages, temperature=0.0, adapter="none", max_tokens=32)
    sent = await client.feedback(reply.request_id, correction=target)
    acknowledged = time.monotonic()
    samples.edited.append(await _until(client, item, before + 1) - acknowledged)
    feedback = await client.get_feedback(sent.feedback_id)
    for _ in range(_MAX_TRIES):
        if feedback.state != sent.state or feedback.reason:
            break
        feedback = await client.get_feedback(sent.feedback_id)
    whole = feedback.adapter_version.version
    samples.absorbed.append(await _until(client, item, whole) - acknowledged)


async def _until(client: AsyncClient, item: Item, version: int) -> float:
    """When the first request that names this version or a later one had its first token."""
    for _ in range(_MAX_TRIES):
        first = 0.0
        async for event in client.stream(item.messages, temperature=0.0, max_tokens=32):
            if event.HasField("delta") and not first:
                first = time.monotonic()
            if event.HasField("final"):
                named = [v.version for v in event.final.adapter_versions]
                if named and named[0] >= version:
                    return first
    raise TimeoutError(f"no answer named version {version} in {_MAX_TRIES} requests")


async def _version(client: AsyncClient, item: Item) -> int:
    """The version that answers now; 0 for the base model."""
    reply = await client.generate(item.messages, temperature=0.0, max_tokens=32, learn=False)
    return max((v.version for v in reply.adapter_versions), default=0)


async def _beside(child: Child, rate: float, students: list[str]) -> list[float]:
    """Inter-token p50 with learning over p50 without, pair of phases by pair."""
    ratios = []
    lessons = [lesson for student in students for lesson in _lessons(student)]
    async with child.client("load") as client, _load(client, rate, is_even=True) as seen:
        for pair in range(_PHASES):
            medians = {}
            for is_learning in (pair % 2 == 0, pair % 2 == 1):
                seen.learn = is_learning
                teacher = asyncio.create_task(_teach(child, lessons, corrects=is_learning))
                await asyncio.sleep(_SETTLE_S)
                seen.between = []
                await asyncio.sleep(_PHASE_S)
                medians[is_learning] = quantile(seen.between, 0.5)
                teacher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await teacher
            ratios.append(medians[True] / medians[False])
    return ratios


def _lessons(student: str) -> list[tuple[str, Item, str]]:
    """What one student has to say: (student, question, right answer)."""
    convention = Convention("F1", "date-slash", 0)
    items = convention.teach_items(np.random.default_rng(9), _PER_STUDENT)
    return [(student, item, convention.apply(item) or "") for item in items]


async def _teach(child: Child, lessons: list[tuple[str, Item, str]], *, corrects: bool) -> None:
    """A multi-token correction a second, or a score that is stored and not learned."""
    due = time.monotonic()
    while lessons:
        student, item, target = lessons.pop(0) if corrects else lessons[0]
        async with child.client(student) as client:
            reply = await client.generate(
                item.messages, temperature=0.0, adapter="none", max_tokens=32
            )
            if corrects:
                await client.feedback(reply.request_id, correction=target)
            else:
                await client.feedback(reply.request_id, score=0.5)
        due += 1.0
        await asyncio.sleep(due - time.monotonic())


def _show(console: Console, idle: _Samples, loaded: _Samples, ratios: list[float]) -> int:
    missed = 0
    first_token_ms = 1e3 * quantile(loaded.first_token, 0.5)
    allowed_ms = _IDLE_MS + 2 * first_token_ms
    console.print(f"first token of an unlearned request at half load: p50 {first_token_ms:.1f} ms")
    for name, values, bound in (
        ("idle, first edit", idle.edited, _IDLE_MS),
        ("idle, whole correction", idle.absorbed, None),
        ("half load, first edit", loaded.edited, allowed_ms),
        ("half load, whole correction", loaded.absorbed, None),
    ):
        p50, p99 = 1e3 * quantile(values, 0.5), 1e3 * quantile(values, 0.99)
        verdict = ""
        if bound is not None:
            verdict = f"(≤ {bound:.1f}: {'held' if p50 <= bound else 'MISSED'})"
            missed += p50 > bound
        console.print(f"  {name:<28} p50 {p50:.1f} ms {verdict}  p99 {p99:.1f} ms", highlight=False)
    ratio = quantile(ratios, 0.5)
    missed += ratio > _RATIO
    console.print(
        f"  inter-token p50, learning on / off: {ratio:.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f} over {len(ratios)} pairs; ≤ {_RATIO}: "
        f"{'held' if ratio <= _RATIO else 'MISSED'})",
        highlight=False,
    )
    return 1 if missed else 0
