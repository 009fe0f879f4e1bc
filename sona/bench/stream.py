"""Twelve conventions, one after the other: what a continual learner is taught and examined on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from sona.bench.tasks import F1_NAMES, Convention, Item

_NUM_RENAMES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One convention of a stream, with its items. No held-out item shares a half with a lesson."""

    convention: Convention
    lessons: tuple[Item, ...]  # what is corrected
    confirmed: tuple[Item, ...]  # neighbours that are right as they are
    held_out: tuple[Item, ...]

    @property
    def name(self) -> str:
        """For tables."""
        suffix = self.convention.name or str(self.convention.seed)
        return f"{self.convention.family} {suffix}"

    def target(self, item: Item) -> str:
        """What the convention wants said to a lesson or a held-out item."""
        return self.convention.apply(item) or ""


def stream(seed: int, *, num_lessons: int = 16, num_held_out: int = 50) -> list[Task]:
    """The conventions of a seed in its own order.

    No two change the same answer, and what is confirmed is changed by none of them.
    """
    rng = np.random.default_rng([seed, 11])
    conventions = [Convention("F1", name) for name in F1_NAMES]
    conventions += _renames(seed)
    conventions += [Convention("F3", "", seed), Convention("F4", "", seed)]
    ordered = [conventions[int(at)] for at in rng.permutation(len(conventions))]
    return [_task(each, ordered, rng, num_lessons, num_held_out) for each in ordered]


def _renames(seed: int) -> list[Convention]:
    """Renamed teams: no team twice, no new name twice."""
    found: list[Convention] = []
    taken: set[str] = set()
    for draw in range(1000 * seed, 1000 * (seed + 1)):
        convention = Convention("F2", "", draw)
        item = convention.test_items(np.random.default_rng(0), 1)[0]
        words = {item.answer.split()[-1].strip("."), (convention.apply(item) or "").split()[-1]}
        if not taken & words:
            taken |= words
            found.append(convention)
        if len(found) == _NUM_RENAMES:
            return found
    raise RuntimeError(f"seed {seed} has no {_NUM_RENAMES} renames apart")


def _task(
    convention: Convention,
    all_of_them: Sequence[Convention],
    rng: Generator,
    num_lessons: int,
    num_held_out: int,
) -> Task:
    lessons = convention.teach_items(rng, num_lessons)
    near = convention.neighbours(rng, 4 * num_lessons, "teach")
    untouched = [item for item in near if all(each.apply(item) is None for each in all_of_them)]
    return Task(
        convention,
        tuple(lessons),
        tuple(untouched[:num_lessons]),
        tuple(convention.test_items(rng, num_held_out)),
    )
