"""States for `sona bench update`: the shipped model's own, and synthetic ones of another size."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from adapters.base_rows import HeadRows
from adapters.batch import Batch
from adapters.metric import KeyMetric
from engine.api import NUM_CAPTURED_LOGITS, Capture, Job
from engine.client import EngineClient
from engine.config import EngineConfig
from sona.bench.tasks import F1_NAMES, Convention, Item
from sona.feedback import corrected_ids
from sona.generic import load_or_embed
from sona.loops.lessons import as_batch, captured_lesson
from sona.model import Warm, warm_up

EDITS = 32  # of a full pattern
PATTERNS = 32  # so that there are 1,024 updates
_POSITIONS = 4  # of one synthetic update: an edit and three constraints
_FAMILIES = ("F1", "F2", "F3", "F4")


@dataclass(frozen=True, slots=True)
class NanoStates:
    """Corrections of the shipped model's own answers."""

    metric: KeyMetric
    head_rows: HeadRows
    patterns: Sequence[Sequence[Batch]]


def nano_states() -> NanoStates:
    """Conventions of four families, EDITS corrections each, as the service would learn them."""
    warm = warm_up("", "", EngineConfig(), learns=True, progress=lambda *_: None)
    return asyncio.run(_nano_states(warm))


async def _nano_states(warm: Warm) -> NanoStates:
    engine = EngineClient(warm.model, warm.tokenizer, warm.plan, warm.runner)
    try:
        with tempfile.TemporaryDirectory() as cache:
            generic = await load_or_embed(
                engine, warm.tokenizer, Path(cache), warm.info.base_hash, lambda *_: None
            )
        patterns = [await _lessons(warm, engine, number) for number in range(PATTERNS)]
    finally:
        engine.close()
    return NanoStates(generic.metric, warm.head_rows, patterns)


async def _lessons(warm: Warm, engine: EngineClient, number: int) -> list[Batch]:
    family, seed = _FAMILIES[number % len(_FAMILIES)], number // len(_FAMILIES)
    name = F1_NAMES[seed % len(F1_NAMES)] if family == "F1" else ""
    convention = Convention(family, name, seed)
    items = convention.teach_items(np.random.default_rng([seed, 1]), EDITS)
    return [
        await _lesson(warm, engine, f"{number}/{index}", item, convention.apply(item) or "")
        for index, item in enumerate(items)
    ]


async def _lesson(warm: Warm, engine: EngineClient, name: str, item: Item, target: str) -> Batch:
    """The positions that the right answer's states give to a correction of it."""
    tokenizer = warm.tokenizer
    prompt = tuple(tokenizer.chat_ids([dict(message) for message in item.messages]))
    answer = (*tokenizer.encode_continuation(item.answer), min(tokenizer.eos_ids))
    scored = await engine.capture(Job(request_id=name, prompt_ids=prompt), answer)
    positions = captured_lesson(answer, corrected_ids(tokenizer, target, answer), scored.capture)
    assert positions is not None, f"{target!r} differs from {item.answer!r} nowhere"
    return as_batch(name, positions)


class SyntheticStates:
    """Hidden states with a mean, a falling spectrum and the direction of their own argmax."""

    def __init__(self, dim: int, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._dim, self._vocab_size = dim, vocab_size
        self._head = self._rng.standard_normal((vocab_size, dim), np.float32) * dim**-0.5
        self._spectrum = (1.0 / np.arange(1, dim + 1)).astype(np.float32) ** 0.5
        self._mean = self._rng.standard_normal(dim).astype(np.float32)
        self.metric = KeyMetric.fit(self._states(2_000))

    def head_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the head."""
        return self._head[ids]

    def pattern(self, number: int) -> list[Batch]:
        """EDITS updates: an edit each, and three constraints, tokens the base gets right."""
        capture = self._capture(self._states(EDITS * _POSITIONS))
        return [self._batch(number, edit, capture) for edit in range(EDITS)]

    def _batch(self, number: int, edit: int, capture: Capture) -> Batch:
        rows = slice(edit * _POSITIONS, (edit + 1) * _POSITIONS)
        own = Capture(
            capture.hidden[rows], capture.top_ids[rows],
            capture.top_logprobs[rows], capture.rest_logprob[rows],
        )  # fmt: skip
        targets = own.top_ids[:, 0].copy()
        targets[0] = own.top_ids[0, 1 + (number + edit) % 8]
        is_edit = np.arange(_POSITIONS) == 0
        name = f"{number}-{edit}"
        return Batch(feedback_id=name, capture=own, targets=targets, is_edit=is_edit)

    def _states(self, count: int) -> np.ndarray:
        noise = self._rng.standard_normal((count, self._dim)).astype(np.float32)
        own = self._head[self._rng.integers(0, self._vocab_size, count)] * self._dim**0.5
        states = self._mean + noise * self._spectrum + own
        return states / np.sqrt((states**2).mean(axis=1, keepdims=True))

    def _capture(self, states: np.ndarray) -> Capture:
        rounded = states.astype(jnp.bfloat16)
        logits = 2.0 * states @ self._head.T  # sharp enough to have an answer
        total = np.logaddexp.reduce(logits, axis=1, keepdims=True)
        order = np.argpartition(-logits, NUM_CAPTURED_LOGITS, axis=1)[:, :NUM_CAPTURED_LOGITS]
        values = np.take_along_axis(logits, order, axis=1)
        by_value = np.argsort(-values, axis=1)
        top = np.take_along_axis(values, by_value, axis=1) - total
        ids = np.take_along_axis(order, by_value, axis=1).astype(np.int32)
        rest = np.log(np.maximum(1.0 - np.exp(top).sum(axis=1), 1e-9))
        return Capture(rounded, ids, top.astype(np.float32), rest.astype(np.float32))
