"""`sona generate`: ask a running server."""

from typing import TYPE_CHECKING, Any

import click

from sona.cli.shared import client_options, show_json

if TYPE_CHECKING:
    from sona.client import Client
    from sona.v1.inference_pb2 import GenerateResponse


@click.command()
@click.argument("prompt")
@click.option("--system", help="A system message.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0))
@click.option("--top-p", type=float)
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--max-tokens", type=click.IntRange(min=0))
@click.option("--stop", multiple=True, help="A text that ends the answer; may be given again.")
@click.option("--logprobs", type=click.IntRange(min=0), help="Likeliest tokens to report.")
@click.option("--adapter", default="", help='A name, name@version, or "none".')
@click.option("--request-id", default="", help="Chosen by you; needed for nothing but retries.")
@click.option("--no-learn", is_flag=True, help="Keep nothing of this request.")
@click.option("--stream/--no-stream", default=True, help="Print the text as it comes.")
@client_options
def generate(
    client: "Client", as_json: bool, prompt: str, system: str | None, raw: bool,
    adapter: str, request_id: str, no_learn: bool, stream: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Answer PROMPT, a user's message. Then tell the request_id to give feedback on."""
    if raw and system is not None:
        raise click.UsageError("--raw has no place for --system")
    options = {name: value for name, value in sampling.items() if value not in (None, ())}
    options |= {"adapter": adapter, "request_id": request_id}
    if no_learn:
        options["learn"] = False
    if not prompt:
        raise click.UsageError("the prompt is empty; give some text")
    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    asked = prompt if raw else turns
    if not stream or as_json:
        response = client.generate(asked, **options)
        if as_json:
            show_json(response)
            return
        click.echo(response.choices[0].text)
        _show_trailer(response, kept=not no_learn)
        return
    for event in client.stream(asked, **options):
        if event.HasField("delta"):
            click.echo(event.delta.text, nl=False)
        elif event.HasField("final"):
            click.echo()
            _show_trailer(event.final, kept=not no_learn)


def _show_trailer(response: "GenerateResponse", *, kept: bool) -> None:
    shaped = ", ".join(f"{one.name}@{one.version}" for one in response.adapter_versions)
    click.echo(f"  answered by: {shaped or 'the base model'}", err=True)
    if kept:
        click.echo(f"  request_id: {response.request_id}", err=True)
