"""The engine's asyncio face: jobs in, updates out, on one event loop."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace
from itertools import chain

import numpy as np

from engine import sampling
from engine.api import EngineStats, Job, SamplingParams, ScoreResult, Update
from engine.config import EnginePlan
from engine.errors import DuplicateJob, EngineStopped, InvalidJob, QueueFull
from engine.loop import EngineLoop, News, Result
from engine.model import LoadedModel
from engine.runner import Progress, Runner
from engine.scheduler import Scheduler
from engine.sequence import Kind, Sequence
from engine.text import Tokenizer

# Updates joined into one for a slow reader: a message stays far below gRPC's 4 MiB.
MAX_JOINED = 256


class EngineClient:
    """Implements `engine.api.Generator`. Create it where its event loop runs.

    The per-job queues are unbounded in type but not in size: a job has at most max_tokens updates,
    and at most max_num_seqs + max_waiting jobs of users are accepted. Teacher-forced passes come
    from the learner alone, which bounds them; they take no user's place.
    """

    def __init__(
        self, model: LoadedModel, tokenizer: Tokenizer, plan: EnginePlan, runner: Runner
    ) -> None:
        self.plan, self._vocab_size = plan, model.config.vocab_size
        self._streams: dict[Sequence, asyncio.Queue[Result]] = {}
        self._by_id: dict[str, Sequence] = {}  # users' jobs under way
        self._aio = asyncio.get_running_loop()
        self.ended = asyncio.Event()  # the engine serves nothing any more
        scheduler = Scheduler(plan)
        self._loop = EngineLoop(runner, scheduler, tokenizer, plan, self._deliver)
        self._loop.start()

    async def generate(self, job: Job) -> AsyncGenerator[Update, None]:
        """Run a job. Close the generator to cancel it.

        Raises InvalidJob, DuplicateJob, QueueFull, EngineStopped.
        """
        sampling.check(job.sampling)
        self._check_ids(job.prompt_ids)
        if job.sampling.seed is None:
            job = replace(job, sampling=replace(job.sampling, seed=secrets.randbits(31)))
        sequence = Sequence(
            kind=Kind.GENERATE,
            job=job,
            tokens=list(job.prompt_ids),
            num_prompt=len(job.prompt_ids),
            replays_by_decode=self.plan.is_deterministic,
        )
        stream = self._submit(sequence)
        ended = False
        try:
            while not ended:
                update = await _next(stream)
                if isinstance(update, Exception):
                    ended = True
                    raise update
                assert isinstance(update, Update)
                ended = update.final is not None
                yield update
        finally:
            self._forget(sequence, ended=ended)

    async def embed(self, request_id: str, prompt_ids: tuple[int, ...]) -> np.ndarray:
        """Mean final hidden state [D] float32 of the prompt. Raises as `generate`."""
        self._check_ids(prompt_ids)
        result = await self._single(Kind.EMBED, request_id, prompt_ids, ())
        assert isinstance(result, np.ndarray)
        return result

    async def score(
        self, request_id: str, prompt_ids: tuple[int, ...], continuation_ids: tuple[int, ...]
    ) -> ScoreResult:
        """Teacher-force the continuation, below every user's token. Raises as `generate`."""
        self._check_ids(prompt_ids)
        if not continuation_ids:
            raise InvalidJob("the continuation is empty; there is nothing to score")
        if len(prompt_ids) + len(continuation_ids) > self.plan.max_len:
            raise InvalidJob(
                f"prompt and continuation have {len(prompt_ids) + len(continuation_ids)} tokens; "
                f"the context holds {self.plan.max_len}"
            )
        self._check_vocabulary(continuation_ids)
        result = await self._single(Kind.SCORE, request_id, prompt_ids, continuation_ids)
        assert isinstance(result, ScoreResult)
        return result

    def abort(self, request_id: str) -> bool:
        """End a job as CANCELLED. False when there is none."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self._loop.cancel(sequence)
        return True

    def stats(self) -> EngineStats:
        """Counters now."""
        return self._loop.stats()

    @property
    def is_alive(self) -> bool:
        """False once the engine thread has ended."""
        return not self._loop.is_stopped

    def close(self) -> None:
        """Stop the thread; jobs under way end with EngineStopped."""
        self._loop.stop()

    async def _single(
        self, kind: Kind, request_id: str, prompt_ids: tuple[int, ...], more: tuple[int, ...]
    ) -> Result:
        job = Job(request_id=request_id, prompt_ids=prompt_ids, sampling=SamplingParams(seed=0))
        sequence = Sequence(
            kind=kind, job=job, tokens=[*prompt_ids, *more], num_prompt=len(prompt_ids)
        )
        stream = self._submit(sequence)
        ended = False
        try:
            result = await stream.get()
            ended = True
        finally:
            self._forget(sequence, ended=ended)
        if isinstance(result, Exception):
            raise result
        return result

    def _submit(self, sequence: Sequence) -> asyncio.Queue[Result]:
        if sequence.kind is not Kind.SCORE:
            self._admit(sequence)
        stream: asyncio.Queue[Result] = asyncio.Queue()
        self._streams[sequence] = stream
        self._loop.submit(sequence)
        if self._loop.is_stopped:  # asked last: a job handed over before the end is answered
            self._forget(sequence, ended=True)
            raise EngineStopped("the engine has stopped; restart the server")
        return stream

    def _admit(self, sequence: Sequence) -> None:
        if sequence.request_id in self._by_id:
            raise DuplicateJob(
                f"request_id {sequence.request_id} is already running; choose another"
            )
        limit = self.plan.max_num_seqs + self.plan.max_waiting
        if len(self._by_id) >= limit:
            raise QueueFull(f"{limit} requests are running or waiting; retry later")
        self._by_id[sequence.request_id] = sequence

    def _forget(self, sequence: Sequence, *, ended: bool) -> None:
        """The caller has gone; the id may be used again at once."""
        self._streams.pop(sequence, None)
        if sequence.kind is not Kind.SCORE:
            self._by_id.pop(sequence.request_id, None)
        if not ended:
            self._loop.cancel(sequence)

    def _deliver(self, news: News) -> None:
        """Called on the engine thread, once per turn."""
        if not self._aio.is_closed():
            self._aio.call_soon_threadsafe(self._dispatch, news)

    def _dispatch(self, news: News) -> None:
        if self._loop.is_stopped:
            self.ended.set()
        for sequence, result in news:
            stream = self._streams.get(sequence)
            if stream is not None:
                stream.put_nowait(result)

    def _check_ids(self, prompt_ids: tuple[int, ...]) -> None:
        if not prompt_ids:
            raise InvalidJob("the prompt is empty; send at least one token")
        if len(prompt_ids) >= self.plan.max_len:
            raise InvalidJob(
                f"the prompt has {len(prompt_ids)} tokens; the context holds {self.plan.max_len}, "
                "one of them for the answer. Shorten the prompt"
            )
        self._check_vocabulary(prompt_ids)

    def _check_vocabulary(self, ids: tuple[int, ...]) -> None:
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._vocab_size:
            raise InvalidJob(
                f"token id {low if low < 0 else high} is outside the vocabulary "
                f"[0, {self._vocab_size})"
            )


async def _next(stream: asyncio.Queue[Result]) -> Result:
    """The next result; updates that wait behind it join it, so that a slow caller catches up."""
    result = await stream.get()
    if not isinstance(result, Update) or stream.empty():
        return result
    updates = [result]
    while len(updates) < MAX_JOINED and not stream.empty():
        later = stream.get_nowait()
        if not isinstance(later, Update):
            stream.put_nowait(later)  # the end: nothing comes behind it
            break
        updates.append(later)
    tokens = chain.from_iterable(update.tokens for update in updates)
    text = "".join(update.text for update in updates)
    return Update(tuple(tokens), text, updates[-1].final)


def build_runner(model: LoadedModel, plan: EnginePlan, progress: Progress) -> Runner:
    """Allocate the device state and compile every shape. Blocking; call it before serving."""
    runner = Runner(model, plan)
    runner.warm_up(progress)
    return runner
