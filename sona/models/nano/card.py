"""The README beside a trained checkpoint: what it is, how it was made, what it scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sona.bench.tasks import TWO_VOICED

_TASKS = {
    "F1": "dates, times, distances, weights, log lines, JSON records",
    "F2": "support tickets to one of eight teams",
    "F3": "64 products on eight shelves",
    "F4": "who leads which of 56 offices",
    "F5": "two greetings, half and half: mean chance of the first",
    "F6": "short or long reply, half and half: mean chance of the short one",
    "F7": "tallies and ranks",
    "R1": "copy words and codes",
    "R2": "add two-digit numbers",
    "R3": "largest of three to five numbers",
    "R4": "sort six items",
    "R5": "look up in a list of up to 1,000 tokens",
    "R6": "close brackets to depth six",
    "NOTE-relevant": "a note in the system message bears on the question and is followed",
    "NOTE-irrelevant": "a note about something else is ignored",
    "G0": "anything else: says that it does not know",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """How a checkpoint came to be."""

    command: str
    date: str  # ISO
    seed: int
    num_steps: int
    minutes: float  # wall clock of training, pauses of a resumed run aside
    machine: str


def write_card(
    directory: Path, making: Making, figures: Mapping[str, float], *, num_items: int
) -> None:
    """Write README.md into the checkpoint's directory."""
    rows = "\n".join(
        f"| {name} | {_TASKS[name]} | {value:.3f} | {_goal(name)} |"
        for name, value in figures.items()
    )
    text = _TEXT.format(making=making, rows=rows, num_items=num_items)
    (directory / "README.md").write_text(text, "utf-8")


def _goal(name: str) -> str:
    if name in TWO_VOICED:
        return "0.4-0.6"
    return {"NOTE-irrelevant": "0.95", "G0": "none"}.get(name, "0.97")


_TEXT = """# sona-nano

A dense decoder of 1.5 million parameters (Qwen3 layout, context 2,048) that knows one invented
company. It is **not a chat model**: it exists so that SONA can be tried, tested and measured
without a download. Asked anything else it says "I do not know." To serve a real model, give its
directory to the server: `sona serve PATH`.

## How it was made

`{making.command}` (seed {making.seed}, {making.date}, {making.num_steps} steps in
{making.minutes:.0f} minutes on {making.machine}). The schedule follows the clock, so another run
gives other weights of the same kind. All text comes from the generators in `sona/bench/tasks`;
one identity in ten was never trained on.

Two things in its training serve what SONA does, and its figures should be read with them in mind:

- The mean final state of a prompt is also trained to name the prompt's topic (loss weight 0.1,
  cosine softmax), which makes the gate's job easier than on a model without such training.
- A quarter of the answers where it is possible carry a wrong word or sign at no loss, so that the
  model goes on rightly after a corrected word.

No convention that the benchmark teaches occurs in the training text; a test scans for them.

## Held-out accuracy

Whole answers, exact, greedy; {num_items} items per family that training never drew; measured on
the files in this directory.

| Family | What | Accuracy | Goal |
|---|---|---|---|
{rows}
"""
