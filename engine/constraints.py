"""Forms that an answer must have: which tokens may come next, and which must.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance). Its objects never
raise for a bad grammar or a token that does not fit; they turn into errors, which are asked for.
"""

import json
import math
import re
import threading
from collections import OrderedDict
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError, FormFailed, InvalidJob
from engine.params import MAX_GRAMMAR_BYTES, Constraint
from engine.text import Tokenizer

if TYPE_CHECKING:
    import llguidance

# What a user's grammar may cost: rows and items of the parser, states of the lexer, fuel of one
# mask and of compiling. Ordinary schemas use a hundredth; the worst we found take 60 ms at first,
# beside the engine, and 30 ms for one token.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
}


# Divisors make an automaton of as many states as their least common multiple, compiled whole.
_MOST_STATES, _MOST_DIGITS = 10_000, 20
_DIVISOR = re.compile(r"""multipleOf["'\s]*:\s*([^,}\s]{1,40})""")
_NUM_KEPT = 64  # compiled forms
_MAX_REASON_LEN = 200  # characters of what the library says


class Matcher:
    """How far one answer has come in its form. Lives on the engine thread once it is made."""

    def __init__(self, inner: "llguidance.LLMatcher") -> None:
        self._inner = inner

    def copy(self) -> "Matcher":
        """Another answer of the same form, from the same point on."""
        return Matcher(self._inner.deep_copy())

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token, or ends with it.

        Raises FormFailed when it may not, or when the form needs more than a server can give.
        """
        if not self._inner.consume_token(token_id):
            raise FormFailed(
                f"the form of the answer cannot be followed any further ({self._reason()}); use a "
                "simpler one"
            )

    def forced(self) -> list[int]:
        """Tokens that must come next, where the form leaves no choice."""
        return self._inner.compute_ff_tokens()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may come."""
        return self._inner.is_stopped()

    def probe(self, num_words: int, *, max_forced: int) -> str | None:
        """Take the first steps, here and now. Returns what is wrong with the form, if anything.

        Most forms that cost too much, and all that no text fits, show it before the first token.
        """
        words = np.zeros(num_words, np.int32)
        self.fill(words)
        forced = [] if self._inner.is_error() else self.forced()
        if len(forced) > max_forced:
            return f"it forces {len(forced)} tokens at once; a context holds {max_forced}"
        if forced and self._inner.consume_tokens(forced):
            self.fill(words)
        if not self._inner.is_error():
            return None
        if self._inner.get_error().startswith("NoExtension"):
            return "no text fits it"
        return self._reason()

    def _reason(self) -> str:
        """The library's first line; what follows repeats the grammar."""
        return self._inner.get_error().partition("\n")[0][:_MAX_REASON_LEN]

    def fill(self, words: np.ndarray) -> None:
        """Set the bit of every token that may come next in [W] int32; clear the others.

        A form that has failed allows something; `accept` then says what is wrong.
        """
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


class Grammars:
    """Compiles forms for one tokenizer, and keeps the latest. For any thread."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, max_len: int) -> None:
        self._num_words, self._max_len = -(-vocab_size // 32), max_len
        self._kept: OrderedDict[Constraint, Matcher] = OrderedDict()
        self._lock = threading.Lock()
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
        """A matcher at the start of an answer; takes about a millisecond, a known form less.

        Raises InvalidJob when the form is broken, no text fits it, or it needs more than a server
        can give.
        """
        with self._lock:
            known = self._kept.get(constraint)
            if known is not None:
                self._kept.move_to_end(constraint)
                return known.copy()
        matcher = self._compiled(constraint)
        with self._lock:
            self._kept[constraint] = matcher
            if len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return matcher.copy()

    def _compiled(self, constraint: Constraint) -> Matcher:
        if self._lib is None:
            raise InvalidJob("a form of the answer needs llguidance, which is not installed")
        if not constraint.text or len(constraint.text.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidJob(
                f"the {constraint.kind} has {len(constraint.text.encode())} bytes; "
                f"use 1 to {MAX_GRAMMAR_BYTES}"
            )
        _check_divisors(constraint)
        try:
            grammar = self._grammar(constraint)
        except (ValueError, RecursionError) as error:
            raise InvalidJob(f"the {constraint.kind} cannot be read: {error}") from error
        inner = self._lib.LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if inner.is_error():
            raise InvalidJob(f"the {constraint.kind} cannot be used: {inner.get_error()}")
        matcher = Matcher(inner)
        fault = matcher.copy().probe(self._num_words, max_forced=self._max_len)
        if fault is not None:
            raise InvalidJob(f"the {constraint.kind} cannot be used: {fault}")
        return matcher

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
                if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
                    raise ValueError("a list of texts is needed, none of them empty")
                texts = dict.fromkeys(texts)
                return make.grammar_from_regex("|".join(map(re.escape, texts)))


def _check_divisors(constraint: Constraint) -> None:
    """Bound the one keyword whose cost the library does not; a grammar may hold schemas, too."""
    given = _DIVISOR.findall(constraint.text)
    try:
        divisors = [
            Fraction(text) for text in given if abs(Decimal(text).adjusted()) < _MOST_DIGITS
        ]
    except (InvalidOperation, ValueError):
        return  # no numbers: the library says so
    smallest = math.lcm(*(divisor.denominator for divisor in divisors))
    multiple = math.lcm(*(int(divisor * smallest) for divisor in divisors))
    if multiple > _MOST_STATES or len(divisors) < len(given):
        raise InvalidJob(
            f"the {constraint.kind} has multipleOf {', '.join(given[:3])}; their least common "
            f"multiple, without the decimal point, may be {_MOST_STATES} at most"
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
