"""Forms that an answer must have: which tokens may come next, and which must.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance). Its objects never
raise for a bad grammar or a token that does not fit; they turn into errors, which are asked for.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError, EngineError, InvalidJob
from engine.params import MAX_GRAMMAR_BYTES, Constraint
from engine.text import Tokenizer

if TYPE_CHECKING:
    import llguidance

# What a user's grammar may cost: rows and items of the parser, states of the lexer, fuel of one
# mask and of compiling. Ordinary schemas use a hundredth.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
}


class Matcher:
    """How far one answer has come in its form. Lives on the engine thread once it is made."""

    def __init__(self, inner: "llguidance.LLMatcher") -> None:
        self._inner = inner

    def copy(self) -> "Matcher":
        """Another answer of the same form, from the same point on."""
        return Matcher(self._inner.deep_copy())

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token. Raises EngineError when it may not."""
        if not self._inner.consume_token(token_id):
            raise EngineError(f"the form of the answer failed: {self._inner.get_error()}")

    def forced(self) -> list[int]:
        """Tokens that must come next, where the form leaves no choice."""
        return self._inner.compute_ff_tokens()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may come."""
        return self._inner.is_stopped()

    def fill(self, words: np.ndarray) -> None:
        """Set the bit of every token that may come next in [W] int32; clear the others.

        A form that has failed allows something; `accept` then says what is wrong.
        """
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


class Grammars:
    """Compiles forms for one tokenizer. Nothing changes after construction; any thread."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:  # an optional dependency where there is no package index
            self._lib = None
            return
        self._lib = llguidance
        if not tokenizer.eos_ids:
            raise ConfigError("the tokenizer has no end-of-sequence token; set eos_token")
        self._tokens = llguidance.LLTokenizer(
            tokenizer.raw.to_str(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_ids)
        )
        self._limits = llguidance.LLParserLimits(**_LIMITS)

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of an answer; takes about a millisecond.

        Raises InvalidJob when the form is broken, empty, or needs more than a server can give.
        """
        if self._lib is None:
            raise InvalidJob("a form of the answer needs llguidance, which is not installed")
        if not constraint.text or len(constraint.text.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidJob(
                f"the {constraint.kind} has {len(constraint.text.encode())} bytes; "
                f"use 1 to {MAX_GRAMMAR_BYTES}"
            )
        try:
            grammar = self._grammar(constraint)
        except (ValueError, RecursionError) as error:
            raise InvalidJob(f"the {constraint.kind} cannot be read: {error}") from error
        matcher = self._lib.LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InvalidJob(f"the {constraint.kind} cannot be used: {matcher.get_error()}")
        return Matcher(matcher)

    def _grammar(self, constraint: Constraint) -> str:
        assert self._lib is not None
        make = self._lib.LLMatcher
        match constraint.kind:
            case "json_schema":
                json.loads(constraint.text)  # its own message is the clearer one
                # Blanks wherever JSON allows them would let a weak model pad for ever.
                return make.grammar_from_json_schema(
                    constraint.text, overrides={"whitespace_flexible": False}
                )
            case "regex":
                return make.grammar_from_regex(constraint.text)
            case "grammar":
                return make.grammar_from_lark(constraint.text)
            case "choice":
                texts = json.loads(constraint.text)
                return make.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
