"""F7 procedures, and R1 to R6: copy, add, largest, sort, look up, close brackets."""

from numpy.random import Generator

from sona.bench.tasks.base import Family, Item, Part, half_of, number, pick, surround
from sona.bench.tasks.world import COPY_WORDS, OFFICES, PEOPLE, PRODUCTS, SIGNS

_TALLY = ("Tally {} and {}.", "Make a tally of {} and {}.", "The tally of {} with {}?",
          "Please tally {} and {} for me.")  # fmt: skip
_RANK = ("Rank these bins: {}.", "Put the bins {} in rank.", "Bins {} by rank?",
         "Give the rank order of bins {}.")  # fmt: skip
_COPY = ("Repeat: {}", "Say again: {}", "Copy the words: {}", "Echo this: {}")
_CODE = ("Repeat the code {}", "Type the code {}", "Copy this code: {}", "Echo code {}")
_ADD = ("Add {} and {}.", "What is {} plus {}?", "{} plus {} gives what?", "Sum of {} and {}?")
_LARGEST = ("Largest of {}?", "Which is the largest: {}?", "Find the largest number in {}.",
            "From {} pick the largest.")  # fmt: skip
_SORT = ("Sort {}.", "Put in order: {}.", "Order these items: {}.", "Sort the six items {}.")
_LOOKUP_LINE = (" {} has {}.", " {} is at desk {}.", " {}: {}.", " For {} it is {}.")
_LOOKUP_HEAD = ("Read the list.", "Here is the list.", "List:", "The staff list follows.")
_LOOKUP_ASK = (" Which number has {}?", " What is the number of {}?", " Number for {}?",
               " Now tell me the number of {}.")  # fmt: skip
_CLOSE = ("Close the brackets: {}", "Which brackets close {}", "Finish the brackets {}",
          "Add the closing brackets to {}")  # fmt: skip
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_KEYS = PEOPLE + PRODUCTS + OFFICES
MAX_DEPTH = 6
MAX_LOOKUP_ENTRIES = 100  # about 1,000 tokens


def _two(rng: Generator, low: int, high: int, part: Part | None) -> tuple[int, int]:
    while True:
        a, b = (int(n) for n in rng.integers(low, high + 1, 2))
        if part is None or half_of(f"{a} {b}") == part:
            return a, b


def draw_tally(rng: Generator, part: Part | None) -> Item:
    """F7: a tally is a sum of two numbers."""
    a, b = _two(rng, 10, 49, part)
    prompt = surround(rng, pick(rng, _TALLY, part).format(a, b))
    return Item(
        family="F7", kind="tally", prompt=prompt, answers=(f"{a + b}",),
        identity=f"F7 tally {a} {b}", entity=f"{a} {b}",
    )  # fmt: skip


def draw_rank(rng: Generator, part: Part | None) -> Item:
    """F7: four bins in the order of the alphabet."""
    letters = _letters(rng, 4, part)
    shown = " ".join(letters)
    prompt = surround(rng, pick(rng, _RANK, part).format(shown))
    return Item(
        family="F7", kind="rank", prompt=prompt, answers=("Order " + " ".join(sorted(letters)),),
        identity=f"F7 rank {shown}", entity=shown,
    )  # fmt: skip


def _letters(rng: Generator, count: int, part: Part | None) -> list[str]:
    while True:
        letters = [_LETTERS[int(i)] for i in rng.permutation(26)[:count]]
        if part is None or half_of("".join(sorted(letters))) == part:
            return letters


def _procedure(rng: Generator, part: Part | None) -> Item:
    return (draw_tally if rng.random() < 0.5 else draw_rank)(rng, part)


def _copy(rng: Generator, part: Part | None) -> Item:
    if rng.random() < 0.5:
        count = int(rng.integers(3, 11))
        signs = [pick(rng, SIGNS) if i % 2 else str(rng.integers(10)) for i in range(count)]
        text = "".join(signs)
        prompt, answer = pick(rng, _CODE, part).format(text), text
    else:
        text = " ".join(pick(rng, COPY_WORDS, part) for _ in range(int(rng.integers(2, 9))))
        prompt, answer = pick(rng, _COPY, part).format(text), f"Copy: {text}"
    return _skill("R1", prompt, answer, text)


def _add(rng: Generator, part: Part | None) -> Item:
    a, b = _two(rng, 10, 99, part)
    prompt = surround(rng, pick(rng, _ADD, part).format(a, b))
    return _skill("R2", prompt, str(a + b), f"{a} {b}")


def _largest(rng: Generator, part: Part | None) -> Item:
    values = [number(rng, 10, 99, part) for _ in range(int(rng.integers(3, 6)))]
    shown = " ".join(str(v) for v in values)
    prompt = surround(rng, pick(rng, _LARGEST, part).format(shown))
    return _skill("R3", prompt, str(max(values)), shown)


def _sort(rng: Generator, part: Part | None) -> Item:
    letters = _letters(rng, 6, part)
    shown = " ".join(letters)
    prompt = surround(rng, pick(rng, _SORT, part).format(shown))
    return _skill("R4", prompt, "Order " + " ".join(sorted(letters)), shown)


def draw_lookup(rng: Generator, part: Part | None, num_entries: int | None = None) -> Item:
    """A list of named numbers: half of them short, one in twenty-five up to about 1,000 tokens."""
    if num_entries is None:
        chance = rng.random()
        longest = 4 if chance < 0.5 else 12 if chance < 0.96 else MAX_LOOKUP_ENTRIES
        num_entries = int(rng.integers(2, longest + 1))
    keys = [_KEYS[int(i)] for i in rng.permutation(len(_KEYS))[:num_entries]]
    numbers = [number(rng, 10, 99, part) for _ in keys]
    line = pick(rng, _LOOKUP_LINE, part)
    lines = "".join(line.format(k, n) for k, n in zip(keys, numbers, strict=True))
    wanted = int(rng.integers(num_entries))
    prompt = (
        pick(rng, _LOOKUP_HEAD, part) + lines + pick(rng, _LOOKUP_ASK, part).format(keys[wanted])
    )
    identity = f"{keys[wanted]} {numbers[wanted]} {keys[0]} {numbers[0]}"
    return _skill("R5", prompt, f"{keys[wanted]}: {numbers[wanted]}", identity)


def _brackets(rng: Generator, part: Part | None) -> Item:
    while True:
        text, closing = _open_brackets(rng)
        if part is None or half_of(text) == part:
            return _skill("R6", pick(rng, _CLOSE, part).format(text), f"Close {closing}", text)


def _open_brackets(rng: Generator) -> tuple[str, str]:
    """Brackets with one to six left open, and what closes them. Some pairs close on the way."""
    target = int(rng.integers(1, MAX_DEPTH + 1))
    stack: list[str] = []
    shown: list[str] = []
    while len(stack) < target:
        if stack and len(shown) < 10 and rng.random() < 0.2:
            shown.append(_PAIRS[stack.pop()])
        else:
            stack.append(pick(rng, tuple(_PAIRS)))
            shown.append(stack[-1])
    return " ".join(shown), " ".join(_PAIRS[b] for b in reversed(stack))


def _skill(family: str, prompt: str, answer: str, identity: str) -> Item:
    identity = f"{family} {identity}"
    return Item(family=family, kind=family, prompt=prompt, answers=(answer,), identity=identity)


F7 = Family("F7", _procedure)
R1 = Family("R1", _copy)
R2 = Family("R2", _add)
R3 = Family("R3", _largest)
R4 = Family("R4", _sort)
R5 = Family("R5", draw_lookup)
R6 = Family("R6", _brackets)
