"""The prior-art arm, in an engine of its own: it has no server to learn in."""

import asyncio
from collections.abc import Sequence

import numpy as np

from engine.api import HeadRef, HeadTable, Job, SamplingParams
from engine.client import EngineClient
from engine.config import EngineConfig
from sona.bench.arms import marks_of, prior_rule_table
from sona.bench.tasks import Convention, Item
from sona.model import Warm, warm_up

RATES = (0.002, 0.1, 1.0, 10.0)  # the published one, and larger ones in its favour


class PriorArm:
    """Runs the rule of `arms.prior_rule_table` on the shipped or a given model."""

    def __init__(self, model: str) -> None:
        config = EngineConfig(max_learned_slots=4)
        self._warm: Warm = warm_up(model, "", config, learns=False, progress=lambda *_: None)
        self._engine = EngineClient(
            self._warm.model, self._warm.tokenizer, self._warm.plan, self._warm.runner
        )
        vocabulary = np.arange(self._warm.info.vocab_size)
        self._head = self._warm.head_rows(vocabulary)
        self._num_tables = 0

    async def accuracies(
        self, convention: Convention, lessons: Sequence[Item], items: list[Item]
    ) -> list[float]:
        """Held-out accuracy after the lessons, per rate; every reply goes through the table."""
        prompts = np.stack([await self._vector(item.messages) for item in lessons])
        targets = [convention.apply(item) or "" for item in lessons]
        responses = np.stack([await self._vector(text) for text in targets])
        found = []
        for rate in RATES:
            table = prior_rule_table(prompts, responses, self._head, rate, 32)
            texts = await asyncio.gather(*(self._answer(item, table) for item in items))
            found.append(marks_of(list(texts), items, convention).accuracy)
            self._num_tables += 1
        return found

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _ids(self, prompt: str | list[dict[str, str]]) -> tuple[int, ...]:
        tokenizer = self._warm.tokenizer
        return tuple(
            tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat_ids(prompt)
        )

    async def _vector(self, prompt: str | list[dict[str, str]]) -> np.ndarray:
        job = Job(request_id=f"embed/{id(prompt)}", prompt_ids=self._ids(prompt))
        vector = (await self._engine.embed(job)).vector
        return vector / np.linalg.norm(vector)

    async def _answer(self, item: Item, table: HeadTable) -> str:
        head = HeadRef("prior", self._num_tables, ("prior",), table)
        job = Job(
            request_id=f"{self._num_tables}/{id(item)}",
            prompt_ids=self._ids(item.messages),
            choose_head=lambda _: head,
            sampling=SamplingParams(temperature=0.0, max_tokens=40),
        )
        text = ""
        async for update in self._engine.generate(job):
            text += update.text
        return text
