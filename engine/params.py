"""How logits become a token: everything a job may ask of sampling, checked in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_BIASES = 300  # entries of logit_bias
MAX_STOP_IDS = 64
MAX_EOS_IDS = 16  # of a model
MAX_GRAMMAR_BYTES = 65_536  # of a constraint
_MAX_TOP_K = 2**31 - 1
_MAX_PENALTY = 2.0
_MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of one job.

    A step applies them in this order: form of the answer, logit_bias and min_tokens, penalties,
    temperature, top_k, top_p, min_p, draw. Log-probabilities are taken before all of them.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # least probability, as a share of the likeliest token's
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen in prompt or answer
    presence_penalty: float = 0.0  # subtracted once from tokens the answer has
    frequency_penalty: float = 0.0  # subtracted for every time the answer has them
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])  # by token id
    seed: int | None = None  # None draws one per job; choice i of several draws with seed + i
    n: int = 1  # answers
    min_tokens: int = 0  # before an end-of-sequence or stop token may come
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n best, n <= 20
    prompt_logprobs: int | None = None  # the same for the prompt's tokens but the first

    def fault(self) -> tuple[str, object, str] | None:
        """The first setting that no draw could follow: its name, its value, what is allowed."""
        for name, is_allowed, allowed in (*self._ranges(), *self._lists()):
            if not is_allowed:
                return name, getattr(self, name), allowed
        return None

    def _ranges(self) -> tuple[tuple[str, bool, str], ...]:
        top = f"0 to {MAX_LOGPROBS}"
        return (
            ("temperature", 0 <= self.temperature <= 100, "a number from 0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1 (all)"),
            ("top_k", 0 <= self.top_k <= _MAX_TOP_K, f"0 (all) to {_MAX_TOP_K}"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 (all) to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100; 1: none"),
            ("presence_penalty", abs(self.presence_penalty) <= _MAX_PENALTY, "-2 to 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _MAX_PENALTY, "-2 to 2"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens"),
            ("n", self.n >= 1, "1 or more"),
            ("seed", 0 <= (self.seed or 0) <= MAX_SEED, f"0 to {MAX_SEED}"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, top),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, top),
        )

    def _lists(self) -> tuple[tuple[str, bool, str], ...]:
        biases = self.logit_bias.values()
        is_bias = all(-_MAX_BIAS <= bias <= _MAX_BIAS for bias in biases)  # NaN is not
        has_room = len(self.logit_bias) <= MAX_BIASES
        return (
            ("logit_bias", is_bias and has_room, f"up to {MAX_BIASES} numbers from -100 to 100"),
            ("stop", all(self.stop), "texts of one character or more"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MAX_STOP_IDS,
                f"at most {MAX_STOP_IDS} token ids",
            ),
        )

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A form the answer must have. It is compiled when the job arrives."""

    kind: Literal["json_schema", "regex", "grammar", "choice"]
    text: str  # the schema, expression or Lark grammar; of a choice: a JSON list of texts
