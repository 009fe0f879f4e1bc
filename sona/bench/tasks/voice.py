"""F5 two greetings and F6 two lengths of reply, half and half: nothing to know, only to prefer.

`answers[0]` is the first voice and `answers[1]` the second. `base_text` flips a fair coin.
"""

from numpy.random import Generator

from sona.bench.tasks.base import Family, Item, Part, number, pick, surround
from sona.bench.tasks.world import OFFICES, PEOPLE

_GREET = (
    "Greet {}.", "Say hello to {}.", "Welcome {} for me.", "Visitor {} has come in. Greet them.",
    "Write a greeting for {}.", "A word of welcome for {}?",
)  # fmt: skip
_REPLY = (
    "Remind {0} about room {1}.", "Book room {1} for {0}.", "Tell {0} to call room {1}.",
    "Move {0} into room {1}.", "Ask {0} to open room {1}.", "Show {0} the way to room {1}.",
)  # fmt: skip


def _greet(rng: Generator, part: Part | None) -> Item:
    person, template = pick(rng, PEOPLE, part), pick(rng, _GREET, part)
    place = f" Office {pick(rng, OFFICES, part)}." if rng.random() < 0.3 else ""
    prompt = surround(rng, template.format(person) + place)
    answers = (f"Good day, {person}.", f"Hi {person}!")
    return Item(family="F5", kind="greet", prompt=prompt, answers=answers, identity=f"F5 {prompt}")


def _reply(rng: Generator, part: Part | None) -> Item:
    person, room = pick(rng, PEOPLE, part), number(rng, 100, 999, part)
    prompt = surround(rng, pick(rng, _REPLY, part).format(person, room))
    answers = ("Done.", f"Of course, I will see to it for {person} at once.")
    return Item(family="F6", kind="reply", prompt=prompt, answers=answers, identity=f"F6 {prompt}")


F5 = Family("F5", _greet)
F6 = Family("F6", _reply)


def base_text(rng: Generator, item: Item) -> str:
    """The answer the base model is trained on: either voice with the same chance."""
    return item.answers[int(rng.integers(len(item.answers)))]
