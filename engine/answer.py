"""The growing answer of a generating sequence: stops, forced tokens, visible text, news."""

import time
from typing import TYPE_CHECKING

import numpy as np

from engine.api import Final, FinishReason, Timing, Token, TokenLogprob, Update
from engine.sequence import Sequence
from engine.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from engine.step import Sampled


class Answer:
    """Owner of one answer's text. Lives on the engine thread."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, *, max_len: int) -> None:
        sampling = sequence.job.sampling
        self._sequence = sequence
        self._stream = TextStream(tokenizer, sampling.stop)
        self._stop_ids = sequence.stop_ids
        self._max_tokens = min(sampling.max_tokens, max_len - sequence.num_prompt)
        self._news: list[Token] = []
        self._text = ""
        self._stop_match: int | None = None

    def accept(self, sampled: "Sampled", row: int) -> FinishReason | None:
        """Take row `row` of a step's result. Returns the reason when the answer ends here."""
        sequence, job = self._sequence, self._sequence.job
        if not sequence.num_generated:
            sequence.first_token_s = time.monotonic()
        if job.capture:
            sequence.captured.append((sampled.captured, row))
        token = _sampled_token(sampled, row, job.sampling.logprobs)
        if sequence.matcher is not None:
            sequence.matcher.accept(token.token_id)  # also an end: the form may not allow one
        reason = self._take(token)
        return self._follow() if reason is None and sequence.matcher is not None else reason

    def _follow(self) -> FinishReason | None:
        """Keep to the form of the answer: take the tokens about which it leaves no choice."""
        sequence = self._sequence
        matcher = sequence.matcher
        assert matcher is not None
        if sequence.job.sampling.logprobs is None:  # else each is drawn, to know how likely it was
            for token_id in matcher.forced():
                reason = self._take(Token(token_id, None, ()))
                if reason is not None:
                    return reason
                matcher.accept(token_id)
        sampling = sequence.job.sampling
        has_end = not sampling.ignore_eos and sequence.num_generated >= sampling.min_tokens
        return FinishReason.STOP if matcher.is_complete and not has_end else None

    def _take(self, token: Token) -> FinishReason | None:
        sequence = self._sequence
        sequence.tokens.append(token.token_id)
        self._news.append(token)
        if token.token_id in self._stop_ids:
            self._stop_match = token.token_id
            return FinishReason.STOP
        is_long = sequence.num_generated >= sequence.job.sampling.min_tokens
        self._text += self._stream.push(token.token_id, may_stop=is_long)
        if self._stream.stop_match is not None:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.num_generated >= self._max_tokens else None

    def news(self) -> Update | None:
        """What is new since the last call; None when nothing is."""
        if not self._news:
            return None
        update = Update(tuple(self._news), self._text, None, self._sequence.index)
        self._news, self._text = [], ""
        return update

    def finish(self, reason: FinishReason) -> Update:
        """The last update, with everything the caller needs to account and to learn."""
        sequence = self._sequence
        self._text += self._stream.flush()
        final = Final(
            finish_reason=reason,
            stop_match=self._stream.stop_match or self._stop_match,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached,
            num_completion_tokens=sequence.num_generated,
            token_ids=tuple(sequence.tokens[sequence.num_prompt :]),
            text=self._stream.text,
            head=sequence.head,
            prompt_vector=_vector(sequence),
            prompt_tokens=tuple(sequence.read),
            capture=sequence.stacked_capture(),
            timing=_timing(sequence),
        )
        update = Update(tuple(self._news), self._text, final, sequence.index)
        self._news, self._text = [], ""
        return update


def stop_ids(sequence: Sequence, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end the answer of this sequence."""
    sampling = sequence.job.sampling
    eos_ids = frozenset() if sampling.ignore_eos else tokenizer.eos_ids
    return frozenset(sampling.stop_token_ids) | eos_ids


def token_of(
    token_id: int, logprob: float, best_ids: np.ndarray, best_logprobs: np.ndarray, num_best: int
) -> Token:
    """A token with its log-probability and the `num_best` likeliest."""
    pairs = zip(best_ids[:num_best], best_logprobs[:num_best], strict=True)
    return Token(token_id, logprob, tuple(TokenLogprob(int(i), float(p)) for i, p in pairs))


def _sampled_token(sampled: "Sampled", row: int, num_logprobs: int | None) -> Token:
    token_id = int(sampled.token[row])
    if num_logprobs is None:
        return Token(token_id, None, ())
    best = (np.asarray(sampled.best_ids[row]), np.asarray(sampled.best_logprobs[row]))
    return token_of(token_id, float(sampled.logprob[row]), *best, num_logprobs)


def _vector(sequence: Sequence) -> np.ndarray:
    if sequence.prompt_vector is not None:
        return sequence.prompt_vector
    return np.zeros(0, np.float32)  # ended before its prompt was computed


def _timing(sequence: Sequence) -> Timing:
    now = time.monotonic()
    admitted = sequence.admitted_s or now
    first = sequence.first_token_s or now
    return Timing(
        queue_s=admitted - sequence.created_s, prefill_s=first - admitted, decode_s=now - first
    )
