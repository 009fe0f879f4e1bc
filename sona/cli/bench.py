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
@click.option("--quick", is_flag=True, help="The instant loop: at most 30 minutes.")
@click.option("--arms", default="", help="Ways to keep a stream of conventions below the head.")
@click.option("--tasks", type=click.IntRange(1, 12), default=12, help="Of the stream of --arms.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@_OUTPUT
@click.option("--model", default="", help="A checkpoint's directory; default: the shipped model.")
def learn(quick: bool, arms: str, tasks: int, seeds: int, output: Path | None, model: str) -> None:
    """What corrections gain on held-out items, and what else they move.

    --quick asks the instant loop over the wire. --arms trains below the head in this process, on
    a stream of twelve conventions: sequential, fresh, fresh+ewc, fresh+replay,
    fresh+ewc+replay+prior, routed, merged, joint. Interrupted, it goes on from its --output.
    """
    if quick == bool(arms):
        raise click.UsageError("choose --quick, or --arms with names; the rest is not built yet")
    from sona.cli.shared import failures_told

    with failures_told():
        if quick:
            import sona.bench.learn

            sys.exit(sona.bench.learn.run(seeds=seeds, output=output, model=model))
        from sona.bench import consolidated

        try:
            status = consolidated.run(
                arms=arms.split(","), seeds=seeds, num_tasks=tasks, output=output, model=model
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    sys.exit(status)


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
