"""`sona bench learn`: what corrections gain on held-out items, over seeds, with its controls.

Everything is asked over the wire from a child server, generated freely, with the gate as a new
pattern has it. Each seed and family is a tenant of its own. Controls run in the same server: the
same lessons with wrong targets, a nearest-neighbour memory, the edits without their gate, and the
prior-art rule in an engine of its own.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from sona.bench import results
from sona.bench.arms import NearestMemory, shuffled_target
from sona.bench.child import Child, child_server
from sona.bench.classroom import Classroom, Marks, base_right
from sona.bench.prior import PriorArm
from sona.bench.statistics import Figure
from sona.bench.tasks import F1_NAMES, Convention, Item

_NUM_ITEMS = 200  # per cell
_SHUFFLES = 4  # draws of wrong targets for each seed


@dataclass(frozen=True, slots=True)
class _Course:
    """How one family is taught and where it is examined."""

    family: str
    stages: tuple[int, ...]  # corrections given when an exam takes place
    is_confirmed: bool  # one confirmation of a neighbour per correction


_COURSES = (
    _Course("F1", (1, 4, 16, 32), True),
    _Course("F2", (1, 4, 16, 32), True),
    _Course("F3", (16, 64), False),
    _Course("F4", (8, 64), True),
)


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure that must be reached. The upper end of a control's interval must stay below."""

    figure: str
    limit: float
    is_least: bool = True
    by_interval: bool = False

    def holds(self, figure: Figure) -> bool:
        """Whether the mean (or the interval's end) keeps to the limit."""
        low, high = figure.interval
        if self.is_least:
            return (low if self.by_interval else figure.mean) >= self.limit
        return (high if self.by_interval else figure.mean) <= self.limit


def bounds() -> list[Bound]:
    """What the command's exit status asks for."""
    wanted = []
    for family in ("F1", "F2"):
        wanted += [
            Bound(f"{family} held-out, 0 corrections", 0.10, is_least=False),
            Bound(f"{family} held-out, 4 corrections", 0.90),
            Bound(f"{family} neighbours in gate, 4 corrections", 0.95),
            Bound(f"{family} neighbours in gate, 32 corrections", 0.90),
        ]
    wanted += [
        Bound("F3 held-out, 16 corrections", 0.60),
        Bound("F3 held-out, 64 corrections", 0.80),
        Bound("F4 held-out, 64 corrections", 0.90),
    ]
    for course in _COURSES:
        last = f"{course.stages[-1]} corrections"
        wanted += [
            Bound(f"{course.family} locality, {last}", 0.98),
            Bound(f"{course.family} other tasks lost, {last}", 0.01, is_least=False),
        ]
        for control in ("shuffled", "prior-art rule"):
            name = f"{course.family} gain of control: {control}"
            wanted.append(Bound(name, 0.05, is_least=False, by_interval=True))
    return wanted


@dataclass(slots=True)
class _Book:
    """All figures, by name, one value per seed."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def figures(self) -> dict[str, Figure]:
        return {name: Figure(tuple(values)) for name, values in self.values.items()}


def run(*, seeds: int = 5, output: Path | None = None, model: str = "") -> int:
    """Measure, print, write; returns the exit status."""
    console, started = Console(soft_wrap=True), time.monotonic()
    book = asyncio.run(_run(seeds, model, console))
    figures = book.figures()
    missed = _show(console, figures)
    console.print(f"{time.monotonic() - started:.0f} s in all, {seeds} seeds.")
    command = f"sona bench learn --quick --seeds {seeds}"
    results.write(output, command, _document(figures, missed))
    return 1 if missed else 0


async def _run(seeds: int, model: str, console: Console) -> _Book:
    book = _Book()
    students = [
        f"{course.family}-{seed}{arm}"
        for seed in range(seeds)
        for course in _COURSES
        for arm in ("", *(f"-shuffled-{draw}" for draw in range(_SHUFFLES)))
    ]
    async with child_server(students, model=model) as child:
        for seed in range(seeds):
            for course in _COURSES:
                began = time.monotonic()
                await _course(course, seed, child, book)
                console.print(
                    f"seed {seed} {course.family}: {time.monotonic() - began:.0f} s",
                    highlight=False,
                )
    prior = PriorArm(model)
    try:
        for seed in range(seeds):
            for course in _COURSES:
                await _prior(course, seed, prior, book)
    finally:
        prior.close()
    return book


def _convention(family: str, seed: int) -> Convention:
    return Convention(family, F1_NAMES[seed % len(F1_NAMES)] if family == "F1" else "", seed)


def _right(convention: Convention) -> Callable[[Item], tuple[str, ...]]:
    return lambda item: (convention.apply(item) or "",)


async def _course(course: _Course, seed: int, child: Child, book: _Book) -> None:
    """Teach one family to one student, examine on the way, then run the wire controls."""
    convention = _convention(course.family, seed)
    rng = np.random.default_rng([seed, 1])
    held_out = convention.test_items(rng, _NUM_ITEMS)
    near = convention.neighbours(rng, _NUM_ITEMS, "test")
    others = convention.other_tasks(rng, _NUM_ITEMS)
    lessons = convention.teach_items(rng, course.stages[-1])
    confirmed = iter(convention.neighbours(rng, 4 * course.stages[-1], "teach"))
    async with child.client(f"{course.family}-{seed}") as client:
        room = Classroom(client)
        before = await room.exam(others, base_right)
        base = await room.exam(held_out, _right(convention))
        book.note(f"{course.family} held-out, 0 corrections", base.accuracy)
        taught = 0
        for stage in course.stages:
            for item in lessons[taught:stage]:
                await room.correct(item, convention.apply(item) or "")
                if course.is_confirmed:
                    while not await room.confirm(next(confirmed)):
                        pass
            taught = stage
            cells = (held_out, near, others)
            await _examine(course, convention, room, stage, cells, before, book)
        memory = NearestMemory(client, room)
        for item in lessons:
            await memory.learn(item, convention.apply(item) or "")
        known = await memory.exam(held_out, convention)
        book.note(f"{course.family} held-out, kNN memory", known)
        await _ungated(course, client, room, others, before, book)
    await _shuffled(course, seed, child, base, held_out, lessons, book)


async def _examine(
    course: _Course,
    convention: Convention,
    room: Classroom,
    stage: int,
    cells: tuple[list[Item], list[Item], list[Item]],
    before: Marks,
    book: _Book,
) -> None:
    held_out, near, others = cells
    when = f"{stage} corrections"
    marks = await room.exam(held_out, _right(convention))
    book.note(f"{course.family} held-out, {when}", marks.accuracy)
    book.note(
        f"{course.family} held-out let in by the gate, {when}", marks.num_gated / len(held_out)
    )
    if near:
        marks = await room.exam(near, base_right)
        book.note(f"{course.family} neighbours in gate, {when}", marks.gated_accuracy)
        book.note(f"{course.family} neighbours let in, {when}", marks.num_gated / len(near))
    marks = await room.exam(others, base_right)
    book.note(f"{course.family} locality, {when}", marks.agreement(before))
    book.note(f"{course.family} other tasks lost, {when}", before.accuracy - marks.accuracy)


async def _ungated(course, client, room, others, before, book) -> None:  # noqa: ANN001
    """The same edits on prompts that no gate let in: pinned by name."""
    adapters = await client.adapters()
    if adapters:
        largest = max(adapters, key=lambda adapter: adapter.num_edits)
        marks = await room.exam(others, base_right, adapter=largest.name)
        book.note(f"{course.family} locality without the gate", marks.agreement(before))


async def _shuffled(
    course: _Course,
    seed: int,
    child: Child,
    base: Marks,
    held_out: list[Item],
    lessons: list[Item],
    book: _Book,
) -> None:
    """The same lessons with wrong targets: whatever is gained was not learned.

    A wrong word drawn for one item may be the right one of another that looks much alike, so the
    gain is the mean over several draws.
    """
    convention, gains = _convention(course.family, seed), []
    for draw in range(_SHUFFLES):
        rng = np.random.default_rng([seed, 2, draw])
        async with child.client(f"{course.family}-{seed}-shuffled-{draw}") as client:
            room = Classroom(client)
            for item in lessons:
                await room.correct(item, shuffled_target(item, convention.apply(item) or "", rng))
            marks = await room.exam(held_out, _right(convention))
        gains.append(marks.accuracy - base.accuracy)
    book.note(f"{course.family} gain of control: shuffled", float(np.mean(gains)))


async def _prior(course: _Course, seed: int, arm: PriorArm, book: _Book) -> None:
    convention = _convention(course.family, seed)
    rng = np.random.default_rng([seed, 1])
    held_out = convention.test_items(rng, _NUM_ITEMS)
    convention.neighbours(rng, _NUM_ITEMS, "test")
    convention.other_tasks(rng, _NUM_ITEMS)
    lessons = convention.teach_items(rng, course.stages[-1])
    found = await arm.accuracies(convention, lessons, held_out)
    base = book.values[f"{course.family} held-out, 0 corrections"][seed]
    book.note(f"{course.family} gain of control: prior-art rule", max(found) - base)


def _show(console: Console, figures: dict[str, Figure]) -> list[str]:
    """Print every figure and every bound; returns the bounds that were missed."""
    console.print("\nfigure: mean  [95 % t-interval]  range", highlight=False)
    for name, figure in figures.items():
        console.print(f"  {name:<52} {figure}", highlight=False)
    missed = []
    console.print("\nbounds")
    for bound in bounds():
        figure = figures[bound.figure]
        sign = "≥" if bound.is_least else "≤"
        value = figure.interval[1] if bound.by_interval else figure.mean
        verdict = "held  " if bound.holds(figure) else "MISSED"
        if not bound.holds(figure):
            missed.append(bound.figure)
        console.print(
            f"  {verdict} {bound.figure:<52} {value:.3f} {sign} {bound.limit}", highlight=False
        )
    return missed


def _document(figures: dict[str, Figure], missed: list[str]) -> dict[str, object]:
    return {
        "items_per_cell": _NUM_ITEMS,
        "bounds_missed": missed,
        "figures": {
            name: {
                "mean": figure.mean,
                "interval_95": figure.interval,
                "values": figure.values,
            }
            for name, figure in figures.items()
        },
    }
