"""`sona generate`, `sona score`, `sona embed`: ask a running server."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from sona.cli.sampling import ADAPTER, prompt_of, said, sampling_options
from sona.cli.shared import client_options, show_json

if TYPE_CHECKING:
    from sona.client import Client
    from sona.v1.common_pb2 import AdapterVersion
    from sona.v1.inference_pb2 import GenerateResponse

_SYSTEM = click.option("--system", help="A system message.")
_RAW = click.option(
    "--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template."
)


@click.command()
@click.argument("prompt")
@_SYSTEM
@_RAW
@sampling_options
@ADAPTER
@click.option("--request-id", default="", help="Chosen by you; needed for nothing but retries.")
@click.option("--no-learn", is_flag=True, help="Keep nothing of this request.")
@click.option("--stream/--no-stream", default=True, help="Print the text as it comes.")
@client_options
def generate(
    client: "Client", as_json: bool, prompt: str, system: str | None, raw: bool,
    no_learn: bool, stream: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer PROMPT, a user's message. Then tell the request_id to give feedback on."""
    asked, given = prompt_of(prompt, system, raw=raw), said(options)
    if no_learn:
        given["learn"] = False
    if stream and not as_json and given.get("n", 1) == 1:
        for event in client.stream(asked, **given):
            if event.HasField("delta"):
                click.echo(event.delta.text, nl=False)
            elif event.HasField("final"):
                click.echo()
                _show_trailer(event.final, kept=not no_learn)
        return
    response = client.generate(asked, **given)
    if as_json:
        show_json(response)
        return
    for choice in response.choices:
        label = f"[{choice.index}] " if len(response.choices) > 1 else ""
        click.echo(label + choice.text)
    _show_trailer(response, kept=not no_learn)


@click.command()
@click.argument("prompt")
@click.argument("continuation")
@_SYSTEM
@_RAW
@ADAPTER
@client_options
def score(
    client: "Client", as_json: bool, prompt: str, continuation: str, system: str | None,
    raw: bool, adapter: str,
) -> None:  # fmt: skip
    """How likely CONTINUATION is after PROMPT, token by token; nothing is generated."""
    scored = client.score(prompt_of(prompt, system, raw=raw), continuation, adapter=adapter)
    if as_json:
        show_json(scored)
        return
    for one in scored.logprobs:
        click.echo(f"{one.logprob:9.4f}  {client.detokenize([one.token_id])!r}")
    click.echo(f"{sum(one.logprob for one in scored.logprobs):9.4f}  in all")
    click.echo(f"  by: {_names(scored.adapter_versions)}", err=True)


@click.command()
@click.argument("prompt")
@_SYSTEM
@_RAW
@client_options
def embed(client: "Client", as_json: bool, prompt: str, system: str | None, raw: bool) -> None:
    """The vector of PROMPT under the base model, of length 1, as a line of JSON."""
    vector = client.embed(prompt_of(prompt, system, raw=raw))
    click.echo(json.dumps({"embedding": vector} if as_json else vector))


def _show_trailer(response: "GenerateResponse", *, kept: bool) -> None:
    click.echo(f"  answered by: {_names(response.adapter_versions)}", err=True)
    if kept:
        click.echo(f"  request_id: {response.request_id}", err=True)


def _names(versions: "Iterable[AdapterVersion]") -> str:
    return ", ".join(f"{one.name}@{one.version}" for one in versions) or "the base model"
