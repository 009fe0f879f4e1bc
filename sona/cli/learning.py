"""`sona learning`: whether the server learns, and stopping it."""

from typing import TYPE_CHECKING

import click

from sona.cli.shared import client_options, show_json

if TYPE_CHECKING:
    from sona.client import Client


@click.group()
def learning() -> None:
    """Whether the server learns, and what waits."""


@learning.command()
@client_options
def status(client: "Client", as_json: bool) -> None:
    """The state, and feedback by state."""
    _show_status(client, as_json)


@learning.command()
@click.option("--reason", default="", help="Told to whoever asks for the status.")
@client_options
def pause(client: "Client", as_json: bool, reason: str) -> None:
    """Stop learning on the whole server; feedback is stored on. Needs an operator's key."""
    client.pause_learning(reason)
    _show_status(client, as_json)


@learning.command()
@client_options
def resume(client: "Client", as_json: bool) -> None:
    """Learn what waits, and go on. Needs an operator's key."""
    client.resume_learning()
    _show_status(client, as_json)


def _show_status(client: "Client", as_json: bool) -> None:
    seen = client.learning_status()
    if as_json:
        show_json(seen)
        return
    from sona.v1.feedback_pb2 import FeedbackState
    from sona.v1.learning_pb2 import LearningState

    state = LearningState.Name(seen.state).removeprefix("LEARNING_STATE_").lower()
    click.echo(f"learning: {state}" + (f" ({seen.reason})" if seen.reason else ""))
    click.echo(f"  waiting to be learned: {seen.num_pending}")
    click.echo(f"  adapters: {seen.num_adapters}")
    click.echo(f"  failed steps: {seen.num_failed_steps}")
    for each in seen.feedback:
        name = FeedbackState.Name(each.state).removeprefix("FEEDBACK_STATE_").lower()
        click.echo(f"  feedback {name}: {each.count}")
