"""`sona demo`: two conventions, taught live to a server of its own, with held-out figures.

Nothing here looks inside: a child server, the public client, items the model has never been
corrected on. Exit status 1 when a bound is missed.
"""

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console

from sona.bench.child import child_server
from sona.bench.classroom import Classroom, Marks, base_right
from sona.bench.tasks import Convention, Item
from sona.client import AsyncClient

_STAGES = (0, 1, 4, 16)
_NUM_ITEMS = 200  # per cell
_LESSONS = (("F1", "date-slash"), ("F2", "rename"))
_HELD_OUT = 0.90  # after 4 corrections and more
_NEIGHBOURS = 0.95
_OTHERS = 0.01  # largest loss
_MAX_LOOKS = 2_000  # requests, until one is answered by a new version
_BASE = 0.10  # the convention must not be known before
_YOUR_OWN = """
The same with your own checkpoint (Llama, Qwen2 or Qwen3, Hugging Face layout):

  sona serve /path/to/checkpoint
  sona generate --temperature 0 'a prompt of yours'
  sona feedback REQUEST_ID --correction 'what it should have said'
  sona generate --temperature 0 'another prompt of that kind'"""


@dataclass(slots=True)
class _Outcome:
    """Bounds missed so far."""

    missed: list[str] = field(default_factory=list)

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.missed.append(text)


@dataclass(frozen=True, slots=True)
class _Cells:
    """The questions of one lesson."""

    held_out: list[Item]
    neighbours: list[Item]
    others: list[Item]


def run(*, seed: int = 0) -> int:
    """Run the demo; returns the exit status."""
    console = Console(soft_wrap=True)
    started = time.monotonic()
    outcome = asyncio.run(_run(seed, console))
    console.print(f"\n{time.monotonic() - started:.0f} s in all.")
    for text in outcome.missed:
        console.print(f"MISSED: {text}")
    if not outcome.missed:
        console.print("Every bound held.")
    console.print(_YOUR_OWN, highlight=False)
    return 1 if outcome.missed else 0


async def _run(seed: int, console: Console) -> _Outcome:
    outcome = _Outcome()
    console.print("Starting a server with the shipped model ...")
    names = [family for family, _ in _LESSONS]
    async with child_server(names) as child:
        console.print(f"Serving on {child.grpc}. {_NUM_ITEMS} questions a cell, greedy.\n")
        for family, name in _LESSONS:
            async with child.client(family) as client:
                await _lesson(Convention(family, name, seed), seed, client, console, outcome)
    return outcome


async def _lesson(
    convention: Convention, seed: int, client: AsyncClient, console: Console, outcome: _Outcome
) -> None:
    room, rng = Classroom(client), np.random.default_rng(seed)
    cells = _Cells(
        convention.test_items(rng, _NUM_ITEMS),
        convention.neighbours(rng, _NUM_ITEMS, "test"),
        convention.other_tasks(rng, _NUM_ITEMS),
    )
    lessons = convention.teach_items(rng, _STAGES[-1])
    confirmed = iter(convention.neighbours(rng, 4 * _STAGES[-1], "teach"))
    example = lessons[0]
    console.print(
        f"{convention.family}: “{example.prompt.strip()}”\n    "
        f"{example.answer}  →  {convention.apply(example)}",
        highlight=False,
    )
    console.print("  corrections   held-out   neighbours (in gate)   other tasks   ack → changed")
    before: Marks | None = None
    taught = 0
    for stage in _STAGES:
        delays = []
        while taught < stage:
            target = convention.apply(lessons[taught])
            assert target is not None
            delays.append(await _timed_correction(room, client, lessons[taught], target))
            while not await room.confirm(next(confirmed)):
                pass
            taught += 1
        before = await _stage(convention, room, cells, stage, delays, before, console, outcome)
    assert before is not None
    await _rolled_back(room, client, cells, before, console, outcome)


async def _stage(
    convention: Convention,
    room: Classroom,
    cells: _Cells,
    stage: int,
    delays: list[float],
    before: Marks | None,
    console: Console,
    outcome: _Outcome,
) -> Marks:
    """Examine, print a row, hold the bounds. Returns the base's answers to the other tasks."""

    def right(item: Item) -> tuple[str, ...]:
        return (convention.apply(item) or "",)

    held_out = await room.exam(cells.held_out, right)
    near = await room.exam(cells.neighbours, base_right)
    others = await room.exam(cells.others, base_right)
    in_gate = f"{near.gated_accuracy:.3f}" if near.num_gated else "  –  "
    delay = f"{1e3 * sorted(delays)[len(delays) // 2]:.0f} ms" if delays else ""
    console.print(
        f"  {stage:>11}   {held_out.accuracy:>8.3f}   {in_gate:>6} "
        f"({near.num_gated:>3} of {len(near.is_right)})    {others.accuracy:>11.3f}   {delay:>13}",
        highlight=False,
    )
    what = f"{convention.family} after {stage} corrections"
    if stage == 0:
        outcome.expect(held_out.accuracy <= _BASE, f"{what}: held-out {held_out.accuracy:.3f}")
        return others
    assert before is not None
    if stage >= 4:
        outcome.expect(
            held_out.accuracy >= _HELD_OUT,
            f"{what}: held-out {held_out.accuracy:.3f} < {_HELD_OUT}",
        )
        outcome.expect(
            near.gated_accuracy >= _NEIGHBOURS,
            f"{what}: neighbours {near.gated_accuracy:.3f} < {_NEIGHBOURS}",
        )
    loss = before.accuracy - others.accuracy
    outcome.expect(loss <= _OTHERS, f"{what}: other tasks lost {loss:.3f} > {_OTHERS}")
    return before


async def _timed_correction(room: Classroom, client: AsyncClient, item: Item, target: str) -> float:
    """Correct; seconds from the acknowledgement until an answer named a version that was not there.

    Raises TimeoutError when none did.
    """
    before = await room.ask(item)
    reply = await room.ask(item, adapter="none", learn=True)
    sent = await client.feedback(reply.request_id, correction=target)
    acknowledged = time.monotonic()
    for _ in range(_MAX_LOOKS):
        after = await room.ask(item)
        if after.versions - before.versions:
            break
    else:
        raise TimeoutError(f"no new version answered within {_MAX_LOOKS} requests")
    changed_s = time.monotonic() - acknowledged
    await room.learned(sent.feedback_id)
    return changed_s


async def _rolled_back(
    room: Classroom,
    client: AsyncClient,
    cells: _Cells,
    before: Marks,
    console: Console,
    outcome: _Outcome,
) -> None:
    """Undo everything and show that the old model is back."""
    for adapter in await client.adapters():
        await client.rollback(adapter.name, to_version=0)
    again = await room.exam(cells.others, base_right)
    held_out = await room.exam(cells.held_out, base_right)
    plain = await room.exam(cells.held_out, base_right, adapter="none")
    same = min(again.agreement(before), held_out.agreement(plain))
    console.print(f"  rolled back: {same:.3f} of the answers equal those of the base\n")
    outcome.expect(same == 1.0, f"after the rollback only {same:.3f} of the answers are the base's")
