"""Conventions a user may teach: which answers change, what to teach on, what must not move."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.random import Generator

from sona.bench.tasks import company, formats, skills
from sona.bench.tasks.base import Item, Part, pick
from sona.bench.tasks.families import BASE_FAMILIES
from sona.bench.tasks.rules import (
    Backwards,
    LargerOfTwo,
    NewFacts,
    Relabel,
    Rename,
    Resign,
    Rule,
    Terminator,
)
from sona.bench.tasks.world import LABELS, OFFICES, PEOPLE, TAUGHT_WORDS, TEAMS, lead_of, noted_lead

Draw = Callable[[Generator, Part | None], Item]

NUM_CHANGED_FACTS = 8
_F1_RULES: dict[str, tuple[Rule, str, str]] = {  # name: rule, taught kind, neighbours' kind
    "date-slash": (Resign(frozenset({"date"}), "-", "/"), "date", "date-ask"),
    "time-h": (Resign(frozenset({"time"}), ":", "h"), "time", "time-ask"),
    "km-word": (Rename(frozenset({"distance"}), "km", "kilometers"), "distance", "weight"),
    "kg-word": (Rename(frozenset({"weight"}), "kg", "kilograms"), "weight", "distance"),
    "log-end": (Terminator(frozenset({"status"}), ";"), "status", "status-ask"),
    "record-key": (Rename(frozenset({"record-load"}), "load", "level"), "record", "record"),
}
F1_NAMES = tuple(_F1_RULES)
F7_NAMES = ("tally-larger", "rank-backwards")


@dataclass(frozen=True)
class Convention:
    """One convention. The same family, name and seed give the same convention for ever.

    `name` picks the variant of F1 and F7; the other families have one form, drawn by `seed`.
    """

    family: str
    name: str
    seed: int = 0

    @cached_property
    def _parts(self) -> tuple[Rule, Draw, Draw | None]:
        return _build(self.family, self.name, np.random.default_rng(self.seed))

    @property
    def rule(self) -> Rule:
        """The change itself."""
        return self._parts[0]

    def apply(self, item: Item) -> str | None:
        """The corrected answer, or None when the convention leaves this item as it is."""
        return None if item.system is not None else self.rule.apply(item)

    def teach_items(self, rng: Generator, num_items: int) -> list[Item]:
        """Items the convention changes, of the teaching half, no two alike."""
        return self._collect(rng, num_items, self._parts[1], "teach", is_changed=True)

    def test_items(self, rng: Generator, num_items: int) -> list[Item]:
        """Items the convention changes, of the testing half, no two alike."""
        return self._collect(rng, num_items, self._parts[1], "test", is_changed=True)

    def neighbours(self, rng: Generator, num_items: int, part: Part) -> list[Item]:
        """Items much like the taught ones that keep their answers. F3 changes all: it has none."""
        draw = self._parts[2]
        if draw is None:
            return []
        return self._collect(rng, num_items, draw, part, is_changed=False)

    def other_tasks(self, rng: Generator, num_items: int) -> list[Item]:
        """Items of every other family in turn, of the testing half."""
        others = [family for family in BASE_FAMILIES if family.name != self.family]
        return [others[i % len(others)].base_item(rng, part="test") for i in range(num_items)]

    def _collect(
        self, rng: Generator, num_items: int, draw: Draw, part: Part, *, is_changed: bool
    ) -> list[Item]:
        """Distinct prompts while the family has them; then repeats, so that a count is a count."""
        items: list[Item] = []
        seen: set[str] = set()
        for attempt in range(200 * num_items):
            item = draw(rng, part)
            is_fresh = item.prompt not in seen or attempt > 50 * num_items
            if is_fresh and (self.apply(item) is not None) == is_changed:
                seen.add(item.prompt)
                items.append(item)
            if len(items) == num_items:
                return items
        raise RuntimeError(f"{self.family} {self.name}: {len(items)} of {num_items} items found")


def _build(family: str, name: str, rng: Generator) -> tuple[Rule, Draw, Draw | None]:
    builders = {"F1": _formats, "F2": _routing, "F3": _shelves, "F4": _leads, "F7": _procedures}
    if family not in builders:
        raise ValueError(f"family {family!r} has no convention; choose one of {sorted(builders)}")
    return builders[family](name, rng)


def _formats(name: str, _: Generator) -> tuple[Rule, Draw, Draw | None]:
    if name not in _F1_RULES:
        raise ValueError(f"F1 has no convention {name!r}; choose one of {F1_NAMES}")
    rule, taught, near = _F1_RULES[name]
    return rule, formats.KINDS[taught], formats.KINDS[near]


def _routing(_name: str, rng: Generator) -> tuple[Rule, Draw, Draw | None]:
    team, word = pick(rng, TEAMS), pick(rng, TAUGHT_WORDS[2:])  # after the units
    rule = Rename(frozenset({"ticket"}), team, word)
    others = tuple(other for other in TEAMS if other != team)

    def renamed(draw_rng: Generator, part: Part | None) -> Item:
        return company.draw_ticket(draw_rng, part, team)

    def other(draw_rng: Generator, part: Part | None) -> Item:
        return company.draw_ticket(draw_rng, part, pick(draw_rng, others))

    return rule, renamed, other


def _shelves(_name: str, rng: Generator) -> tuple[Rule, Draw, Draw | None]:
    while True:
        images = [LABELS[int(i)] for i in rng.permutation(len(LABELS))]
        if all(a != b for a, b in zip(LABELS, images, strict=True)):
            mapping = dict(zip(LABELS, images, strict=True))
            return Relabel("shelf", mapping), company.draw_shelf, None


def _leads(_name: str, rng: Generator) -> tuple[Rule, Draw, Draw | None]:
    offices = [OFFICES[int(i)] for i in rng.permutation(len(OFFICES))]
    changed, kept = offices[:NUM_CHANGED_FACTS], tuple(offices[NUM_CHANGED_FACTS:])
    values: dict[str, str] = {}
    for office in changed:
        free = [p for p in PEOPLE if p != lead_of(office) and not noted_lead(office, p)]
        values[office] = pick(rng, free)

    def changed_lead(draw_rng: Generator, part: Part | None) -> Item:
        return company.draw_lead(draw_rng, part, pick(draw_rng, tuple(changed)))

    def other_lead(draw_rng: Generator, part: Part | None) -> Item:
        return company.draw_lead(draw_rng, part, pick(draw_rng, kept))

    return NewFacts("lead", values), changed_lead, other_lead


def _procedures(name: str, _: Generator) -> tuple[Rule, Draw, Draw | None]:
    if name == "tally-larger":
        return LargerOfTwo(), skills.draw_tally, skills.draw_rank
    if name == "rank-backwards":
        return Backwards(), skills.draw_rank, skills.draw_tally
    raise ValueError(f"F7 has no convention {name!r}; choose one of {F7_NAMES}")
