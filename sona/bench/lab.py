"""A model in this process, to train LoRAs on and to examine them: what no wire call can do yet."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from adapters.consolidate import Learned, Retention
from adapters.example import Example, Padded, padded, spoken
from adapters.fisher import Fisher, FisherEstimate
from adapters.tune import TuneConfig, Tuner
from engine.api import Job, LoraRef, LoraTable, SamplingParams
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.slots.lora import module_sizes
from engine.whole import whole_sequences
from sona.bench.tasks import Item
from sona.model import warm_up

_CONCURRENCY = 16
_MAX_TOKENS = 40
_BATCH = 8
_LOOK_EVERY = 10  # steps between two looks at what is retained

Right = Callable[[Item], Sequence[str]]


class Lab:
    """Owner of one warm model and its compiled training. For one event loop."""

    def __init__(self, model: str, config: TuneConfig, *, max_rank: int = 64) -> None:
        settings = EngineConfig(
            max_num_seqs=_CONCURRENCY, max_loras=4, max_lora_rank=max_rank, max_learned_slots=2
        )
        warm = warm_up(model, "", settings, learns=False, progress=lambda *_: None)
        self.tokenizer, self.config, self.max_rank = warm.tokenizer, config, max_rank
        self.modules = dict(module_sizes(warm.model.config, on_head=False))
        self.whole = whole_sequences(warm.model)
        self._tuner = Tuner(self.whole, self.modules, config)
        self._estimate = FisherEstimate(self.whole, self.modules)
        self._engine = EngineClient(warm.model, warm.tokenizer, warm.plan, warm.runner)
        self._eos, self._no_id = min(warm.tokenizer.eos_ids), warm.info.vocab_size
        self._count = 0

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def example(self, item: Item, answer: str) -> Example:
        """An item with what should be said, its end included."""
        ids = (*self.tokenizer.encode_continuation(answer), self._eos)
        return spoken(self.tokenizer.chat_ids(item.messages), ids)

    async def exam(self, items: Iterable[Item], right: Right, table: LoraTable | None) -> float:
        """Share of right answers, greedy, through the served forward pass."""
        ref, asked = self.ref(table), list(items)
        answers = await self.answers(asked, lambda _: ref)
        marks = [text in right(item) for item, text in zip(asked, answers, strict=True)]
        return sum(marks) / len(marks)

    async def answers(
        self, items: Sequence[Item], choose: Callable[[Item], LoraRef | None]
    ) -> list[str]:
        """Greedy answers, each item through the LoRA that is chosen for it."""
        seats = asyncio.Semaphore(_CONCURRENCY)

        async def ask(item: Item) -> str:
            async with seats:
                return await self._ask(item, choose(item))

        return list(await asyncio.gather(*(ask(item) for item in items)))

    def train(
        self,
        pools: Sequence[Sequence[Example]],
        *,
        learned: Learned | None = None,
        retained: Sequence[Example] = (),
        fisher: Fisher | None = None,
        start: LoraTable | None = None,
        seed: int = 0,
        config: TuneConfig | None = None,
    ) -> LoraTable:
        """A LoRA trained on equal shares of every pool that is not empty.

        With `fisher` the EWC penalty holds `retained` to its allowed loss. Another `config` than
        the lab's is compiled anew.
        """
        tuner, config = self._tuner, config or self.config
        if config != self.config:
            tuner = Tuner(self.whole, self.modules, config)
        pools = [pool for pool in pools if pool]
        shape = self._shape([*(each for pool in pools for each in pool), *retained])
        rng, below = np.random.default_rng([seed, 3]), learned.table if learned else None
        state, hold = tuner.start(seed, table=start), Retention()
        guard = self._padded(retained, shape) if retained else None
        before = self._mean(None, guard, below) if guard is not None else 0.0
        for step in range(config.num_steps):
            batch = self._padded(_drawn(pools, rng), shape)
            weight = hold.weight if fisher is not None else 0.0
            state, _ = tuner.slice(state, batch, learned=below, fisher=fisher, weight=weight)
            state = tuner.update(state)
            if guard is not None and fisher is not None and step % _LOOK_EVERY == _LOOK_EVERY - 1:
                hold = hold.after(self._mean(tuner.table(state), guard, below) - before)
        return tuner.table(state)

    def fisher(self, examples: Sequence[Example], learned: LoraTable | None, seed: int) -> Fisher:
        """The true Fisher information of what is said at the answers of these examples."""
        total: Fisher | None = None
        shape = self._shape(examples)
        for at in range(0, len(examples), _BATCH):
            part = [examples[index % len(examples)] for index in range(at, at + _BATCH)]
            batch = self._padded(part, shape)
            counted = np.zeros(batch.tokens.shape, bool)
            for row, each in enumerate(part):
                counted[row, each.first - 1 : len(each.tokens) - 1] = True
            now = self._estimate(batch.tokens, counted, seed=seed + at, learned=learned)
            total = now if total is None else total.plus(now)
        assert total is not None, "there is at least one example"
        return total

    def ref(self, table: LoraTable | None) -> LoraRef | None:
        """A table to be asked through; None is the base model."""
        if table is None:
            return None
        self._count += 1
        return LoraRef("lab", self._count, ("lab", str(self._count)), table)

    async def _ask(self, item: Item, lora: LoraRef | None) -> str:
        self._count += 1
        job = Job(
            request_id=str(self._count),
            prompt_ids=tuple(self.tokenizer.chat_ids(item.messages)),
            sampling=SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS),
            lora=lora,
        )
        text = ""
        async for update in self._engine.generate(job):
            text += update.text
        return text.strip()

    def _mean(self, table: LoraTable | None, batch: Padded, below: LoraTable | None) -> float:
        nats = self._tuner.loss(table, batch, learned=below)
        return float((nats * batch.weight).sum() / batch.weight.sum())

    def _shape(self, examples: Sequence[Example]) -> tuple[int, int]:
        """Few shapes for all of them: a shape is a program."""
        length = max(len(each.tokens) for each in examples)
        return -(-length // 64) * 64, 32

    def _padded(self, examples: Sequence[Example], shape: tuple[int, int]) -> Padded:
        length, targets = shape
        return padded(examples, length=length, num_targets=targets, num_ids=1, no_id=self._no_id)


def _drawn(pools: Sequence[Sequence[Example]], rng: np.random.Generator) -> list[Example]:
    share = _BATCH // len(pools)
    drawn = [pool[int(rng.integers(len(pool)))] for pool in pools for _ in range(share)]
    first = pools[0]
    return drawn + [first[int(rng.integers(len(first)))] for _ in range(_BATCH - len(drawn))]
