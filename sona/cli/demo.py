"""`sona demo`: teach a convention to a server of its own, live."""

import sys

import click


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def demo(seed: int) -> None:
    """Start a server, correct it over gRPC, and show what it learned. Exit status 1: it did not."""
    import sona.demo
    from sona.cli.shared import failures_told

    with failures_told():
        sys.exit(sona.demo.run(seed=seed))
