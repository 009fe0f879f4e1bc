"""What a call may say, checked once at the border. Every refusal names the field on the wire.

What needs the tokenizer or the stored request (`check_prompt_len`, `check_correction`) is called
by the domain as soon as it has them.
"""

import math
import re
from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

from engine.api import Constraint, SamplingParams
from engine.params import MAX_GRAMMAR_BYTES
from sona.errors import InvalidField, ModelNotFound
from sona.journal.records import Correction, Preference, Score, Verdict
from sona.requests import (
    AdapterChoice,
    AdapterMix,
    AdapterPin,
    ChatPrompt,
    FeedbackCall,
    LoraPin,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

MAX_STOPS = 16
_MAX_SHOWN = 80  # characters of a value that is refused
MAX_STOP_LEN = 256  # characters
MAX_DIGITS = 18  # of a number in a name: what a database integer holds
MAX_MERGED = 8  # LoRAs of one request
_TERM = re.compile(
    rf"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(@(?P<version>\d{{1,{MAX_DIGITS}}}))?"
    r"(:(?P<weight>-?\d{1,6}(\.\d{1,9})?))?",
    re.ASCII,
)
_PATTERN = re.compile(r"pattern-\d+", re.ASCII)
MAX_ID_LEN = 128  # characters of a request_id or feedback_id
MAX_REMARK_BYTES = 16_384  # comment and metadata of one feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the running server allows. Made once at start-up."""

    model_names: tuple[str, ...]  # names of the served model; the first is the preferred one
    max_model_len: int  # tokens of prompt plus answer
    vocab_size: int
    max_choices: int = 16  # answers of one request
    max_chars: int = 1 << 22  # of a text; more cannot fit the context, whatever it says
    max_correction_bytes: int = 65_536


def check_id(name: str, value: str) -> None:
    """Refuse an id that is empty, long, or not printable."""
    if not value:
        raise InvalidField(name, f"{name} is empty; send 1 to {MAX_ID_LEN} printable characters")
    if len(value) > MAX_ID_LEN or not value.isprintable():
        raise InvalidField(
            name,
            f"{name} has {len(value)} characters, or ones that cannot be printed; send 1 to "
            f"{MAX_ID_LEN} printable characters",
        )


def check_model(model: str, limits: Limits) -> None:
    """Refuse a model that is not served. Raises ModelNotFound."""
    if model and model not in limits.model_names:
        raise ModelNotFound(
            f"model {model!r} is not served here; this server answers for "
            f"{', '.join(limits.model_names)}, or leave model empty"
        )


def parse_adapter(text: str) -> AdapterChoice:
    """Read what an answer should be shaped by. Raises InvalidField.

    "" is the caller's own, "none" the base model, "pattern-7@3" a learned version, "style" a LoRA,
    "style:0.7+legal@2:0.3+own" LoRAs by weight below the caller's own.
    """
    if not text:
        return "own"
    if text == "none":
        return "none"
    loras, heads = [], []
    for term in text.split("+"):
        pin = _parse_term(term, text)
        (loras if isinstance(pin, LoraPin) else heads).append(pin)
    if len(heads) > 1 or len(loras) > MAX_MERGED:
        raise InvalidField(
            "adapter",
            f"adapter is {text[:80]!r}; use one learned version at most, and {MAX_MERGED} LoRAs",
        )
    head = heads[0] if heads else "none"
    return AdapterMix(tuple(loras), head) if loras else head


def is_pattern_name(name: str) -> bool:
    """Whether a name is that of a learned adapter; every other one is a LoRA's."""
    return _PATTERN.fullmatch(name) is not None


def _parse_term(term: str, text: str) -> AdapterPin | LoraPin | Literal["own"]:
    """One of the names that are joined with +."""
    if term == "own":
        return "own"
    found = _TERM.fullmatch(term)
    weight = float(found["weight"]) if found and found["weight"] else 1.0
    is_pattern = found is not None and is_pattern_name(found["name"])
    if found is None or (is_pattern and found["weight"]) or not math.isfinite(weight):
        raise InvalidField(
            "adapter",
            f"adapter is {text[:80]!r}; use a name, name@version with a whole number, LoRAs with "
            'weights as in "style:0.7+legal:0.3", "none" for the base model, or nothing for what '
            "was learned for you",
        )
    version = int(found["version"]) if found["version"] else None
    if is_pattern:
        return AdapterPin(found["name"], version)
    return LoraPin(found["name"], version, weight)


def check_prompt(prompt: Prompt, limits: Limits) -> None:
    """Refuse a prompt that is empty, too long to look at, or has tokens the model does not know."""
    check_chars(prompt, limits)
    match prompt:
        case TextPrompt(text):
            if not text:
                raise InvalidField("text", "the prompt is empty; send at least one character")
        case ChatPrompt(messages):
            if not messages:
                raise InvalidField("messages", "the prompt has no messages; send at least one")
            for index, message in enumerate(messages):
                if not message.role:
                    name = f"messages.messages[{index}].role"
                    raise InvalidField(name, f"{name} is empty; use system, user or assistant")
            if not any(message.content for message in messages):
                raise InvalidField("messages", "every message is empty; send some content")
        case TokenPrompt(ids):
            if not ids:
                raise InvalidField("token_ids", "the prompt has no tokens; send at least one")
            check_token_ids("token_ids", ids, limits)


def check_chars(prompt: Prompt, limits: Limits) -> None:
    """Refuse a text that no context could hold, before anybody spends time on its tokens."""
    match prompt:
        case TextPrompt(text):
            check_text("text", text, limits)
        case ChatPrompt(messages):
            check_text("messages", "".join(message.content for message in messages), limits)
        case TokenPrompt():
            pass


def check_text(name: str, text: str, limits: Limits) -> None:
    """Refuse one that has more letters than a context's tokens can hold."""
    if len(text) > limits.max_chars:
        raise InvalidField(
            name,
            f"{name} has {len(text)} characters; a context of {limits.max_model_len} tokens holds "
            f"{limits.max_chars} at the very most: send a shorter one, or split it",
        )


def check_token_ids(name: str, ids: tuple[int, ...], limits: Limits) -> None:
    """Refuse ids outside the vocabulary."""
    worst = max(ids, default=0)
    if worst >= limits.vocab_size or min(ids, default=0) < 0:
        raise InvalidField(
            name, f"{name} has {worst}; the vocabulary has the ids 0 to {limits.vocab_size - 1}"
        )


def check_prompt_len(num_tokens: int, limits: Limits) -> None:
    """Refuse a prompt that leaves no room for an answer. Call it with the tokens counted."""
    if num_tokens < 1:
        raise InvalidField("input", "the prompt has no tokens; send at least one character")
    if num_tokens >= limits.max_model_len:
        raise InvalidField(
            "input",
            f"the prompt has {num_tokens} tokens; the context holds {limits.max_model_len} and an "
            f"answer needs at least one, so send at most {limits.max_model_len - 1}",
        )


def check_sampling(sampling: SamplingParams, limits: Limits) -> None:
    """Refuse sampling that no draw could follow."""
    fault = sampling.fault()
    if fault is not None:
        name, value, allowed = fault
        path = f"sampling.{name}"
        raise InvalidField(path, f"{path} is {_short(value)}; use {allowed}")
    if sampling.n > limits.max_choices:
        raise InvalidField(
            "sampling.n",
            f"sampling.n is {sampling.n}; this server has {limits.max_choices} answers under way "
            "at most: ask for fewer, or raise engine.max_num_seqs",
        )
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidField(
            "sampling.stop",
            f"sampling.stop has {len(sampling.stop)} texts; use at most {MAX_STOPS}",
        )
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_LEN:
            raise InvalidField(
                "sampling.stop",
                f"a stop text has {len(stop)} characters; use 1 to {MAX_STOP_LEN}",
            )
    check_token_ids("sampling.stop_token_ids", sampling.stop_token_ids, limits)
    check_token_ids("sampling.logit_bias", tuple(sampling.logit_bias), limits)


def _short(value: object) -> str:
    """A value as it was given, or its beginning and its size."""
    text = str(value)
    if len(text) <= _MAX_SHOWN:
        return text
    size = f", {len(value)} entries" if isinstance(value, Sized) else ""
    return f"{text[:_MAX_SHOWN]}...{size}"


def check_constraint(constraint: Constraint) -> None:
    """Refuse a form that is empty or too long to be compiled while others wait."""
    num_bytes = len(constraint.text.encode())
    if not 0 < num_bytes <= MAX_GRAMMAR_BYTES:
        name = f"constraint.{constraint.kind}"
        raise InvalidField(name, f"{name} has {num_bytes} bytes; use 1 to {MAX_GRAMMAR_BYTES}")


def check_correction(correction: str, answer: str) -> None:
    """Refuse a correction that says what the answer said. Call it with the answer at hand."""
    if correction == answer:
        raise InvalidField(
            "correction",
            "the correction equals the answer; send the text that should have been given, or "
            "verdict PASS to confirm the answer",
        )


def parse_score(value: float) -> Score:
    """A score in [0, 1]; NaN is refused."""
    if not 0.0 <= value <= 1.0:
        raise InvalidField("score", f"score is {value}; use a number from 0 (bad) to 1 (good)")
    return Score(value)


def check_feedback(call: FeedbackCall, limits: Limits) -> None:
    """Refuse a feedback that can be told to be wrong without looking at its request."""
    match call.signal:
        case Correction(text):
            _check_answer_text("correction", text, limits)
        case Preference(chosen, rejected):
            _check_answer_text("preference.chosen", chosen, limits)
            _check_answer_text("preference.rejected", rejected, limits)
            if chosen == rejected:
                raise InvalidField(
                    "preference", "chosen and rejected are the same text; send two answers"
                )
        case Score() | Verdict():
            pass
    num_bytes = len(call.comment.encode()) + sum(
        len(key.encode()) + len(value.encode()) for key, value in call.metadata.items()
    )
    if num_bytes > MAX_REMARK_BYTES:
        raise InvalidField(
            "comment",
            f"comment and metadata hold {num_bytes} bytes; they may hold {MAX_REMARK_BYTES}",
        )


def _check_answer_text(name: str, text: str, limits: Limits) -> None:
    num_bytes = len(text.encode())
    if not text.strip():
        raise InvalidField(name, f"{name} is blank; send the text that should have been given")
    if num_bytes > limits.max_correction_bytes:
        raise InvalidField(
            name,
            f"{name} has {num_bytes} bytes; the server takes {limits.max_correction_bytes} "
            "(learning.max_correction_bytes): send a shorter one, or raise the setting",
        )
