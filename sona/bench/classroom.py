"""Teaching and testing a served model over the wire, as a user would: ask, correct, confirm."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sona.bench.tasks import Item
from sona.client import AsyncClient
from sona.v1 import feedback_pb2, inference_pb2

_MAX_TOKENS = 40  # longer than any right answer of the families
_CONCURRENCY = 16
_POLL_S = 0.005
_LEARN_S = 60.0

Right = Callable[[Item], Sequence[str]]
"""The answers that count as right for an item."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the served model."""

    text: str
    request_id: str
    versions: frozenset[tuple[str, int]]  # learned versions that shaped it
    is_gated: bool  # a pattern's gate let the prompt in


@dataclass(frozen=True, slots=True)
class Marks:
    """The outcome of an exam."""

    replies: tuple[Reply, ...]
    is_right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.is_right) / len(self.is_right)

    @property
    def gated_accuracy(self) -> float:
        """Share of right answers among those that a gate let in; NaN when there were none."""
        gated = [ok for ok, r in zip(self.is_right, self.replies, strict=True) if r.is_gated]
        return sum(gated) / len(gated) if gated else math.nan

    @property
    def num_gated(self) -> int:
        """Prompts that a gate let in."""
        return sum(reply.is_gated for reply in self.replies)

    def agreement(self, other: "Marks") -> float:
        """Share of prompts answered with the same text."""
        pairs = zip(self.replies, other.replies, strict=True)
        return sum(a.text == b.text for a, b in pairs) / len(self.replies)


def base_right(item: Item) -> Sequence[str]:
    """What is right without any convention."""
    return item.answers


class Classroom:
    """One student's connection to the server."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._seats = asyncio.Semaphore(_CONCURRENCY)

    async def ask(self, item: Item, *, adapter: str = "", learn: bool = False) -> Reply:
        """One greedy answer. With `learn` the request is kept, so that it can get feedback."""
        async with self._seats:
            reply = await self._client.generate(
                item.messages, temperature=0.0, max_tokens=_MAX_TOKENS, adapter=adapter, learn=learn
            )
        return _reply(reply)

    async def exam(self, items: Iterable[Item], right: Right, *, adapter: str = "") -> Marks:
        """Ask everything, mark everything."""
        asked = list(items)
        replies = await asyncio.gather(*(self.ask(item, adapter=adapter) for item in asked))
        is_right = tuple(
            reply.text.strip() in right(item) for item, reply in zip(asked, replies, strict=True)
        )
        return Marks(tuple(replies), is_right)

    async def correct(self, item: Item, target: str) -> str:
        """Correct the base model's answer to an item; returns once it is learned.

        The answer of the base is what gets corrected, so that n corrections are n corrections
        also when the convention has been understood after two.
        """
        reply = await self.ask(item, adapter="none", learn=True)
        if reply.text == target:
            return ""
        sent = await self._client.feedback(reply.request_id, correction=target)
        await self.learned(sent.feedback_id)
        return sent.feedback_id

    async def confirm(self, item: Item) -> bool:
        """Say PASS to the base model's answer, if it is right; returns once that is dealt with."""
        reply = await self.ask(item, adapter="none", learn=True)
        if reply.text.strip() not in item.answers:
            return False
        sent = await self._client.feedback(reply.request_id, is_pass=True)
        await self.learned(sent.feedback_id)
        return True

    async def learned(self, feedback_id: str) -> feedback_pb2.Feedback:
        """Wait until a feedback is learned or turned down."""
        until = time.monotonic() + _LEARN_S
        while time.monotonic() < until:
            feedback = await self._client.get_feedback(feedback_id)
            is_open = feedback.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
            if not is_open or feedback.reason:
                return feedback
            await asyncio.sleep(_POLL_S)
        raise TimeoutError(f"feedback {feedback_id} was not learned within {_LEARN_S:.0f} s")


def _reply(reply: inference_pb2.GenerateResponse) -> Reply:
    return Reply(
        text=reply.choices[0].text,
        request_id=reply.request_id,
        versions=frozenset((one.name, one.version) for one in reply.adapter_versions),
        is_gated=bool(reply.pattern_ids),
    )
