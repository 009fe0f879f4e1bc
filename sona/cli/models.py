"""`sona models`: the shipped model's trainer."""

from pathlib import Path

import click


@click.group()
def models() -> None:
    """The shipped model."""


@models.command("train-nano")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--minutes", type=float, default=45.0, show_default=True, help="Of training.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the state in DIRECTORY.")
def train_nano(directory: Path, minutes: float, seed: int, resume: bool) -> None:
    """Train sona-nano from nothing into DIRECTORY, in Hugging Face layout."""
    from sona.models.nano.train import TrainPlan
    from sona.models.nano.train import train_nano as train

    plan = TrainPlan(minutes=minutes, seed=seed)
    figures = train(directory, plan=plan, resume=resume, say=click.echo)
    for family, accuracy in figures.items():
        click.echo(f"{family}: {accuracy:.3f}")
