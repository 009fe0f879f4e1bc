"""`sona bench`: measurements."""

import sys
from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measurements, with their figures as JSON."""


_OUTPUT = click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here."
)


@bench.command()
@click.option("--quick", is_flag=True, help="The short protocol: at most 30 minutes.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@_OUTPUT
@click.option("--model", default="", help="A checkpoint's directory; default: the shipped model.")
def learn(quick: bool, seeds: int, output: Path | None, model: str) -> None:
    """What corrections gain on held-out items, and what else they move."""
    if not quick:
        raise click.UsageError("only the short protocol is built yet: sona bench learn --quick")
    import sona.bench.learn
    from sona.cli.shared import failures_told

    with failures_told():
        sys.exit(sona.bench.learn.run(seeds=seeds, output=output, model=model))


@bench.command()
@_OUTPUT
def update(output: Path | None) -> None:
    """How long an instant update takes, states in hand to table handed over."""
    import sona.bench.update

    sys.exit(sona.bench.update.run(output=output))


@bench.command()
@_OUTPUT
def latency(output: Path | None) -> None:
    """How soon a correction is served, and what learning costs everybody else."""
    import sona.bench.latency
    from sona.cli.shared import failures_told

    with failures_told():
        sys.exit(sona.bench.latency.run(output=output))


@bench.command()
@click.option("--only", type=click.Choice(["steps", "prefix", "fairness"]), default=None)
@_OUTPUT
def engine(only: str | None, output: Path | None) -> None:
    """What many users cost each other: LoRAs, forms, cached prefixes, fair shares."""
    import sona.bench.engine

    sys.exit(sona.bench.engine.run(only=only or "", output=output))
