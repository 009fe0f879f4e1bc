"""A real engine over a small random checkpoint, and short ways to ask it."""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

from engine.api import Job, SamplingParams
from engine.client import EngineClient, build_runner
from engine.config import EngineConfig, plan_engine
from engine.model import load_checkpoint
from engine.text import Tokenizer

SMALL = {"max_num_seqs": 4, "max_learned_slots": 8, "prefill_chunk": 64, "num_pages": 80}


@contextlib.asynccontextmanager
async def running_engine(directory: Path, *, splits_step=False, **settings):
    """An EngineClient on this event loop, closed at the end."""
    model = load_checkpoint(directory)
    plan = plan_engine(EngineConfig(**{**SMALL, **settings}), model.config, platform="cpu")
    plan = replace(plan, splits_step=splits_step)  # as on an accelerator
    tokenizer = Tokenizer.load(
        directory, vocab_size=model.config.vocab_size, eos_ids=model.config.eos_ids
    )
    runner = await asyncio.to_thread(build_runner, model, plan, lambda *_: None)
    client = EngineClient(model, tokenizer, plan, runner)
    try:
        yield client
    finally:
        client.close()


def greedy(request_id: str, prompt, max_tokens: int, **settings) -> Job:
    """A greedy job over token ids that ignores the end token."""
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **settings}
    return Job(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),
        capture=True,
    )


async def final(client: EngineClient, job: Job):
    """Run a job to its end."""
    last = None
    async for update in client.generate(job):
        last = update
    assert last is not None
    assert last.final is not None
    return last.final


async def finals(client: EngineClient, job: Job):
    """Run a job of several answers to its end."""
    last = {}
    async for update in client.generate(job):
        last[update.index] = update.final
    assert all(one is not None for one in last.values())
    return [last[index] for index in sorted(last)]


def is_at_rest(stats) -> bool:
    """Whether no job holds a page."""
    return stats.num_free_pages + stats.num_idle_pages == stats.num_pages
