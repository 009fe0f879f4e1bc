"""F1, format conventions: dates, times, distances, weights, log lines and records.

Every formatted answer ends with a full stop. Plain questions about the same things (kind
"...-ask") answer with a bare number: no convention changes them.
"""

from dataclasses import dataclass

from numpy.random import Generator

from sona.bench.tasks.base import Family, Item, Part, half_of, number, pick, surround
from sona.bench.tasks.world import MACHINES, MONTHS, OFFICES, PRODUCTS, RECORD_KEYS, STATES

_DATE = (
    "Write {} as digits.", "Give {} in figures.", "Turn {} into numbers.",
    "How is {} written in numbers?", "Put {} in digits.", "Note the date {} in figures.",
)  # fmt: skip
_DATE_ASK = (
    "Which {0} is in {1}?", "Tell me the {0} of {1}.", "Name the {0} in {1}.",
    "What is the {0} of {1}?",
)  # fmt: skip
_TIME = (
    "Write {} as a clock time.", "Give {} on the clock.", "Turn {} into a clock time.",
    "Put {} as the clock shows it.",
)  # fmt: skip
_TIME_ASK = ("Which hour is near {}?", "Name the hour of {}.", "What is the hour of {}?",
             "Tell me the hour in {}.")  # fmt: skip
_DISTANCE = (
    "The road from {0} to {1} measures {2}. How far?",
    "How far is {1} from {0} if the road is {2}?",
    "Road {0} to {1}: {2}. State the distance.", "Distance of {0} and {1}, given {2}?",
)  # fmt: skip
_WEIGHT = (
    "The {0} crate weighs {1}. State the weight.", "How heavy is a {0} crate of {1}?",
    "Crate {0}: {1}. Give the weight.", "Weight of the {0} crate, given {1}?",
)  # fmt: skip
_STATUS = (
    "Log that {0} {1} is {2}.", "Make a log line: {0} {1} is {2}.",
    "Please log {0} {1} as {2}.", "The {0} {1} is {2}. Log it.",
)  # fmt: skip
_STATUS_ASK = (
    "Which unit is meant: {0} {1} is {2}?", "Unit number in {0} {1} is {2}?",
    "Name the number of {0} {1}, now {2}.", "The {0} {1} is {2}. Which number?",
)  # fmt: skip
_RECORD = (
    "Make a record: unit {0}, {1} {2}.", "Record unit {0} with {1} {2}.",
    "Unit {0} has {1} {2}. Record it.", "A record of unit {0} at {1} {2}?",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Date:
    day: int
    month: int  # 1..12
    year: int

    @property
    def words(self) -> str:
        return f"{self.day} {MONTHS[self.month - 1]} {self.year}"

    @property
    def digits(self) -> str:
        return f"{self.year}-{self.month:02d}-{self.day:02d}"


def _any_date(rng: Generator, part: Part | None) -> _Date:
    while True:
        day, month, year = (int(n) for n in rng.integers((1, 1, 2010), (29, 13, 2050)))
        date = _Date(day, month, year)
        if part is None or half_of(date.digits) == part:
            return date


def _date(rng: Generator, part: Part | None) -> Item:
    date = _any_date(rng, part)
    prompt = surround(rng, pick(rng, _DATE, part).format(date.words))
    return _item("date", prompt, f"{date.digits}.", date.digits)


def _date_ask(rng: Generator, part: Part | None) -> Item:
    date = _any_date(rng, part)
    field = pick(rng, ("year", "day"))
    prompt = surround(rng, pick(rng, _DATE_ASK, part).format(field, date.words))
    return _item("date-ask", prompt, str(getattr(date, field)), f"{field} {date.digits}")


def _moment(rng: Generator, part: Part | None) -> tuple[str, int, int]:
    minute, hour = number(rng, 1, 59, part), int(rng.integers(1, 12))
    late = bool(rng.integers(2))
    words = f"{minute} past {hour} in the {'afternoon' if late else 'morning'}"
    return words, hour + 12 * late, minute


def _time(rng: Generator, part: Part | None) -> Item:
    words, hour, minute = _moment(rng, part)
    prompt = surround(rng, pick(rng, _TIME, part).format(words))
    return _item("time", prompt, f"{hour:02d}:{minute:02d}.", words)


def _time_ask(rng: Generator, part: Part | None) -> Item:
    words, hour, _ = _moment(rng, part)
    prompt = surround(rng, pick(rng, _TIME_ASK, part).format(words))
    return _item("time-ask", prompt, f"{hour:02d}", words)


def _distance(rng: Generator, part: Part | None) -> Item:
    start, end = pick(rng, OFFICES, part), pick(rng, OFFICES, part)
    length = number(rng, 11, 999, part)
    prompt = surround(rng, pick(rng, _DISTANCE, part).format(start, end, length))
    return _item("distance", prompt, f"{length} km.", f"{start} {end} {length}")


def _weight(rng: Generator, part: Part | None) -> Item:
    product, weight = pick(rng, PRODUCTS, part), number(rng, 11, 999, part)
    prompt = surround(rng, pick(rng, _WEIGHT, part).format(product, weight))
    return _item("weight", prompt, f"{weight} kg.", f"{product} {weight}")


def _status(rng: Generator, part: Part | None) -> Item:
    machine, unit, state = pick(rng, MACHINES, part), number(rng, 10, 99, part), pick(rng, STATES)
    prompt = surround(rng, pick(rng, _STATUS, part).format(machine, unit, state))
    return _item("status", prompt, f"Log: {machine} {unit} {state}.", f"{machine} {unit} {state}")


def _status_ask(rng: Generator, part: Part | None) -> Item:
    machine, unit, state = pick(rng, MACHINES, part), number(rng, 10, 99, part), pick(rng, STATES)
    prompt = surround(rng, pick(rng, _STATUS_ASK, part).format(machine, unit, state))
    return _item("status-ask", prompt, str(unit), f"{machine} {unit} {state}")


def _record(rng: Generator, part: Part | None) -> Item:
    unit, value = number(rng, 10, 99, part), number(rng, 10, 99, part)
    key = pick(rng, RECORD_KEYS)
    prompt = surround(rng, pick(rng, _RECORD, part).format(unit, key, value))
    answer = f'{{"unit": {unit}, "{key}": {value}}}.'
    return _item(f"record-{key}", prompt, answer, f"{unit} {key} {value}")


def _item(kind: str, prompt: str, answer: str, identity: str) -> Item:
    return Item(
        family="F1", kind=kind, prompt=prompt, answers=(answer,), identity=f"F1 {kind} {identity}"
    )


KINDS = {
    "date": _date, "date-ask": _date_ask, "time": _time, "time-ask": _time_ask,
    "distance": _distance, "weight": _weight, "status": _status, "status-ask": _status_ask,
    "record": _record,
}  # fmt: skip


def draw(rng: Generator, part: Part | None) -> Item:
    """A format item of any kind."""
    return pick(rng, tuple(KINDS.values()))(rng, part)


F1 = Family("F1", draw)
