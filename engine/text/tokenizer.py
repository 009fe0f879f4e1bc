"""A `tokenizer.json` with its chat template, without transformers.

Text of a user never becomes a control token: what looks like one is encoded letter by letter.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before the import reads it
import tokenizers

from engine.errors import InvalidJob, TokenizerError
from engine.params import MAX_EOS_IDS
from engine.text.template import ChatTemplate, Message, load_template, token_text


class Tokenizer:
    """Encodes, decodes and renders chats. Thread-safe: nothing changes after `load`."""

    def __init__(
        self,
        literal: tokenizers.Tokenizer,
        control: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        eos_ids: frozenset[int],
        bos_id: int | None,
    ) -> None:
        self._literal = literal  # reads control-token text as ordinary letters
        self._control = control  # reads it as control tokens
        self._template = template
        self._control_texts = tuple(
            token.content for token in control.get_added_tokens_decoder().values() if token.special
        )
        self._longest = max(map(len, control.get_vocab(with_added_tokens=True)), default=1)
        if literal.normalizer is not None:  # may make one letter of several, in Hangul of three
            self._longest *= 4
        self.eos_ids = eos_ids
        self.bos_id = bos_id

    @classmethod
    def load(cls, directory: Path, *, vocab_size: int, eos_ids: Sequence[int] = ()) -> "Tokenizer":
        """Read `tokenizer.json` and its companions.

        Raises:
          TokenizerError: a file is missing or broken, or an id does not fit `vocab_size` rows.
        """
        literal, control = _read(directory / "tokenizer.json"), _read(directory / "tokenizer.json")
        literal.encode_special_tokens = True
        largest = max(control.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise TokenizerError(
                f"the tokenizer in {directory} uses id {largest}; the model's embedding has "
                f"{vocab_size} rows. Use the tokenizer the weights were trained with"
            )
        config = _read_config(directory)
        stops = set(eos_ids)
        named = control.token_to_id(token_text(config.get("eos_token")))
        if named is not None:
            stops.add(named)
        if len(stops) > MAX_EOS_IDS:
            raise TokenizerError(f"{len(stops)} tokens end an answer; at most {MAX_EOS_IDS} may")
        bos_id = control.token_to_id(token_text(config.get("bos_token")))
        template = load_template(directory, config)
        return cls(literal, control, template, frozenset(stops), bos_id)

    @property
    def raw(self) -> tokenizers.Tokenizer:
        """The library's object, for incremental decoding."""
        return self._control

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_ids` can work."""
        return self._template is not None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, with the tokenizer's own start token where it has one."""
        chosen = self._control if allow_special else self._literal
        return _ids(chosen, text, add_special_tokens=True)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows a prompt: no start token, no control tokens."""
        return _ids(self._literal, text)

    def max_chars(self, num_tokens: int) -> int:
        """Letters that so many tokens hold at most: a longer text has more tokens."""
        return num_tokens * self._longest

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without control tokens."""
        return self._control.decode(list(ids), skip_special_tokens=True)

    def chat_ids(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation rendered by the model's template."""
        if self._template is None:
            raise InvalidJob("this model has no chat template; send text or token ids")
        if not any(self._has_control(message) for message in messages):
            text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
            return _ids(self._control, text)
        return self._chat_ids_piecewise(messages, add_generation_prompt)

    def _has_control(self, message: Message) -> bool:
        return any(control in message["content"] for control in self._control_texts)

    def _chat_ids_piecewise(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[int]:
        """Template and contents encoded apart, so that no content becomes a control token."""
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]  # private-use letters
        contents = [message["content"].replace("\ue000", "") for message in messages]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        assert self._template is not None, "chat_ids has looked"
        rest = self._template.render(marked, add_generation_prompt=add_generation_prompt)
        ids = []
        for mark, content in zip(marks, contents, strict=True):
            head, found, rest = rest.partition(mark)
            if not found:
                raise InvalidJob(
                    "the chat template changes the order of messages that hold "
                    "control-token text; remove that text"
                )
            ids += _ids(self._control, head)
            ids += self.encode_continuation(content)
        return ids + _ids(self._control, rest)


def _ids(
    tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False
) -> list[int]:
    """As `encode`, which keeps every other Python thread waiting; batches do not."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(f"{path} does not exist; a model directory needs tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def _read_config(directory: Path) -> dict[str, object]:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
