"""An engine whose answers can be worked out by hand.

Token i of an answer is (sum of the prompt's ids + i) modulo `vocab_size`; its text is the letter
of that number, a for 0. A prompt vector is [number of tokens, sum of ids]. Nothing is random.
"""

import asyncio
from collections.abc import AsyncGenerator

import ml_dtypes
import numpy as np

from engine.api import (
    NUM_CAPTURED_LOGITS,
    Capture,
    CaptureResult,
    EmbedResult,
    EngineStats,
    Final,
    FinishReason,
    Job,
    ScoreResult,
    Timing,
    Token,
    TokenLogprob,
    Update,
)

VOCAB_SIZE = 26


def answer_ids(prompt_ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """The toy's whole behaviour."""
    return tuple((sum(prompt_ids) + index) % VOCAB_SIZE for index in range(num_tokens))


def text_of(token_ids: tuple[int, ...]) -> str:
    """One letter per token."""
    return "".join(chr(ord("a") + each) for each in token_ids)


class ToyEngine:
    """Implements `engine.api.Generator`. `live` counts jobs that hold resources."""

    def __init__(self, *, fails_with: Exception | None = None) -> None:
        self.live = 0
        self.jobs: list[Job] = []  # every job that was started
        self.aborted: list[str] = []
        self.busy = asyncio.Event()  # set: a job holds resources
        self.idle = asyncio.Event()  # set: none does
        self.idle.set()
        self.may_go = asyncio.Event()  # cleared: jobs stop before their next token
        self.may_go.set()
        self._fails_with = fails_with
        self._num_tokens = 0

    async def generate(self, job: Job) -> AsyncGenerator[Update, None]:
        """One update per token, the last with the Final."""
        self.jobs.append(job)
        self.live += 1
        self.idle.clear()
        self.busy.set()
        try:
            if self._fails_with is not None:
                raise self._fails_with
            ids = answer_ids(job.prompt_ids, job.sampling.max_tokens)
            for index, each in enumerate(ids):
                await self.may_go.wait()
                for choice in range(job.sampling.n):
                    self._num_tokens += 1
                    final = _final(job, ids) if index + 1 == len(ids) else None
                    yield Update((_token(job, each),), text_of((each,)), final, choice)
        finally:
            self.live -= 1
            if not self.live:
                self.idle.set()
                self.busy.clear()

    async def embed(self, job: Job) -> EmbedResult:
        return EmbedResult(_vector(job.prompt_ids), 0)

    async def score(self, job: Job, continuation_ids: tuple[int, ...]) -> ScoreResult:
        tokens = tuple(Token(each, -1.0, ()) for each in continuation_ids)
        return ScoreResult(tokens, None, 0)

    async def capture(self, job: Job, continuation_ids: tuple[int, ...]) -> CaptureResult:
        return CaptureResult(_capture(len(continuation_ids)), _vector(job.prompt_ids))

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self.live > 0

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.live,
            num_waiting_tokens=0,
            num_session_pages=0,
            num_waiting=0,
            num_pages=10,
            num_free_pages=10 - self.live,
            num_idle_pages=0,
            num_preemptions=0,
            num_recompiles=0,
            num_prompt_tokens=sum(len(job.prompt_ids) for job in self.jobs),
            num_cached_tokens=0,
            num_generated_tokens=self._num_tokens,
            num_steps=self._num_tokens,
            num_resident_heads=0,
            num_resident_loras=0,
            busy_s=0.5,
            learning_s=0.25,
        )


def _token(job: Job, token_id: int) -> Token:
    if job.sampling.logprobs is None:
        return Token(token_id, None, ())
    return Token(token_id, 0.0, (TokenLogprob(token_id, 0.0),)[: job.sampling.logprobs])


def _final(job: Job, ids: tuple[int, ...]) -> Final:
    return Final(
        finish_reason=FinishReason.LENGTH,
        stop_match=None,
        num_prompt_tokens=len(job.prompt_ids),
        num_cached_tokens=0,
        prompt_tokens=(),
        num_completion_tokens=len(ids),
        token_ids=ids,
        text=text_of(ids),
        head=None,
        prompt_vector=_vector(job.prompt_ids),
        capture=_capture(len(ids)) if job.capture else None,
        timing=Timing(queue_s=0.25, prefill_s=0.5, decode_s=1.0),
    )


def _vector(prompt_ids: tuple[int, ...]) -> np.ndarray:
    return np.array([len(prompt_ids), sum(prompt_ids)], np.float32)


def _capture(num_rows: int) -> Capture:
    """States that say nothing."""
    return Capture(
        hidden=np.zeros((num_rows, 2), ml_dtypes.bfloat16),
        top_ids=np.tile(np.arange(NUM_CAPTURED_LOGITS, dtype=np.int32), (num_rows, 1)),
        top_logprobs=np.zeros((num_rows, NUM_CAPTURED_LOGITS), np.float32),
        rest_logprob=np.zeros(num_rows, np.float32),
    )
