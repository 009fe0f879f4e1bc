"""`sona serve`: load, warm up, serve, and say how to talk to it."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sona.flags import FLAGS

if TYPE_CHECKING:
    from sona.app import Addresses
    from sona.config import SonaConfig


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    for flag in reversed(FLAGS):
        kind = click.Path(path_type=Path) if flag.kind is Path else flag.kind
        command = click.option(f"--{flag.name}", type=kind, help=flag.help)(command)
    return command


@click.command()
@click.argument("model", required=False)
@click.option("--model", "model_flag", help="The same as MODEL.")
@click.option("--config", "source", envvar="SONA_CONFIG", help="A TOML file, or a preset's name.")
@_with_flags
@click.option("--deterministic", is_flag=True, help="Outputs equal to the bit, whatever the load.")
@click.option("--no-learn", is_flag=True, help="Freeze what was learned; store feedback on.")
@click.option("--api-key", envvar="SONA_API_KEY", help="A key that clients must send; an admin's.")
def serve(
    model: str | None, model_flag: str | None, source: str | None,
    deterministic: bool, no_learn: bool, api_key: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Serve MODEL, a directory in Hugging Face layout; without it the shipped model."""
    if model and model_flag and model != model_flag:
        raise click.UsageError(f"MODEL is {model} and --model is {model_flag}; give one")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it logs what we tell in our own words
    from sona.auth import hash_key
    from sona.cli.shared import failures_told

    given = {flag.path: settings[flag.name.replace("-", "_")] for flag in FLAGS}
    flags: dict[str, object] = {path: each for path, each in given.items() if each is not None}
    if model or model_flag:
        flags["model"] = model or model_flag
    if deterministic:
        flags["engine.deterministic"] = True
    if no_learn:
        flags["learning.enabled"] = False
    if api_key:
        entry = {"tenant": "default", "principal": "default", "role": "admin"}
        flags["auth.key"] = [{**entry, "sha256": hash_key(api_key)}]
    with failures_told():
        from sona import app, config

        loaded = config.load(source, flags=flags)
        with Progress() as progress:

            def on_ready(addresses: "Addresses") -> None:
                progress.end()
                click.echo("\n".join(ready_lines(addresses, loaded.config)))

            app.run(loaded.config, progress=progress.report, on_ready=on_ready)


class Progress:
    """A bar on a terminal, one line per stage elsewhere; ends when the server is ready."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._stage = ""
        self._is_closed = False

    def __enter__(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(),
            )  # fmt: skip
            self._bar = self._stack.enter_context(Bar(*columns, console=console))
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def report(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` parts of a stage; total 0 where nobody knows."""
        if self._is_closed:
            return
        if self._bar is not None:
            self._bar.update(self._task, description=stage, completed=done, total=total or None)
        elif stage != self._stage:
            click.echo(f"{stage} ...", err=True)
        self._stage = stage

    def end(self) -> None:
        """Take the bar away; later reports are not shown."""
        self._is_closed = True
        self._stack.close()


def ready_lines(addresses: "Addresses", config: "SonaConfig") -> list[str]:
    """What to paste, for the addresses that were bound."""
    grpc, http = _reachable(addresses.grpc), _reachable(addresses.http)
    where = "" if grpc == "127.0.0.1:50051" else f" --address {grpc}"
    arguments = [f'"{grpc}"'] if where else []
    headers, exported = "", []
    if config.auth.key:
        arguments.append('api_key="KEY"')
        headers = '-H "authorization: Bearer $SONA_API_KEY" '
        exported = ["  export SONA_API_KEY=...  # the caller's key"]
    client = f"Client({', '.join(arguments)})"
    learning = "learning is on" if config.learning.enabled else "learning is off"
    return [
        f"{addresses.model} is served; {learning}, data in {config.data.dir}",
        f"  gRPC {grpc}    HTTP {http} (/metrics /health /ready)",
        "",
        *exported,
        f"  sona generate{where} --temperature 0 'your prompt'",
        f"  sona feedback{where} REQUEST_ID --correction 'what it should have said'",
        f"  python -c 'from sona import Client; print({client}.generate(",
        '    [{"role": "user", "content": "your prompt"}], temperature=0))\'',
        f"  buf curl --protocol grpc --http2-prior-knowledge {headers}\\",
        '    -d \'{"messages": {"messages": [{"role": "user", "content": "your prompt"}]}}\' \\',
        f"    http://{grpc}/sona.v1.InferenceService/Generate",
        f"  curl {http}/metrics",
        "",
        "Ctrl-C ends it, after the requests under way.",
    ]


def _reachable(address: str) -> str:
    """A wildcard address is for binding, not for calling."""
    return address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
