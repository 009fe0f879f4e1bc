"""kill -9 of the whole server while it learns: what was acknowledged is there, once, and serves.

KILLS_OF_SERVER sets the number of kills; the default keeps the test short.
"""

import asyncio
import contextlib
import os
import random

import grpc.aio
import pytest
from support.server import until_learned

from sona.bench.child import child_server
from sona.v1 import feedback_pb2

KILLS = int(os.environ.get("KILLS_OF_SERVER", "2"))
GREEDY = {"temperature": 0.0, "max_tokens": 16}
CUES = ("invoice", "router", "salary", "hotel", "badge", "printer", "patent", "backup")
USERS = ("ann", "bob", "cyd", "dan")
NAMES = ("Ana", "Ivo", "Mira", "Otto", "Lena", "Karl", "Nora", "Emil", "Vera", "Hugo")


def ask(number):
    cue, name = CUES[number % len(CUES)], NAMES[number // len(CUES) % len(NAMES)]
    return [{"role": "user", "content": f"Ticket {number} from {name}: the {cue} again."}]


class Clerk:
    """Sends corrections and remembers what was acknowledged and what was answered."""

    def __init__(self):
        self.acknowledged = {}  # feedback_id to its request's number
        self.learned = set()
        self.sent = 0

    async def work(self, clients):
        """Correct for ever; ends when the server dies under it."""
        while True:
            number, self.sent = self.sent, self.sent + 1
            client = clients[number % len(clients)]
            reply = await client.generate(ask(number), **GREEDY, adapter="none")
            word = ("ledger", "vault", "atlas")[number % len(CUES) % 3]  # one for each cue
            sent = await client.feedback(
                reply.request_id, correction=f"Send to {word}.", feedback_id=f"f{number}"
            )
            assert sent.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
            self.acknowledged[sent.feedback_id] = number

    async def check(self, clients):
        """Everything acknowledged is there, and in the end learned, or says what it gave way to."""
        states = [
            await until_learned(clients[number % len(clients)], feedback_id)
            for feedback_id, number in self.acknowledged.items()
        ]
        learned = [s for s in states if s.state == feedback_pb2.FEEDBACK_STATE_LEARNED]
        assert all("in force in part" in s.reason for s in states if s not in learned), states
        assert all(s.adapter_version.version for s in states), states
        assert len(learned) >= 0.8 * len(states), states
        counts = {c.state: c.count for c in (await clients[0].learning_status()).feedback}
        unacknowledged = sum(counts.values()) - len(self.acknowledged)
        assert 0 <= unacknowledged <= self.sent - len(self.acknowledged)


async def answers(clients, numbers, adapters=None):
    """Texts and the versions that shaped them; with `adapters` exactly by those versions."""
    pinned = adapters or [""] * len(numbers)
    replies = [
        await clients[n % len(clients)].generate(ask(n), **GREEDY, learn=False, adapter=adapter)
        for n, adapter in zip(numbers, pinned, strict=True)
    ]
    texts = [reply.choices[0].text for reply in replies]
    return texts, [f"{v.name}@{v.version}" for r in replies for v in r.adapter_versions]


@pytest.mark.timeout(90 + 60 * KILLS)
async def test_acknowledged_feedback_survives_and_serves(tmp_path):
    rng, clerk, before = random.Random(0), Clerk(), None
    for life in range(KILLS + 1):
        async with server(tmp_path) as (child, clients):
            if before is not None:
                await clerk.check(clients)
                numbers, texts, adapters = before
                assert await answers(clients, numbers, adapters) == (texts, adapters)
            if life == KILLS:
                assert clerk.acknowledged
                return
            work = asyncio.create_task(clerk.work(clients))
            await asyncio.wait([work], timeout=rng.uniform(0.5, 2.5))
            assert not work.done(), work.exception()
            child.process.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await work
        # A life in which nothing is sent: what it answers must not change by being killed.
        async with server(tmp_path) as (child, clients):
            await clerk.check(clients)
            asked = sorted(clerk.acknowledged.values())[-8:]
            before = asked, *(await answers(clients, asked))
            assert len(before[2]) == len(asked)
            child.process.kill()
            await child.process.wait()


@contextlib.asynccontextmanager
async def server(tmp_path):
    """A server over the same data as the one before, and a client for each of its users.

    Several, because one pattern has room for some hundreds of corrections.
    """
    data = tmp_path / "data"
    async with contextlib.AsyncExitStack() as stack:
        child = await stack.enter_async_context(child_server(USERS, data=data))
        yield child, [await stack.enter_async_context(child.client(user)) for user in USERS]
