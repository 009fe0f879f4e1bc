"""NOTE episodes: a system message with one note, which the answer must follow or ignore.

40 % of the notes bear on the question. The rest are of the same sort but about something else, or
of another family. No note ever states a change that `conventions` may teach.
"""

from dataclasses import dataclass, replace

from numpy.random import Generator

from sona.bench.tasks import company, formats
from sona.bench.tasks.base import Family, Item, Part, pick
from sona.bench.tasks.families import BASE_FAMILIES, TWO_VOICED
from sona.bench.tasks.rules import NewFacts, Rename, Resign, Rule, Terminator
from sona.bench.tasks.world import (
    LABELS,
    NOTE_SIGNS,
    NOTE_WORDS,
    OFFICES,
    PEOPLE,
    TEAMS,
    noted_lead,
)

RELEVANT_FRACTION = 0.4
_RENAMES = (
    "NOTE: say {1} instead of {0}.", "NOTE: {0} is now called {1}.", "NOTE: for {0} write {1}.",
    "NOTE: the word for {0} is {1}.",
)  # fmt: skip
_SIGNS = (
    'NOTE: in {2} write "{1}" instead of "{0}".', 'NOTE: {2} have "{1}" in place of "{0}".',
    'NOTE: replace "{0}" by "{1}" in {2}.', 'NOTE: the "{0}" in {2} is now "{1}".',
)  # fmt: skip
_LEADS = (
    "NOTE: the lead of the {0} office is {1}.", "NOTE: {0} is now led by {1}.",
    "NOTE: the {0} office has a new head, {1}.", "NOTE: at {0} the lead is now {1}.",
)  # fmt: skip
_WORD_KINDS = {"ticket": TEAMS, "shelf": LABELS, "distance": ("km",), "weight": ("kg",)}
_SIGN_KINDS = {"date": ("-", "dates"), "time": (":", "times"), "status": (".", "logs")}
_NOTED_KINDS = (*_WORD_KINDS, *_SIGN_KINDS, "lead")
_LEAD_WEIGHT = 5  # in training: to tell 56 offices apart takes more examples than eight teams
_MAX_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Note:
    """What the system message says and what it does to answers."""

    text: str
    rule: Rule
    words: tuple[str, ...]  # the words it is about: never the material of a copy task beside it


def draw_note(rng: Generator, part: Part | None, kind: str, about: str | None = None) -> Note:
    """A note on prompts of `kind`; `about` fixes the word or office it speaks of."""
    if kind in _SIGN_KINDS:
        old, where = _SIGN_KINDS[kind]
        new, kinds = pick(rng, NOTE_SIGNS), frozenset({kind})
        rule = Terminator(kinds, new) if old == "." else Resign(kinds, old, new)
        return Note(pick(rng, _SIGNS, part).format(old, new, where), rule, (new,))
    if kind == "lead":
        office = pick(rng, OFFICES) if about is None else about
        person = pick(rng, [p for p in PEOPLE if noted_lead(office, p)])
        text = pick(rng, _LEADS, part).format(office, person)
        return Note(text, NewFacts(kind, {office: person}), (office,))
    old = pick(rng, _WORD_KINDS[kind]) if about is None else about
    new = pick(rng, NOTE_WORDS)
    text = pick(rng, _RENAMES, part).format(old, new)
    return Note(text, Rename(frozenset({kind}), old, new), (old, new))


def draw_relevant(rng: Generator, part: Part | None) -> Item:
    """A question whose answer the note changes."""
    kind = _noted_kind(rng, part)
    item = _question(rng, part, kind)
    note = draw_note(rng, part, kind, _about(item))
    changed = note.rule.apply(item)
    assert changed is not None, f"{note.text!r} leaves {item.prompt!r} as it is"
    return _noted(item, note, changed, "relevant")


def draw_irrelevant(rng: Generator, part: Part | None) -> Item:
    """A question whose answer stays in spite of the note, often one of the note's own sort."""
    for _ in range(_MAX_DRAWS):
        kind = _noted_kind(rng, part)
        if rng.random() < 0.5:
            is_own_sort = rng.random() < 0.7
            item = _question(rng, part, kind if is_own_sort else pick(rng, _NOTED_KINDS))
        else:
            item = pick(rng, BASE_FAMILIES).draw(rng, part)
        note = draw_note(rng, part, kind)
        is_ambiguous = item.family == "R1" and any(w in item.prompt for w in note.words)
        if not is_ambiguous and item.family not in TWO_VOICED and note.rule.apply(item) is None:
            return _noted(item, note, item.answer, "irrelevant")
    raise RuntimeError("no irrelevant note found")


def slip_of(item: Item, rng: Generator) -> str | None:
    """The answer as a note would change it, for an item without one; None where none could."""
    if item.system is not None or item.kind not in _NOTED_KINDS:
        return None
    return draw_note(rng, None, item.kind, _about(item)).rule.apply(item)


def _draw(rng: Generator, part: Part | None) -> Item:
    return (draw_relevant if rng.random() < RELEVANT_FRACTION else draw_irrelevant)(rng, part)


def _noted_kind(rng: Generator, part: Part | None) -> str:
    extra = ("lead",) * (_LEAD_WEIGHT - 1) if part == "train" else ()
    return pick(rng, (*_NOTED_KINDS, *extra))


def _question(rng: Generator, part: Part | None, kind: str) -> Item:
    if kind in formats.KINDS:
        return formats.KINDS[kind](rng, part)
    draws = {"ticket": company.draw_ticket, "shelf": company.draw_shelf, "lead": company.draw_lead}
    return draws[kind](rng, part)


def _about(item: Item) -> str | None:
    """What a note must speak of to bear on the item; None: every note of its kind does."""
    if item.kind == "lead":
        return item.entity
    if item.kind in ("ticket", "shelf"):
        return item.answer.removesuffix(".").rsplit(" ", 1)[1]
    return None


def _noted(item: Item, note: Note, answer: str, kind: str) -> Item:
    return replace(
        item, family="NOTE", kind=kind, answers=(answer,), system=note.text,
        identity=f"NOTE {kind} {note.text} {item.identity}",
    )  # fmt: skip


NOTE = Family("NOTE", _draw)
RELEVANT = Family("NOTE-relevant", draw_relevant)
IRRELEVANT = Family("NOTE-irrelevant", draw_irrelevant)
