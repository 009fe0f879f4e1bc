"""What the instant loop is compared with: controls that must not gain, and simpler learners."""

import re

import numpy as np
from numpy.random import Generator

from engine.api import HeadTable
from sona.bench.classroom import Classroom, Marks, Reply
from sona.bench.tasks import Convention, Item
from sona.bench.tasks.world import LABELS, PEOPLE, SIGNS, TAUGHT_WORDS
from sona.client import AsyncClient

_WORD = re.compile(r"[A-Za-z]+|\d+|\W")
_CLASSES = (LABELS, PEOPLE, TAUGHT_WORDS, SIGNS)


def shuffled_target(item: Item, target: str, rng: Generator) -> str:
    """The correction with every edited word drawn from its class, the right one left out."""
    words = []
    for old, new in zip(_WORD.findall(item.answer), _WORD.findall(target), strict=True):
        if old != new:
            members = next(each for each in _CLASSES if new in each)
            free = [word for word in members if word not in (old, new)]
            new = free[int(rng.integers(len(free)))]
        words.append(new)
    return "".join(words)


class NearestMemory:
    """kNN memory: the stored correction of the nearest corrected prompt, else the base's answer.

    Nearness is the cosine of the prompts' mean hidden states about their own mean; a prompt counts
    as known from 0.97 up, the value at which near-duplicates of a prompt are found.
    """

    def __init__(self, client: AsyncClient, room: Classroom) -> None:
        self._client, self._room = client, room
        self._vectors: list[np.ndarray] = []
        self._answers: list[str] = []

    async def learn(self, item: Item, target: str) -> None:
        """Store a corrected prompt."""
        self._vectors.append(await self._vector(item))
        self._answers.append(target)

    async def exam(self, items: list[Item], convention: Convention) -> float:
        """Held-out accuracy against the convention."""
        known = np.stack(self._vectors)
        centre = known.mean(axis=0)
        known = _unit(known - centre)
        right = 0
        for item in items:
            similarity = known @ _unit(await self._vector(item) - centre)
            best = int(similarity.argmax())
            if similarity[best] >= 0.97:
                answer = self._answers[best]
            else:
                answer = (await self._room.ask(item, adapter="none")).text
            right += answer.strip() == convention.apply(item)
        return right / len(items)

    async def _vector(self, item: Item) -> np.ndarray:
        return np.asarray(await self._client.embed(item.messages), np.float32)


def prior_rule_table(
    prompts: np.ndarray, responses: np.ndarray, head: np.ndarray, rate: float, rank: int
) -> HeadTable:
    """The update rule of published "self-optimising" adapters, as a head table.

    A correction adds rate * outer(response embedding, prompt embedding) to a hidden-to-hidden
    matrix; embeddings are unit mean hidden states [n, D]. No loss, no probability, no sign. Its
    effect on the logits is head [V, D] times that matrix times the hidden state.
    """
    matrix = rate * responses.T @ prompts  # [D, D], at most n ranks
    left, scale, right = np.linalg.svd(matrix)
    kept = min(rank, len(prompts))
    values = (head @ (left[:, :kept] * scale[:kept])).T
    return HeadTable(
        keys=np.ascontiguousarray(right[:kept], np.float32),
        token_ids=np.zeros(0, np.int32),
        token_keys=np.zeros((kept, 0), np.float32),
        const_keys=np.zeros(kept, np.float32),
        row_ids=np.arange(len(head), dtype=np.int32),
        values=np.ascontiguousarray(values, np.float32),
    )


def marks_of(texts: list[str], items: list[Item], convention: Convention) -> Marks:
    """Marks of answers that did not come over the wire."""
    replies = tuple(Reply(text, "", frozenset(), False) for text in texts)
    right = tuple(
        text.strip() == convention.apply(item) for text, item in zip(texts, items, strict=True)
    )
    return Marks(replies, right)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
