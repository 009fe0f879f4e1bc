"""`sona bench learn --arms`: the arms of `sona.bench.consolidation` over seeds, resumable."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sona.bench import results
from sona.bench.consolidation import ARMS, CONFIG, Course, arm_of, examine, follow
from sona.bench.continual import Record
from sona.bench.lab import Lab
from sona.bench.statistics import Figure
from sona.bench.stream import stream
from sona.bench.tasks import Item
from sona.bench.tasks.families import BASE_FAMILIES

_NUM_GENERIC, _NUM_EXAM = 64, 100
_FIGURES = ("final", "learned", "backward", "forward", "forgetting", "retained")

Run = dict[str, Any]
"""One arm of one seed, as it is written."""


def run(
    *, arms: Sequence[str], seeds: int, num_tasks: int, output: Path | None, model: str = ""
) -> int:
    """Measure what `output` does not have yet, print, write; returns the exit status."""
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        raise ValueError(f"there is no arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    console = Console(soft_wrap=True)
    settings = {"num_tasks": num_tasks, "model": model, "tune": asdict(CONFIG)}
    runs = _known(output, settings)
    known = {(each["arm"], each["seed"]) for each in runs}
    if any((arm, seed) not in known for arm in arms for seed in range(seeds)):
        asyncio.run(_missing(arms, seeds, runs, settings, output, console))
    _show(console, [each for each in runs if each["arm"] in arms and each["seed"] < seeds])
    return 0


async def _missing(
    arms: Sequence[str],
    seeds: int,
    runs: list[Run],
    settings: Run,
    output: Path | None,
    console: Console,
) -> None:
    known = {(each["arm"], each["seed"]) for each in runs}
    command = f"sona bench learn --arms {','.join(arms)} --seeds {seeds}"
    lab = Lab(settings["model"], CONFIG)
    try:
        for seed in range(seeds):
            left = [arm for arm in arms if (arm, seed) not in known]
            if left:
                course = _course(lab, seed, settings["num_tasks"])
                async for each in _runs(left, lab, course, console):
                    runs.append(each)
                    results.write(output, command, {"settings": settings, "runs": runs})
    finally:
        lab.close()


async def _runs(
    arms: Sequence[str], lab: Lab, course: Course, console: Console
) -> AsyncGenerator[Run, None]:
    row, generic = await examine(None, lab, course)
    base = Record(np.array([row]), np.array(row), np.array([generic]), generic)
    for name in arms:
        began = time.monotonic()
        record = await follow(arm_of(name, lab, course), lab, course, base)
        seconds = time.monotonic() - began
        console.print(
            f"seed {course.seed} {name}: ACC {record.final:.3f} BWT {record.backward:+.3f} "
            f"base skills {record.retained:.3f}, {seconds:.0f} s",
            highlight=False,
        )
        yield _written(name, course, record)


def _course(lab: Lab, seed: int, num_tasks: int) -> Course:
    tasks = stream(seed)[:num_tasks]

    def is_untouched(item: Item) -> bool:
        return all(task.convention.apply(item) is None for task in tasks)

    rng = np.random.default_rng([seed, 12])
    families = [BASE_FAMILIES[at % len(BASE_FAMILIES)] for at in range(8 * _NUM_EXAM)]
    taught = [family.base_item(rng, part="teach") for family in families]
    tested = [family.base_item(rng, part="test") for family in families]
    generic = [item for item in taught if is_untouched(item)][:_NUM_GENERIC]
    return Course(
        tasks=tasks,
        new=[[lab.example(item, task.target(item)) for item in task.lessons] for task in tasks],
        confirmed=[[lab.example(item, item.answer) for item in task.confirmed] for task in tasks],
        generic=[lab.example(item, item.answer) for item in generic],
        exam=[item for item in tested if is_untouched(item)][:_NUM_EXAM],
        seed=seed,
    )


def _known(output: Path | None, settings: Run) -> list[Run]:
    """Runs of an earlier call with the same settings. Raises ValueError for another's file."""
    if output is None or not output.exists():
        return []
    found = json.loads(output.read_text("utf-8"))
    if found.get("settings") != settings:
        raise ValueError(f"{output} has runs with other settings; choose another file")
    return list(found["runs"])


def _written(arm: str, course: Course, record: Record) -> Run:
    return {
        "arm": arm,
        "seed": course.seed,
        "tasks": [task.name for task in course.tasks],
        **{name: getattr(record, name) for name in _FIGURES},
        "accuracy": record.accuracy.round(4).tolist(),
        "base": record.base.tolist(),
        "generic": record.generic.tolist(),
        "generic_base": record.generic_base,
    }


def _show(console: Console, runs: Sequence[Run]) -> None:
    console.print("\nfigure: mean  [95 % t-interval]  range", highlight=False)
    for arm in dict.fromkeys(each["arm"] for each in runs):
        own = [each for each in runs if each["arm"] == arm]
        console.print(arm, highlight=False)
        for name in _FIGURES:
            figure = Figure(tuple(each[name] for each in own))
            console.print(f"  {name:<12} {figure}", highlight=False)
