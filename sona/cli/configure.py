"""`sona config`: what is set, where it comes from, whether it is right."""

import json
from typing import TYPE_CHECKING

import click

from sona.cli.shared import failures_told

if TYPE_CHECKING:
    from sona.config import Loaded

_SOURCE = click.option(
    "--config", "source", envvar="SONA_CONFIG", help="A TOML file, or the name of a preset."
)


@click.group()
def config() -> None:
    """Settings: files, environment, defaults."""


@config.command()
@_SOURCE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(source: str | None, as_json: bool) -> None:
    """Every setting with its value and where it comes from."""
    from sona import settings

    loaded = _load(source)
    rows = {
        path: {"value": _shown(value), "origin": loaded.origins.get(path, "default")}
        for path, value in settings.values(loaded.config)
    }
    if as_json:
        click.echo(json.dumps(rows))
        return
    for path, row in rows.items():
        click.echo(f"{path} = {json.dumps(row['value'])}  # {row['origin']}")


@config.command()
@_SOURCE
def check(source: str | None) -> None:
    """Exit status 1 and the reason when something is wrong."""
    _load(source)
    click.echo("the configuration is right")


def _load(source: str | None) -> "Loaded":
    from sona import config

    with failures_told():
        return config.load(source)


def _shown(value: object) -> object:
    if isinstance(value, tuple):  # keys: who, never the hash
        return [f"{key.tenant}/{key.principal} ({key.role})" for key in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)
