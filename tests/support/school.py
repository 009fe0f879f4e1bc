"""A learner over a made-up model: real journal, store, gates and solver; states from a table."""

import asyncio
import contextlib
import itertools
from dataclasses import replace
from typing import Any, cast

import numpy as np
from support import journals
from support.captures import capture_of, rows_of

from adapters.gate import GenericStats
from adapters.store import AdapterStore, Version
from adapters.table import TableLimits
from engine.api import CaptureResult
from sona.events import EventBus
from sona.journal import Choice, Correction, Journal, PositionKind, Positions, Verdict
from sona.loops.instant import InstantLoop
from sona.loops.patterns import Patterns
from sona.loops.teacher import Teacher
from sona.metrics import Metrics
from sona.ports import EventKind
from sona.routing import Routing

DIM, VOCAB = 16, 200
BASE = "base-1"
SETTLED = frozenset(
    {EventKind.FEEDBACK_LEARNED, EventKind.FEEDBACK_REJECTED, EventKind.LEARNING_FAILED}
)


class Engine:
    """Answers `score` with the made-up model's states, when it is let."""

    def __init__(self, head):
        self.head = head
        self.gate = asyncio.Event()
        self.gate.set()
        self.constant = False  # every pass meets the same states
        self.twins = False  # the first two states of a pass are one and the same
        self.failures = []  # raised first, one per pass
        self.num_running = self.most_running = self.num_passes = 0

    async def capture(self, job, continuation_ids):
        self.num_running += 1
        self.num_passes += 1
        self.most_running = max(self.most_running, self.num_running)
        await self.gate.wait()
        self.num_running -= 1
        if self.failures:
            raise self.failures.pop()
        seed = 0 if self.constant else [*job.prompt_ids, *continuation_ids]
        states = np.random.default_rng(seed).standard_normal((len(continuation_ids), DIM))
        if self.twins and len(states) > 1:
            states[1] = states[0]
        return CaptureResult(capture_of(states, self.head), prompt_vector())


def prompt_vector():
    """Every prompt is in the same gate."""
    return np.full(DIM, 3.0, np.float32)


class School:
    """One server's learner over a directory. Open another over the same one after a crash."""

    def __init__(self, directory, *, base_hash=BASE, limits=None):
        rng = np.random.default_rng(0)
        head = rng.standard_normal((VOCAB, DIM))
        hidden = rng.standard_normal((400, DIM))
        guard = capture_of(hidden[:4], head)
        self.directory, self.base_hash = directory, base_hash
        self.engine = Engine(head)
        self.events = EventBus()
        self.metrics = Metrics(version="1", model="m", dtype="float32", base_hash=base_hash)
        self.journal = Journal(directory / "journal.db", clock=journals.Clock())
        self.store = AdapterStore(directory / "adapters.db")
        self.routing = Routing(GenericStats.build(hidden[:256], hidden, guard))
        for version in self.store.all_live(base_hash):
            if isinstance(version, Version):  # else a LoadFailure
                self.routing.publish(version)
        self.patterns = Patterns(
            self.store,
            self.journal,
            self.routing,
            rows_of(head),
            limits or TableLimits(),
            base_hash,
            targets,
        )
        teacher = Teacher(self.journal, self.patterns, self.events, self.metrics)
        self.loop = InstantLoop(self.journal, teacher, cast(Any, self.engine), self.metrics)
        num_before = sum(self.journal.counts().num_feedback.values())
        self._names = (f"f{i}" for i in itertools.count(num_before + 1))

    def correct(self, *tokens, base_hash=BASE, signal=None):
        """Commit a correction of a fresh answer to these tokens; its id."""
        name = next(self._names)
        answer = (Choice(text="wrong", token_ids=(1,) * len(tokens)),)
        request = replace(
            journals.request(f"r-{name}"), base_hash=base_hash, prompt_vector=prompt_vector(),
            choices=answer, prompt_ids=(len(name), int(name[1:])),
        )  # fmt: skip
        self.journal.record_request(request).result()
        signal = signal or Correction(" ".join(map(str, tokens)))
        draft = journals.draft(name, f"r-{name}", signal=signal)
        return self.journal.add_feedback(draft, None).result().record

    def begin(self, record, token):
        """Give a correction its first position, as an answer with kept states has it."""
        states = np.random.default_rng([record.seq, token]).standard_normal((1, DIM))
        first = Positions(
            indices=(0,),
            target_ids=(token,),
            kinds=(PositionKind.EDIT,),
            capture=capture_of(states, self.engine.head),
        )
        vector = prompt_vector()
        stored = self.journal.add_positions(
            record.seq, first, base_hash=record.base_hash, prompt_vector=vector
        )
        stored.result()

    async def teach(self, *tokens, **kwargs):
        """`correct`, learned."""
        record = self.correct(*tokens, **kwargs)
        async with self.settled() as events:
            self.loop.notify(record)
            while (await anext(events)).feedback_id != record.feedback_id:
                pass  # of another feedback, whose standing this one changed
        return record.feedback_id

    @contextlib.asynccontextmanager
    async def settled(self):
        """Events that end a lesson, watched from now on."""
        async with contextlib.aclosing(self.events.watch("acme", SETTLED)) as events:
            first = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)  # lets the watcher subscribe

            async def all_of_them():
                yield await first
                async for event in events:
                    yield event

            async with contextlib.aclosing(all_of_them()) as everything:
                yield everything
            first.cancel()

    def state_of(self, feedback_id):
        return self.journal.feedback("acme", feedback_id).state.value

    def slot(self):
        (slot,) = self.store.slots()
        return slot

    async def on_learner(self, function):
        return await asyncio.wait_for(asyncio.wrap_future(self.loop.run(function)), 30)

    async def close(self):
        await asyncio.to_thread(self.loop.stop)
        self.store.close()
        self.journal.close()


def targets(record):
    """The ids that a correction's text spells."""
    if isinstance(record.signal, Verdict):
        return record.answer.token_ids
    return tuple(int(token) for token in record.signal.text.split())


@contextlib.asynccontextmanager
async def school(directory, *, learns=True, starts=True, **kwargs):
    """A running learner, stopped at the end. Without `starts` the test calls `loop.start`."""
    made = School(directory, **kwargs)
    if starts:
        made.loop.start(learns=learns)
    try:
        yield made
    finally:
        await made.close()
