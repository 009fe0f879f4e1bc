"""`sona adapters`: what was learned, and undoing it."""

from typing import TYPE_CHECKING, Any

import click

from sona.cli.shared import client_options, parse_scope, show_json

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from sona.client import Client
    from sona.v1.learning_pb2 import Adapter

_SCOPE = click.option(
    "--scope", type=click.Choice(["principal", "tenant"]), callback=parse_scope,
    help="Which one of that name; default: your own if it exists, else your tenant's.",
)  # fmt: skip
_OWNER = click.option("--owner", default="", help="Another principal's; needs an operator's key.")


@click.group()
def adapters() -> None:
    """What was learned, version by version."""


@adapters.command("list")
@client_options
def list_adapters(client: "Client", as_json: bool) -> None:
    """Every adapter you may see."""
    found = client.adapters()
    for adapter in found:
        show_json(adapter) if as_json else click.echo(_line(adapter))
    if not found and not as_json:
        click.echo("nothing has been learned for you yet")


@adapters.command()
@click.argument("name")
@click.argument("path")
@click.option("--any-base", is_flag=True, help="Although it names another base model.")
@client_options
def load(client: "Client", as_json: bool, name: str, path: str, any_base: bool) -> None:
    """Serve the LoRA in PATH, a directory on the server that peft wrote, as NAME."""
    loaded = client.load_adapter(name, path, any_base=any_base)
    if as_json:
        show_json(loaded)
        return
    click.echo(f"{_line(loaded)}\n  sona generate --adapter {name} 'a prompt'")


@adapters.command()
@click.argument("name")
@client_options
def unload(client: "Client", as_json: bool, name: str) -> None:
    """Forget the LoRA NAME. Requests under way keep it."""
    client.unload_adapter(name)
    if not as_json:
        click.echo(f"{name} is unloaded")


@adapters.command()
@click.argument("name")
@_SCOPE
@_OWNER
@client_options
def show(client: "Client", as_json: bool, **which: Any) -> None:
    """One adapter with its versions, newest first."""
    found = client.adapter(**which)
    if as_json:
        show_json(found)
        return
    from sona.v1.learning_pb2 import RevisionKind

    click.echo(_line(found.adapter))
    for one in found.revisions:
        kind = RevisionKind.Name(one.kind).removeprefix("REVISION_KIND_").lower()
        what = f"restores {one.restores}" if one.HasField("restores") else kind
        gone = "" if one.available else "  (compacted)"
        click.echo(
            f"  {one.version:>4}  {_time(one.create_time)}  {what}, "
            f"{len(one.feedback_ids)} feedback in force{gone}  {one.reason}".rstrip()
        )


@adapters.command()
@click.argument("name")
@click.option("--to-version", type=click.IntRange(min=0), help="0: before anything was learned.")
@click.option("--reason", default="", help="Kept with the new version.")
@_SCOPE
@_OWNER
@client_options
def rollback(client: "Client", as_json: bool, **call: Any) -> None:
    """Return to an earlier version; without --to-version take back the last feedback."""
    done = client.rollback(**call)
    if as_json:
        show_json(done)
        return
    click.echo(_line(done.adapter))
    for feedback_id in done.rolled_back_feedback_ids:
        click.echo(f"  no longer in force: {feedback_id}")


def _line(adapter: "Adapter") -> str:
    from sona.v1.common_pb2 import SCOPE_TENANT
    from sona.v1.learning_pb2 import ADAPTER_KIND_LORA

    if adapter.kind == ADAPTER_KIND_LORA:
        what = f"LoRA of rank {adapter.rank}, {adapter.size_bytes} bytes"
        return f"{adapter.name}@{adapter.version}  tenant  {what}, {_time(adapter.update_time)}"
    whose = "tenant" if adapter.scope == SCOPE_TENANT else adapter.owner
    return (
        f"{adapter.name}@{adapter.version}  {whose}  {adapter.num_edits} edits, "
        f"{adapter.num_constraints} constraints, {adapter.size_bytes} bytes, "
        f"{_time(adapter.update_time)}"
    )


def _time(stamp: "Timestamp") -> str:
    return stamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC")
