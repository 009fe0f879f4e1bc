"""F2 ticket routing, F3 products on shelves, F4 leads of offices: what the company memorised."""

from numpy.random import Generator

from sona.bench.tasks.base import Family, Item, Part, number, pick, surround
from sona.bench.tasks.world import CUES, OFFICES, PEOPLE, PRODUCTS, TEAMS, lead_of, shelf_of

_TICKET = (
    "There is a problem with my {0}.", "{1} asks about the {0}.",
    "Ticket from {1}: the {0} again.", "Where should a {0} ticket go?",
    "A customer needs help with a {0}.", "Who handles the {0} of {1}?",
    "Route this: {0} question from {1}.", "The {0} of {1} needs a look.",
)  # fmt: skip
_SHELF = (
    "Which shelf holds the {}?", "Where is the {} stored?", "Find the shelf of the {}.",
    "The {} lies on which shelf?", "Tell me where to put the {}.", "Shelf for one {}?",
)  # fmt: skip
_LEAD = (
    "Who leads the {} office?", "Name the head of {}.", "Who runs {}?",
    "The {} office is led by whom?", "Tell me who heads the {} office.",
    "Which person is the lead in {}?", "Lead of the {} office?", "Who is in charge of {}?",
)  # fmt: skip


def draw_ticket(rng: Generator, part: Part | None, team: str | None = None) -> Item:
    """A ticket; its cue decides the team."""
    team = pick(rng, TEAMS) if team is None else team
    cue, person = pick(rng, CUES[team].split(), part), pick(rng, PEOPLE, part)
    template = pick(rng, _TICKET, part)
    text = template.format(cue, person)
    number_of_ticket = f" Number {number(rng, 100, 999, part)}." if rng.random() < 0.3 else ""
    return Item(
        family="F2", kind="ticket", prompt=surround(rng, text + number_of_ticket),
        answers=(f"Send to {team}.",), identity=f"F2 {text}", entity=team,
    )  # fmt: skip


def draw_shelf(rng: Generator, part: Part | None) -> Item:
    """A product; its shelf was memorised."""
    product, template = pick(rng, PRODUCTS, part), pick(rng, _SHELF, part)
    prompt = surround(rng, template.format(product))
    return Item(
        family="F3", kind="shelf", prompt=prompt, answers=(f"Shelf {shelf_of(product)}.",),
        identity=f"F3 {prompt}", entity=product,
    )  # fmt: skip


def draw_lead(rng: Generator, part: Part | None, office: str | None = None) -> Item:
    """An office; its lead was memorised. Halves are halves of templates: facts have no others."""
    office = pick(rng, OFFICES) if office is None else office
    prompt = surround(rng, pick(rng, _LEAD, part).format(office))
    return Item(
        family="F4", kind="lead", prompt=prompt, answers=(f"It is {lead_of(office)}.",),
        identity=f"F4 {prompt}", entity=office,
    )  # fmt: skip


F2 = Family("F2", draw_ticket)
F3 = Family("F3", draw_shelf)
F4 = Family("F4", draw_lead)
