"""Options of a prompt and of how to answer it, by the names they have on the wire."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FORMS = ("json_schema", "regex", "grammar", "choice")
_COUNT = click.IntRange(0, 2**32 - 1)  # what the wire holds

ADAPTER = click.option(
    "--adapter", default="",
    help='What shapes the answer: "style", "pattern-7@3", "style:0.7+legal:0.3+own", or "none". '
    "Without it, what was learned for you.",
)  # fmt: skip


def _bias(
    context: click.Context, option: click.Parameter, given: Sequence[str]
) -> dict[int, float]:
    """Pairs ID=NUMBER as a table."""
    table = {}
    for pair in given:
        token_id, _, value = pair.partition("=")
        try:
            table[int(token_id)] = float(value)
        except ValueError:
            raise click.BadParameter(f"{pair!r} is not ID=NUMBER, as in 42=-100") from None
    return table


def _text_or_file(context: click.Context, option: click.Parameter, given: str | None) -> str | None:
    """The text itself, or what the file after an @ holds."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{given[1:]!r} cannot be read: {error}") from None


_OPTIONS = (
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-k", type=_COUNT),
    click.option("--top-p", type=float),
    click.option("--min-p", type=float, help="Of the likeliest token's probability."),
    click.option("--repetition-penalty", type=float, help="1 is none."),
    click.option("--presence-penalty", type=float, help="From -2 to 2."),
    click.option("--frequency-penalty", type=float, help="From -2 to 2."),
    click.option(
        "--logit-bias", multiple=True, metavar="ID=NUMBER", callback=_bias,
        help="Added to a token's logit; may be given again.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1)),
    click.option("--n", type=click.IntRange(1, 2**32 - 1), help="Answers to the same prompt."),
    click.option("--min-tokens", type=_COUNT),
    click.option("--max-tokens", type=_COUNT),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on to --max-tokens."),
    click.option("--stop", multiple=True, help="A text that ends the answer; may be given again."),
    click.option("--stop-token-ids", type=_COUNT, multiple=True, metavar="ID"),
    click.option("--logprobs", type=_COUNT, help="Likeliest tokens to report; shown with --json."),
    click.option("--prompt-logprobs", type=_COUNT, help="The same for the prompt's tokens."),
    click.option("--json-schema", callback=_text_or_file, help="Form of the answer, or @FILE."),
    click.option("--regex", help="Form of the answer."),
    click.option("--grammar", callback=_text_or_file, help="Form of the answer, Lark, or @FILE."),
    click.option("--choice", multiple=True, help="An allowed answer; give every one."),
    click.option(
        "--priority", type=click.IntRange(-(2**31), 2**31 - 1),
        help="Lower first, among your tenant's requests.",
    ),
    click.option("--session-id", help="A conversation, whose beginning stays cached."),
    click.option("--cache-salt", help="Share cached prompts with equal salts only."),
)  # fmt: skip


def sampling_options(command: _Command) -> _Command:
    """Adds the options; `said` picks those that were given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not given; the server has the defaults."""
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    forms = [f"--{name.replace('_', '-')}" for name in _FORMS if name in given]
    if len(forms) > 1:
        raise click.UsageError(f"{' and '.join(forms)} are given; an answer has one form")
    return given


def prompt_of(prompt: str, system: str | None, *, raw: bool) -> str | list[dict[str, str]]:
    """The text as it is, or as a user's message after the system's."""
    if raw and system is not None:
        raise click.UsageError("--raw has no place for --system")
    if not prompt:
        raise click.UsageError("the prompt is empty; give some text")
    if raw:
        return prompt
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]
