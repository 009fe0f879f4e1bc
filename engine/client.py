"""The engine's asyncio face: jobs in, updates out, on one event loop."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

from engine import sampling
from engine.api import (
    CaptureResult,
    EmbedResult,
    EngineStats,
    Job,
    ScoreResult,
    Update,
)
from engine.config import EnginePlan
from engine.constraints import Grammars
from engine.errors import DuplicateJob, EngineError, EngineStopped, InvalidJob, ShapeError
from engine.loop import EngineLoop
from engine.model import LoadedModel
from engine.runner import Progress, Runner
from engine.sequence import Kind, Sequence
from engine.slots.lora import check_fits as check_lora
from engine.text import Tokenizer
from engine.worker import News, Result

# Updates joined into one for a slow reader: a message stays far below gRPC's 4 MiB.
MAX_JOINED = 256


class EngineClient:
    """Implements `engine.api.Generator`. Create it where its event loop runs.

    The per-job queues are unbounded in type but not in size: an answer has at most max_tokens
    updates, and the engine refuses jobs beyond its waiting limits. Teacher-forced passes come from
    the learner alone, which bounds them; they take no user's place.
    """

    def __init__(
        self, model: LoadedModel, tokenizer: Tokenizer, plan: EnginePlan, runner: Runner
    ) -> None:
        self.plan, self._vocab_size = plan, model.config.vocab_size
        self._streams: dict[Sequence, asyncio.Queue[Result]] = {}
        self._groups: dict[Sequence, tuple[Sequence, ...]] = {}  # all answers, by the first one
        self._by_id: dict[str, Sequence] = {}  # users' jobs under way
        self._grammars = Grammars(tokenizer, vocab_size=self._vocab_size, max_len=plan.max_len)
        self._compiler = ThreadPoolExecutor(1, "forms")  # a flood of forms leaves a core to serve
        self._lora_sizes = runner.loras.sizes
        self._aio = asyncio.get_running_loop()
        self.ended = asyncio.Event()  # the engine serves nothing any more
        self._loop = EngineLoop(runner, tokenizer, plan, self._deliver)
        self._loop.start()

    async def generate(self, job: Job) -> AsyncGenerator[Update, None]:
        """Run a job: the news of all its answers. Close the generator to cancel it.

        Raises InvalidJob, DuplicateJob, QueueFull, DeadlinePassed, EngineStopped.
        """
        self._check_job(job)
        if job.sampling.seed is None:
            job = replace(job, sampling=replace(job.sampling, seed=secrets.randbits(31)))
        leader = await self._answers(job)
        num_left = leader.num_answers
        stream = self._submit(leader)
        try:
            while num_left:
                for update in await _next(stream):
                    num_left -= update.final is not None
                    yield update
        finally:
            self._forget(leader, ended=not num_left)

    async def embed(self, job: Job) -> EmbedResult:
        """The prompt's vector. Raises as `generate`."""
        self._check_job(job)
        result = await self._single(Kind.EMBED, job, ())
        assert isinstance(result, EmbedResult)
        return result

    async def score(self, job: Job, continuation_ids: tuple[int, ...]) -> ScoreResult:
        """Log-probabilities of a continuation. Raises as `generate`."""
        self._check_job(job)
        self._check_continuation(job, continuation_ids)
        result = await self._single(Kind.SCORE, job, continuation_ids)
        assert isinstance(result, ScoreResult)
        return result

    async def capture(self, job: Job, continuation_ids: tuple[int, ...]) -> CaptureResult:
        """Teacher-force the continuation, below every user's token. Raises as `generate`."""
        if job.lora is not None:
            raise InvalidJob("a teacher-forced pass is of the base model; leave the LoRA out")
        self._check_job(job)
        self._check_continuation(job, continuation_ids)
        result = await self._single(Kind.CAPTURE, job, continuation_ids)
        assert isinstance(result, CaptureResult)
        return result

    def abort(self, request_id: str) -> bool:
        """End a job as CANCELLED. False when there is none."""
        leader = self._by_id.get(request_id)
        if leader is None:
            return False
        for sequence in self._groups[leader]:
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
        self._compiler.shutdown(wait=False, cancel_futures=True)

    async def _answers(self, job: Job) -> Sequence:
        """The first answer's sequence, with the others as its siblings."""
        matcher = None
        if job.constraint is not None:
            matcher = await self._aio.run_in_executor(
                self._compiler, self._grammars.compile, job.constraint
            )
        group = [
            Sequence(
                kind=Kind.GENERATE,
                job=job,
                tokens=list(job.prompt_ids),
                num_prompt=len(job.prompt_ids),
                index=index,
                replays_by_decode=self.plan.is_deterministic,
                matcher=None if matcher is None else matcher.copy(),
            )
            for index in range(job.sampling.n)
        ]
        group[0].siblings = tuple(group[1:])
        return group[0]

    async def _single(self, kind: Kind, job: Job, more: tuple[int, ...]) -> Result:
        sequence = Sequence(
            kind=kind,
            job=job,
            tokens=[*job.prompt_ids, *more],
            num_prompt=len(job.prompt_ids),
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

    def _submit(self, leader: Sequence) -> asyncio.Queue[Result]:
        if leader.kind is not Kind.CAPTURE:
            if leader.request_id in self._by_id:
                raise DuplicateJob(
                    f"request_id {leader.request_id} is already running; choose another"
                )
            self._by_id[leader.request_id] = leader
        stream: asyncio.Queue[Result] = asyncio.Queue()
        self._groups[leader] = (leader, *leader.siblings)
        for sequence in self._groups[leader]:
            self._streams[sequence] = stream
        self._loop.submit(leader)
        if self._loop.is_stopped:  # asked last: a job handed over before the end is answered
            self._forget(leader, ended=True)
            raise EngineStopped("the engine has stopped; restart the server")
        return stream

    def _forget(self, leader: Sequence, *, ended: bool) -> None:
        """The caller has gone; the id may be used again at once."""
        for sequence in self._groups.pop(leader):
            self._streams.pop(sequence, None)
            if not ended:
                self._loop.cancel(sequence)
        if leader.kind is not Kind.CAPTURE:
            self._by_id.pop(leader.request_id, None)

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

    def _check_job(self, job: Job) -> None:
        sampling.check(job.sampling)
        if not job.prompt_ids:
            raise InvalidJob("the prompt is empty; send at least one token")
        if len(job.prompt_ids) >= self.plan.max_len:
            raise InvalidJob(
                f"the prompt has {len(job.prompt_ids)} tokens; the context holds "
                f"{self.plan.max_len}, one of them for the answer. Shorten the prompt"
            )
        if job.sampling.n > self.plan.max_num_seqs:
            raise InvalidJob(
                f"n is {job.sampling.n}; this server has {self.plan.max_num_seqs} answers under "
                "way at most: ask for fewer, or raise engine.max_num_seqs"
            )
        self._check_vocabulary(job.prompt_ids)
        self._check_vocabulary((*job.sampling.logit_bias, *job.sampling.stop_token_ids))
        if job.lora is not None:
            try:
                check_lora(job.lora.table, self._lora_sizes, self.plan)
            except ShapeError as error:
                raise InvalidJob(str(error)) from error

    def _check_continuation(self, job: Job, continuation_ids: tuple[int, ...]) -> None:
        if not continuation_ids:
            raise InvalidJob("the continuation is empty; there is nothing to score")
        num_tokens = len(job.prompt_ids) + len(continuation_ids)
        if num_tokens > self.plan.max_len:
            raise InvalidJob(
                f"prompt and continuation have {num_tokens} tokens; the context holds "
                f"{self.plan.max_len}"
            )
        self._check_vocabulary(continuation_ids)

    def _check_vocabulary(self, ids: tuple[int, ...]) -> None:
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= self._vocab_size:
            raise InvalidJob(
                f"token id {low if low < 0 else high} is outside the vocabulary "
                f"[0, {self._vocab_size})"
            )


async def _next(stream: asyncio.Queue[Result]) -> list[Update]:
    """What has happened, one update for each answer that has any. Raises what ended the job.

    Updates that wait are joined, so that a slow caller catches up.
    """
    results = [await stream.get()]
    while len(results) < MAX_JOINED and not stream.empty():
        results.append(stream.get_nowait())
    waiting: dict[int, list[Update]] = {}
    for result in results:
        if isinstance(result, EngineError):
            if not waiting:
                raise result
            stream.put_nowait(result)  # the end of the job: what came before is read first
            break
        assert isinstance(result, Update), "only updates are sent to a job that generates"
        waiting.setdefault(result.index, []).append(result)
    return [_joined(updates) for updates in waiting.values()]


def _joined(updates: list[Update]) -> Update:
    if len(updates) == 1:
        return updates[0]
    tokens = chain.from_iterable(update.tokens for update in updates)
    text = "".join(update.text for update in updates)
    return Update(tuple(tokens), text, updates[-1].final, updates[-1].index)


def build_runner(model: LoadedModel, plan: EnginePlan, progress: Progress) -> Runner:
    """Allocate the device state and compile every shape. Blocking; call it before serving."""
    runner = Runner(model, plan)
    runner.warm_up(progress)
    return runner
