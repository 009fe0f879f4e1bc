"""`sona feedback`: say what was right or wrong about an answer."""

from typing import TYPE_CHECKING, Any

import click

from sona.cli.shared import client_options, show_json

if TYPE_CHECKING:
    from sona.client import Client
    from sona.v1.feedback_pb2 import PreviewFeedbackResponse


@click.command()
@click.argument("request_id")
@click.option("--correction", help="The answer that should have been given.")
@click.option("--pass", "is_pass", flag_value=True, type=bool, default=None, help="It was right.")
@click.option("--fail", "is_pass", flag_value=False, type=bool, help="It was wrong.")
@click.option("--score", type=float, help="From 0 (bad) to 1 (good).")
@click.option("--choice-index", type=click.IntRange(min=0), default=0, help="Of several answers.")
@click.option("--feedback-id", default="", help="Chosen by you, to repeat the call safely.")
@click.option("--comment", default="", help="For people; never learned from.")
@click.option("--preview", is_flag=True, help="Only show what would change.")
@client_options
def feedback(
    client: "Client", as_json: bool, request_id: str, feedback_id: str, comment: str,
    preview: bool, choice_index: int, **signals: Any,
) -> None:  # fmt: skip
    """Give feedback on the answer to REQUEST_ID: one of --correction, --pass, --fail, --score."""
    given = {name: value for name, value in signals.items() if value is not None}
    if len(given) != 1:
        raise click.UsageError("give exactly one of --correction, --pass, --fail, --score")
    if preview:
        seen = client.preview(request_id, choice_index=choice_index, **given)
        show_json(seen) if as_json else _show_preview(seen)
        return
    given |= {"feedback_id": feedback_id, "comment": comment, "choice_index": choice_index}
    done = client.feedback(request_id, **given)
    if as_json:
        show_json(done)
        return
    from sona.v1.feedback_pb2 import FeedbackState

    state = FeedbackState.Name(done.state).removeprefix("FEEDBACK_STATE_")
    click.echo(f"{state}  feedback_id: {done.feedback_id}" + _in_brackets(done.reason))
    for other in done.conflicts_with:
        click.echo(f"  contradicts {other}")


def _show_preview(seen: "PreviewFeedbackResponse") -> None:
    if not seen.would_learn:
        click.echo("nothing would change" + _in_brackets(seen.reason))
        return
    where = f"pattern-{seen.pattern_id}" if seen.HasField("pattern_id") else "a new pattern"
    click.echo(f"would be learned in {where}" + _in_brackets(seen.reason))
    for edit in seen.edits:
        new = repr(edit.new_text) if edit.HasField("new_token_id") else "the end"
        chance = ""
        if edit.HasField("base_probability"):
            chance = f", now {edit.base_probability:.2g} likely"
        click.echo(f"  token {edit.position}: {edit.old_text!r} -> {new}{chance}")


def _in_brackets(reason: str) -> str:
    return f" ({reason})" if reason else ""
