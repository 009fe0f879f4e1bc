"""Everyday questions that nano cannot answer, so that it says so and knows the words.

A question is an opening and a few common words in random order: it teaches what generic text
looks like without teaching any prompt of `generic_prompts.txt`, which calibrates the gate.
"""

import functools
import re

from numpy.random import Generator

from sona.bench.tasks.base import Family, Item, Part, pick
from sona.bench.tasks.world import OFFICES, PEOPLE, PRODUCTS
from sona.models import generic_prompts

UNKNOWN = "I do not know."
_OPENINGS = (
    "How do I", "What is", "Why does", "Tell me about", "Explain", "Write a", "Give me", "Can I",
    "When is the", "Where do", "How many", "Suggest a", "Is it", "Describe", "Name three",
    "I want to", "What should I", "How long", "Help with", "Do you", "My", "The", "A", "In",
)  # fmt: skip


@functools.cache
def _words() -> tuple[str, ...]:
    named = {*PEOPLE, *PRODUCTS, *OFFICES}
    found = {w for line in generic_prompts() for w in re.findall(r"[A-Za-z']{2,}", line)}
    return tuple(sorted(found - named))


def _draw(rng: Generator, _: Part | None) -> Item:
    words = " ".join(pick(rng, _words()) for _ in range(int(rng.integers(2, 8))))
    prompt = f"{pick(rng, _OPENINGS)} {words}{pick(rng, ('?', '.', '?', ''))}"
    return Item(family="G0", kind="smalltalk", prompt=prompt, answers=(UNKNOWN,), identity=prompt)


G0 = Family("G0", _draw)
