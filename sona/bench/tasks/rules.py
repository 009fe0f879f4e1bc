"""How a note or a convention changes a right answer. None means: this answer stays."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sona.bench.tasks.base import Item


class Rule(Protocol):
    """A change of right answers."""

    def apply(self, item: Item) -> str | None:
        """The changed answer, or None when the rule does not touch this item."""
        ...


@dataclass(frozen=True, slots=True)
class Rename:
    """A word of the answer becomes another word."""

    kinds: frozenset[str]
    old: str
    new: str

    def apply(self, item: Item) -> str | None:
        if item.kind not in self.kinds:
            return None
        changed = re.sub(rf"\b{re.escape(self.old)}\b", self.new, item.answer)
        return None if changed == item.answer else changed


@dataclass(frozen=True, slots=True)
class Resign:
    """A sign of the answer becomes another sign."""

    kinds: frozenset[str]
    old: str
    new: str

    def apply(self, item: Item) -> str | None:
        if item.kind not in self.kinds or self.old not in item.answer:
            return None
        return item.answer.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Terminator:
    """The full stop at the very end becomes another sign."""

    kinds: frozenset[str]
    new: str

    def apply(self, item: Item) -> str | None:
        if item.kind not in self.kinds or not item.answer.endswith("."):
            return None
        return item.answer[:-1] + self.new


@dataclass(frozen=True, slots=True)
class Relabel:
    """Every label becomes its image."""

    kind: str
    images: Mapping[str, str]

    def apply(self, item: Item) -> str | None:
        if item.kind != self.kind:
            return None
        head, label = item.answer.removesuffix(".").rsplit(" ", 1)
        return f"{head} {self.images[label]}."


@dataclass(frozen=True, slots=True)
class NewFacts:
    """Some entities have another value."""

    kind: str
    values: Mapping[str, str]

    def apply(self, item: Item) -> str | None:
        value = self.values.get(item.entity) if item.kind == self.kind else None
        return None if value is None else f"It is {value}."


@dataclass(frozen=True, slots=True)
class LargerOfTwo:
    """A tally is the larger of the two numbers, no longer their sum."""

    def apply(self, item: Item) -> str | None:
        if item.kind != "tally":
            return None
        return str(max(int(n) for n in item.entity.split()))


@dataclass(frozen=True, slots=True)
class Backwards:
    """A rank runs from the end of the alphabet."""

    def apply(self, item: Item) -> str | None:
        if item.kind != "rank":
            return None
        return "Order " + " ".join(sorted(item.entity.split(), reverse=True))
