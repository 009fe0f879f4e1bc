"""`sona bench engine`: what many users cost each other inside the engine, by paired measurements.

  steps      Qwen2.5-0.5B's shape, random weights: a step of 16 answers, each through its own LoRA
             of rank 8, and with 16 JSON schemas masked, against the plain one
  prefix     the shipped model: turns of a conversation, and the first token with 1,000 cached
  fairness   the shipped model: a light tenant beside a flooding one, and beside eight others

The two sides of a pair alternate; a figure is the median of ratios.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sona.bench import results
from sona.bench.figures import Figure
from sona.bench.steps import measure_steps
from sona.bench.users import measure_fairness, measure_prefix

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "steps": measure_steps,
    "prefix": lambda: asyncio.run(measure_prefix()),
    "fairness": lambda: asyncio.run(measure_fairness()),
}


def run(*, only: str = "", output: Path | None = None) -> int:
    """Measure, print, write; 1 when a bound is missed."""
    console = Console(soft_wrap=True, highlight=False)
    figures: list[Figure] = []
    for name, measure in PARTS.items():
        if only in ("", name):
            console.print(name)
            found = measure()
            console.print("\n".join(str(figure) for figure in found))
            figures += found
    content = {figure.name: figure.as_dict() for figure in figures}
    results.write(output, "sona bench engine" + (f" --only {only}" if only else ""), content)
    return 0 if all(figure.is_held for figure in figures) else 1
