"""Training examples from the task families, in batches of like length, made in the background."""

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer

from sona.bench.tasks import BASE_FAMILIES, IRRELEVANT, RELEVANT, Family, Item
from sona.bench.tasks.notes import slip_of
from sona.bench.tasks.voice import base_text
from sona.models import generic_prompts
from sona.models.nano.smalltalk import G0
from sona.models.nano.tokenizer import END_ID, PAD_ID

TRAINED = (*BASE_FAMILIES, RELEVANT, IRRELEVANT, G0)
# Share of examples before the weakest families get more. Relevant to irrelevant notes is 40 to 60.
SHARES = {
    "F1": 12.0, "F2": 5.0, "F3": 7.0, "F4": 7.0, "F5": 3.0, "F6": 3.0, "F7": 9.0, "R1": 6.0,
    "R2": 10.0, "R3": 6.0, "R4": 7.0, "R5": 12.0, "R6": 7.0, "NOTE-relevant": 12.0,
    "NOTE-irrelevant": 18.0, "G0": 3.0,
}  # fmt: skip
LENGTHS = (20, 26, 36, 64, 144, 1088)  # tokens per row of a batch; an example joins the least fit
TOPICS = (
    "date", "time", "measure", "status", "record", "ticket", "shelf", "lead", "greet", "reply",
    "tally", "rank", "R1", "R2", "R3", "R4", "R5", "R6", "smalltalk",
)  # fmt: skip
_QUEUED = 16
_SLIPS = 0.25  # share of examples whose answer may slip


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation with one answer."""

    ids: list[int]
    weights: list[float]  # loss weight of each token as a target
    prompt_len: int
    topic: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of equal padded length. `weights[b, t]` weighs the prediction of tokens[b, t+1]."""

    tokens: np.ndarray  # [B, T] int32
    weights: np.ndarray  # [B, T] float32; the last column is zero
    prompt_lens: np.ndarray  # [B] int32
    topics: np.ndarray  # [B] int32, index into TOPICS; -1 for a prompt with a note


def chat_ids(tokenizer: Tokenizer, item: Item) -> list[int]:
    """Ids of the prompt, by the rule that chat_template.jinja writes down."""
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in item.messages)
    return tokenizer.encode(f"{text}<|assistant|>", add_special_tokens=False).ids


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Ids of an answer with the end token."""
    return [*tokenizer.encode(answer, add_special_tokens=False).ids, END_ID]


def corpus(num_items: int, seed: int) -> list[str]:
    """Text to build the tokenizer on: items of all families, and the generic prompts."""
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    for index in range(num_items):
        item = TRAINED[index % len(TRAINED)].base_item(rng, "train")
        lines += [item.system or "", item.prompt, *item.answers]
    return lines + list(generic_prompts())


class Mixture:
    """Draws examples; the shares may change while it runs (one writer, read between examples)."""

    def __init__(
        self, tokenizer: Tokenizer, seed: tuple[int, ...], *, prompt_weight: float
    ) -> None:
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)
        self._prompt_weight = prompt_weight
        self._edges = np.zeros(0)
        self.set_shares(SHARES)

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """Relative frequency of each family from the next example on."""
        edges = np.cumsum([shares[family.name] for family in TRAINED])
        self._edges = edges / edges[-1]

    def example(self) -> Example:
        """An example of a family drawn by the shares."""
        family = TRAINED[int(np.searchsorted(self._edges, self._rng.random(), side="right"))]
        item = family.base_item(self._rng, "train")
        prompt = chat_ids(self._tokenizer, item)
        answer = answer_ids(self._tokenizer, base_text(self._rng, item))
        answer, answer_weights = self._slipped(item, answer)
        weights = [0.0, *[self._prompt_weight] * (len(prompt) - 1), *answer_weights]
        topic = -1 if item.family == "NOTE" else TOPICS.index(item.topic)
        return Example(prompt + answer, weights, len(prompt), topic)

    def _slipped(self, item: Item, answer: list[int]) -> tuple[list[int], list[float]]:
        """Now and then an answer with a word or sign that is not its own, at no loss.

        A user's correction puts such a word into the model's mouth; what follows it must still be
        right. Large models can do this; a small one has to see it.
        """
        weights = [1.0] * len(answer)
        if self._rng.random() >= _SLIPS:
            return answer, weights
        text = slip_of(item, self._rng)
        slipped = answer if text is None else answer_ids(self._tokenizer, text)
        if len(slipped) != len(answer):
            return answer, weights
        own = [float(new == old) for new, old in zip(slipped, answer, strict=True)]
        return slipped, own

    def batches(self, tokens_per_batch: int) -> Iterator[Batch]:
        """Batches without end; a row length is emitted when it has a batch full of examples."""
        pools: dict[int, list[Example]] = {n: [] for n in LENGTHS}
        while True:
            example = self.example()
            length = next(n for n in LENGTHS if n >= len(example.ids))
            pool = pools[length]
            pool.append(example)
            if len(pool) == max(tokens_per_batch // length, 2):
                yield _batch(pool, length)
                pool.clear()


def _batch(rows: list[Example], length: int) -> Batch:
    tokens = np.full((len(rows), length), PAD_ID, np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.ids)] = row.ids
        weights[index, : len(row.ids) - 1] = row.weights[1:]
    prompt_lens = np.asarray([row.prompt_len for row in rows], np.int32)
    return Batch(tokens, weights, prompt_lens, np.asarray([row.topic for row in rows], np.int32))


class BackgroundBatches:
    """A thread that keeps a few batches ready. Close it, or leave the `with`, to end it."""

    def __init__(self, mixture: Mixture, tokens_per_batch: int) -> None:
        self._queue: queue.Queue[Batch] = queue.Queue(_QUEUED)
        self._stop = threading.Event()
        self._source = mixture.batches(tokens_per_batch)
        self._thread = threading.Thread(target=self._fill, name="nano-batches", daemon=True)

    def __enter__(self) -> "BackgroundBatches":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def next(self) -> Batch:
        """The next batch. Raises RuntimeError when the thread died."""
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the thread that makes batches has died") from None

    def _fill(self) -> None:
        for batch in self._source:
            while not self._stop.is_set():
                try:
                    self._queue.put(batch, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set():
                return


def held_out(family: Family, rng: Generator, num_items: int) -> list[Item]:
    """Items of the tenth that training never draws."""
    return [family.base_item(rng, "held") for _ in range(num_items)]
