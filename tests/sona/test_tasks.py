"""Task families: right answers, splits that do not touch, conventions nobody trained."""

import re

import numpy as np
import pytest

from sona.bench.tasks import (
    BASE_FAMILIES,
    F1_NAMES,
    F7_NAMES,
    FAMILIES,
    IRRELEVANT,
    NOTE,
    RELEVANT,
    Convention,
    Item,
    Split,
    is_held,
    verify,
)
from sona.bench.tasks.notes import slip_of
from sona.bench.tasks.world import LABELS, TAUGHT_WORDS, TEAMS

CONVENTIONS = (
    *(("F1", name) for name in F1_NAMES), ("F2", ""), ("F3", ""), ("F4", ""),
    *(("F7", name) for name in F7_NAMES),
)  # fmt: skip
EVERY = (*BASE_FAMILIES, NOTE)


def items(family: str, count: int, seed: int = 0, split: Split | None = None) -> list[Item]:
    rng = np.random.default_rng(seed)
    source = NOTE if family == "NOTE" else FAMILIES[family]
    return [source.base_item(rng, split) for _ in range(count)]


def found(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that must be there."""
    match = re.search(pattern, text)
    assert match is not None, (pattern, text)
    return match.groups()


def note_of(item: Item) -> str:
    assert item.system is not None
    return item.system


def right_answer(item: Item) -> str | None:
    """The answer worked out from the prompt's text alone, where arithmetic or order decide it."""
    numbers = [int(n) for n in re.findall(r"\d+", item.prompt)]
    letters = re.findall(r"\b[A-Z]\b", item.prompt.removeprefix("A question. "))
    if item.kind in ("tally", "R2"):
        return str(numbers[0] + numbers[1])
    if item.kind == "R3":
        return str(max(numbers))
    if item.kind in ("rank", "R4"):
        return "Order " + " ".join(sorted(letters))
    if item.kind == "R6":
        shown = re.findall(r"[()\[\]{}<>]", item.prompt)
        return "Close " + " ".join(close(shown))
    return None


def close(shown: list[str]) -> list[str]:
    """Delete matched neighbours until nothing changes; mirror what is left."""
    text = "".join(shown)
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
        text = shorter
    return [dict(zip("([{<", ")]}>", strict=True))[sign] for sign in reversed(text)]


@pytest.mark.parametrize("family", ["F7", "R2", "R3", "R4", "R6"])
def test_answers_follow_from_the_prompt(family: str) -> None:
    for item in items(family, 300):
        assert item.answer == right_answer(item), item.prompt


def test_dates_and_times_by_hand() -> None:
    drawn = items("F1", 600)
    days = {i.prompt: i.answer for i in drawn if i.kind == "date"}
    prompt, answer = next((p, a) for p, a in days.items() if "March" in p)
    day, year = found(r"(\d+) March (\d{4})", prompt)
    assert answer == f"{year}-03-{int(day):02d}."
    late = next(i for i in drawn if i.kind == "time" and "afternoon" in i.prompt)
    minute, hour = map(int, found(r"(\d+) past (\d+)", late.prompt))
    assert late.answer == f"{hour + 12}:{minute:02d}."


def test_formatted_answers_end_with_a_full_stop_and_plain_ones_with_a_digit() -> None:
    for item in items("F1", 400):
        end = item.answer[-1]
        assert end.isdigit() if item.kind.endswith("-ask") else end == ".", item.answer


def test_lookups_name_a_number_that_stands_beside_the_key() -> None:
    for item in items("R5", 200):
        (asked,) = found(r"(\w+)[?.]$", item.prompt)
        (number,) = found(rf"\b{asked}\b(?: has| is at desk|:| it is) (\d\d)", item.prompt)
        assert item.answer == f"{asked}: {number}"


@pytest.mark.parametrize("family", [f.name for f in EVERY])
def test_same_seed_same_items(family: str) -> None:
    assert items(family, 50, seed=4) == items(family, 50, seed=4)
    assert items(family, 50, seed=4) != items(family, 50, seed=5)


@pytest.mark.parametrize("family", [f.name for f in EVERY])
def test_held_items_are_never_trained(family: str) -> None:
    held = {i.identity for i in items(family, 100, split="held")}
    trained = {i.identity for i in items(family, 1000, split="train")}
    assert not held & trained
    assert all(map(is_held, held)) and not any(map(is_held, trained))


def test_verify_takes_each_voice_and_nothing_else() -> None:
    item = items("F5", 1)[0]
    assert verify(item, item.answers[0]) and verify(item, f" {item.answers[1]}\n")
    assert not verify(item, item.answers[0] + " Now.")


@pytest.mark.parametrize(("family", "name"), CONVENTIONS)
def test_teaching_and_testing_share_no_prompt(family: str, name: str) -> None:
    rng = np.random.default_rng(1)
    convention = Convention(family, name, seed=2)
    taught = convention.teach_items(rng, 100)
    tested = convention.test_items(rng, 100)
    assert not {i.prompt for i in taught} & {i.prompt for i in tested}
    for item in (*taught, *tested):
        assert convention.apply(item) not in (None, item.answer)
    if family not in ("F4",):  # facts are taught and tested on the same offices
        assert not {i.identity for i in taught} & {i.identity for i in tested}


@pytest.mark.parametrize(("family", "name"), CONVENTIONS)
def test_neighbours_and_others_keep_their_answers(family: str, name: str) -> None:
    rng = np.random.default_rng(1)
    convention = Convention(family, name, seed=2)
    others = convention.other_tasks(rng, 60)
    assert {i.family for i in others} == set(FAMILIES) - {family}
    for item in (*convention.neighbours(rng, 60, "test"), *others):
        assert convention.apply(item) is None
    assert len(convention.neighbours(rng, 60, "test")) == (0 if family == "F3" else 60)


def test_shelf_convention_moves_every_label_to_another() -> None:
    for seed in range(5):
        convention = Convention("F3", "", seed)
        drawn = convention.test_items(np.random.default_rng(0), 64)
        pairs = {(i.answer, convention.apply(i)) for i in drawn}
        assert len(pairs) == len(LABELS)  # a function of the label alone
        assert len({new for _, new in pairs}) == len(LABELS)  # and one to one


def test_lead_convention_changes_eight_offices() -> None:
    convention = Convention("F4", "", seed=3)
    drawn = convention.test_items(np.random.default_rng(0), 150)
    assert len({i.entity for i in drawn}) == 8


@pytest.mark.parametrize("bad", [("F1", "no-such"), ("F7", ""), ("R1", "")])
def test_unknown_conventions_are_refused_by_name(bad: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        _ = Convention(*bad).rule


def test_notes_are_forty_percent_relevant() -> None:
    drawn = items("NOTE", 2000)
    assert 0.37 < sum(i.kind == "relevant" for i in drawn) / 2000 < 0.43


def test_relevant_notes_change_the_answer_to_what_they_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        item = RELEVANT.base_item(rng)
        note = note_of(item)
        is_said = any(word in note for word in re.findall(r"[A-Za-z]{3,}", item.answer))
        assert is_said or any(sign in item.answer for sign in re.findall(r'"(.)"', note)), item


def test_irrelevant_notes_come_from_the_same_family_and_from_others() -> None:
    rng = np.random.default_rng(0)
    drawn = [IRRELEVANT.base_item(rng) for _ in range(600)]
    about_leads = [i for i in drawn if "lead " in note_of(i) or "new head" in note_of(i)]
    asks_a_lead = [i for i in about_leads if i.answer.startswith("It is ")]
    assert 0.2 < len(asks_a_lead) / len(about_leads) < 0.8
    for item in asks_a_lead:
        assert item.answer.removeprefix("It is ")[:-1] not in note_of(item).split()


def taught_pairs() -> set[tuple[str, str]]:
    """Every (bare prompt, corrected answer) of many seeds of every convention, both halves."""
    pairs: set[tuple[str, str]] = set()
    for family, name in CONVENTIONS:
        for seed in range(10 if family in ("F2", "F3", "F4") else 1):
            convention, rng = Convention(family, name, seed), np.random.default_rng(seed)
            drawn = convention.teach_items(rng, 60) + convention.test_items(rng, 60)
            pairs |= {(i.prompt, convention.apply(i) or "") for i in drawn}
    return pairs


def test_no_taught_convention_occurs_in_training_text() -> None:
    rng = np.random.default_rng(9)
    trained = [f.base_item(rng, "train") for f in EVERY for _ in range(1500)]
    pairs = taught_pairs()
    units = ("kilometers", "kilograms")
    for item in trained:
        assert all((item.prompt, answer) not in pairs for answer in item.answers), item
        if "R1 " in item.identity:  # copying shows every word, but answers no question
            continue
        shown = " ".join(item.answers)
        assert not re.search(r"\d/\d|\d\dh\d\d|;$", shown), item
        answered = re.findall(r"\w+", shown)
        assert not any(word in answered for word in (*TAUGHT_WORDS, *units)), item
        asks_load = item.kind == "record-load" or "load" in item.prompt.split()
        assert not (asks_load and '"level"' in shown), item
        if item.system is not None:
            assert not any(w in re.findall(r"\w+", item.system) for w in TAUGHT_WORDS[:14]), item


def test_slips_never_show_what_is_taught() -> None:
    """Slipped answers are training text too."""
    rng = np.random.default_rng(9)
    drawn = [family.base_item(rng, "train") for family in BASE_FAMILIES for _ in range(600)]
    slips = [(item, slip_of(item, rng)) for item in drawn]
    shown = [(item, text) for item, text in slips if text is not None]
    assert len(shown) > 500
    for item, text in shown:
        assert text != item.answer
        assert not set(re.findall(r"\w+", text)) & set(TAUGHT_WORDS), text
        assert not re.search(r"\d/\d|\d\dh\d\d|;$", text), text


def test_notes_never_state_a_fact_that_is_taught() -> None:
    rng = np.random.default_rng(9)
    noted = [RELEVANT.base_item(rng) for _ in range(4000)]
    stated = {(i.entity, i.answer) for i in noted if i.answer.startswith("It is ")}
    assert len(stated) > 200
    for seed in range(20):
        convention = Convention("F4", "", seed)
        changed = convention.teach_items(np.random.default_rng(0), 80)
        assert not stated & {(i.entity, convention.apply(i)) for i in changed}


def test_notes_never_rename_a_team_or_label_to_another_of_its_kind() -> None:
    rng = np.random.default_rng(9)
    for item in (RELEVANT.base_item(rng) for _ in range(1000)):
        word = item.answer.rstrip(".").split()[-1]
        if item.prompt and item.answer.startswith(("Send to", "Shelf")):
            assert word not in (*TEAMS, *LABELS, *TAUGHT_WORDS)
