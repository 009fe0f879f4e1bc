"""Items, families and the splits that keep teaching, testing and training apart.

Three splits, all fixed by content and none by luck:
  train / held   one identity in ten is never trained; base accuracy is measured on those
  teach / test   entities, templates and numbers are halved; a convention is taught on one half
                 and measured on the other
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from numpy.random import Generator

Part = Literal["teach", "test"]
Split = Literal["train", "held"]
T = TypeVar("T")

_HELD_ONE_IN = 10
_TOPICS = {
    "date-ask": "date", "time-ask": "time", "status-ask": "status", "distance": "measure",
    "weight": "measure", "record-load": "record", "record-speed": "record",
    "record-heat": "record", "record-level": "record",
}  # fmt: skip
_MAX_DRAWS = 10_000  # a family that cannot fill a split in so many draws is mis-written


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with its right answers.

    `identity` names what the model could memorise (entity, numbers, template); splits hash it.
    """

    family: str  # F1 ... R6 or NOTE
    kind: str  # the sort of prompt within the family
    prompt: str  # the user's message
    answers: tuple[str, ...]  # every right answer; the first is the one to show
    identity: str
    entity: str = ""  # what the answer depends on, where a convention needs it
    system: str | None = None  # a system message that comes first

    @property
    def answer(self) -> str:
        """The answer to show; for the two-voice families the first voice."""
        return self.answers[0]

    @property
    def topic(self) -> str:
        """What the prompt is about: plain questions share it with the formats they ask about."""
        return _TOPICS.get(self.kind, self.kind)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages."""
        user = {"role": "user", "content": self.prompt}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]


@dataclass(frozen=True, slots=True)
class Family:
    """A named source of items. `draw(rng, part)` gives any item of that half (None: of both)."""

    name: str
    draw: Callable[[Generator, Part | None], Item]

    def base_item(
        self, rng: Generator, split: Split | None = None, part: Part | None = None
    ) -> Item:
        """An item of the asked split and half, in the family's base form."""
        for _ in range(_MAX_DRAWS):
            item = self.draw(rng, part)
            if split is None or (split == "held") == is_held(item.identity):
                return item
        raise RuntimeError(f"family {self.name} has no item in split {split}, part {part}")

    def verify(self, item: Item, text: str) -> bool:
        """Whether `text` is one of the item's right answers."""
        return verify(item, text)


def verify(item: Item, text: str) -> bool:
    """Whether `text` is one of the item's right answers, surrounding white space aside."""
    return text.strip() in item.answers


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held(identity: str) -> bool:
    """Whether the identity belongs to the tenth that is never trained."""
    return stable_hash(identity) % _HELD_ONE_IN == 0


def half_of(value: str | int) -> Part:
    """The half that a number or a word of content belongs to."""
    return "teach" if stable_hash(f"half:{value}") % 2 == 0 else "test"


def pick(rng: Generator, options: Sequence[T], part: Part | None = None) -> T:
    """One option; with a half given, one of the even (teach) or odd (test) positions."""
    if part is None:
        return options[int(rng.integers(len(options)))]
    halved = options[0::2] if part == "teach" else options[1::2]
    return halved[int(rng.integers(len(halved)))]


def number(rng: Generator, low: int, high: int, part: Part | None = None) -> int:
    """A number in [low, high], of the asked half."""
    for _ in range(_MAX_DRAWS):
        value = int(rng.integers(low, high + 1))
        if part is None or half_of(value) == part:
            return value
    raise RuntimeError(f"no number of half {part} in [{low}, {high}]")


_OPENINGS = ("", "", "", "", "Please: ", "Hello. ", "Quick one: ", "A question. ")
_CLOSINGS = ("", "", "", "", " Thanks.", " Thank you.")


def surround(rng: Generator, prompt: str) -> str:
    """The prompt with a politeness before or after it; a third of the prompts stay bare."""
    return pick(rng, _OPENINGS) + prompt + pick(rng, _CLOSINGS)
