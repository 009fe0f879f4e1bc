"""Chat templates: the model's own Jinja, rendered in a sandbox. Never one from a request."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidJob, TokenizerError

_MAX_RENDERED = 4_000_000  # characters; a template that grows past this is a runaway
Message = Mapping[str, str]


class ChatTemplate:
    """Messages to the text the model was trained on."""

    def __init__(self, source: str, *, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(
                f"the model's chat template is not valid Jinja: {error}"
            ) from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The prompt text. Raises InvalidJob when the template refuses the messages."""
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise InvalidJob(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        if len(text) > _MAX_RENDERED:
            raise InvalidJob(f"the chat template produced {len(text)} characters; send less text")
        return text


def load_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """`chat_template.jinja` first, then `tokenizer_config.json`; None when the model has none."""
    path = directory / "chat_template.jinja"
    source = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if not source:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return ChatTemplate(source, variables={name: token_text(config.get(name)) for name in names})


def token_text(entry: object) -> str:
    """A special token's text; the config writes it as a string or as an object."""
    if isinstance(entry, Mapping):
        return str(entry.get("content", ""))
    return entry if isinstance(entry, str) else ""


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
