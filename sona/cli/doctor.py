"""`sona doctor`: what this machine can do, and what stands in the way."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sona.cli.findings import Finding

_SIGNS = {"ok": "ok    ", "note": "note  ", "blocks": "BLOCKS"}


@click.command()
@click.option("--config", "source", envvar="SONA_CONFIG", help="A TOML file, or a preset's name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one finding per line.")
def doctor(source: str | None, as_json: bool) -> None:
    """Check hardware, versions, names, the data directory and ports. Exit status 1: it blocks."""
    is_blocked = False
    for finding in examine(source):
        is_blocked = is_blocked or finding.level == "blocks"
        click.echo(json.dumps(dataclasses.asdict(finding)) if as_json else _line(finding))
    sys.exit(1 if is_blocked else 0)


def examine(source: str | None) -> "Iterator[Finding]":
    """Every finding, as it is made."""
    from sona.cli import findings

    yield from chain(findings.machine(), findings.names(), findings.libraries())
    yield from findings.devices()
    yield from _configured(source)


def _configured(source: str | None) -> "Iterable[Finding]":
    from engine.errors import ConfigError
    from sona import config as configs
    from sona.cli import findings

    try:
        loaded = configs.load(source)
    except ConfigError as error:
        yield findings.Finding(level="blocks", topic="config", text=str(error), advice="see above")
        return
    yield findings.Finding(level="ok", topic="config", text=source or "defaults and environment")
    for check in (findings.model, findings.data_dir, findings.ports):
        yield from check(loaded.config)


def _line(finding: "Finding") -> str:
    advice = f"\n         -> {finding.advice}" if finding.advice else ""
    return f"{_SIGNS[finding.level]} {finding.topic:<8} {finding.text}{advice}"
