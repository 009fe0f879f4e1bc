"""What 256 prompts of our own look like to a base model: centre, covariance, guard states.

Computed once per base model through the engine itself, then read from the data directory, where
the file is named by the model's hash.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from adapters.errors import AdapterError
from adapters.gate import GenericStats
from engine.api import Capture, Generator, Job
from engine.text import Tokenizer

Progress = Callable[[str, int, int], None]
_BATCH = 8  # prompts under way at once


def generic_prompts() -> list[str]:
    """The prompts, one a line."""
    text = resources.files("sona").joinpath("models/generic_prompts.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line.strip()]


async def load_or_embed(
    generator: Generator, tokenizer: Tokenizer, cache: Path, base_hash: str, progress: Progress
) -> GenericStats:
    """The statistics for this base model, from the cache or from the model."""
    prompts = generic_prompts()
    name = hashlib.sha256("\n".join([base_hash, *prompts]).encode()).hexdigest()[:24]
    path = cache / f"generic-{name}.safetensors"
    try:
        return GenericStats.from_arrays(load_file(path))
    except (OSError, SafetensorError, AdapterError):
        pass  # absent or damaged: it can always be made again
    stats = await _embed(generator, tokenizer, prompts, progress)
    await asyncio.to_thread(_save, path, stats)
    return stats


async def _embed(
    generator: Generator, tokenizer: Tokenizer, prompts: list[str], progress: Progress
) -> GenericStats:
    vectors, captures = [], []
    for start in range(0, len(prompts), _BATCH):
        progress("generic prompts", start, len(prompts))
        part = [_ids(tokenizer, text) for text in prompts[start : start + _BATCH]]
        seen = await asyncio.gather(
            *(_states(generator, f"generic/{start + i}", ids) for i, ids in enumerate(part))
        )
        vectors += [vector for vector, _ in seen]
        captures += [capture for _, capture in seen]
    progress("generic prompts", len(prompts), len(prompts))
    hidden = np.concatenate([capture.hidden for capture in captures]).astype(np.float32)
    last = [
        np.stack([getattr(capture, field)[-1] for capture in captures])
        for field in ("hidden", "top_ids", "top_logprobs", "rest_logprob")
    ]
    return GenericStats.build(np.stack(vectors), hidden, Capture(*last))


async def _states(
    generator: Generator, request_id: str, ids: tuple[int, ...]
) -> tuple[np.ndarray, Capture]:
    """The prompt's mean hidden state, and the states at its own positions but the last."""
    embedded = await generator.embed(Job(request_id=f"{request_id}/vector", prompt_ids=ids))
    begun = Job(request_id=f"{request_id}/states", prompt_ids=ids[:1])
    scored = await generator.capture(begun, ids[1:])
    return embedded.vector, scored.capture


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """As a user would send it: a chat message where the model has a template."""
    if tokenizer.has_chat_template:
        return tuple(tokenizer.chat_ids([{"role": "user", "content": text}]))
    return tuple(tokenizer.encode(text))


def _save(path: Path, stats: GenericStats) -> None:
    """Write aside, then rename: a reader sees the whole file or none."""
    arrays = {name: np.ascontiguousarray(a) for name, a in stats.to_arrays().items()}
    aside = path.with_suffix(f".{os.getpid()}")
    save_file(arrays, aside)
    aside.replace(path)
