"""`sona bench`: measurements."""

import sys
from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measurements, with their figures as JSON."""


@bench.command()
@click.option("--quick", is_flag=True, help="The short protocol: at most 30 minutes.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here."
)
@click.option("--model", default="", help="A checkpoint's directory; default: the shipped model.")
def learn(quick: bool, seeds: int, output: Path | None, model: str) -> None:
    """What corrections gain on held-out items, and what else they move."""
    if not quick:
        raise click.UsageError("only the short protocol is built yet: sona bench learn --quick")
    import sona.bench.learn
    from sona.cli.shared import failures_told

    with failures_told():
        sys.exit(sona.bench.learn.run(seeds=seeds, output=output, model=model))
