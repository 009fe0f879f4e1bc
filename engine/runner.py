"""Runs the scheduler's work on the device: pool, head slots, compiled steps. Engine thread only."""

from collections.abc import Callable

import jax
import numpy as np

from engine import step
from engine.config import EnginePlan
from engine.kv.pool import new_pool
from engine.model import LoadedModel
from engine.sequence import Kind, Sequence
from engine.slots import HeadSlots
from engine.step import Captured, Sampled

_LEAST = 1e-5  # temperature or top_p: smaller ones choose the best token as well
Progress = Callable[[str, int, int], None]
"""(what, done, total) while compiling."""


class Runner:
    """Owner of everything on the device."""

    def __init__(self, model: LoadedModel, plan: EnginePlan) -> None:
        config = model.config
        self._plan = plan
        self._leaves = tuple(jax.tree.leaves(model.params))
        self._steps = step.make_steps(model)
        self.slots = HeadSlots(plan, hidden_size=config.hidden_size, vocab_size=config.vocab_size)
        self._pool = new_pool(
            num_layers=config.num_layers,
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=plan.dtype,
        )
        self._tables = np.zeros((plan.max_num_seqs, plan.pages_per_seq), np.int32)
        self._num_warm = 0

    def warm_up(self, progress: Progress) -> None:
        """Compile every shape that serving can ask for."""
        plan = self._plan
        chunks = sorted({*plan.prefill_buckets, plan.score_chunk})
        rows = plan.decode_buckets
        total = len(chunks) + len(rows) + 2
        hidden = None
        for done, size in enumerate(chunks):
            progress("compile prefill", done, total)
            hidden, _ = self._prefill([0] * size, 0, size, self._tables[0], size, write=False)
        for done, size in enumerate(rows):
            progress("compile decode", len(chunks) + done, total)
            self._decode(np.zeros((size, 7), np.int32), np.zeros((size, 2), np.float32), [])
        progress("compile sampling", total - 2, total)
        assert hidden is not None
        one = np.asarray(hidden[:1])
        self._sample(one, np.zeros((1, 7), np.int32), np.zeros((1, 2), np.float32))
        progress("compile captures", total - 1, total)
        self._capture(np.zeros((plan.score_chunk, one.shape[1]), one.dtype))
        self._num_warm = self._num_programs()
        progress("compile", total, total)

    @property
    def num_recompiles(self) -> int:
        """Programs compiled since `warm_up`. Anything above 0 is a bug."""
        return self._num_programs() - self._num_warm

    def _num_programs(self) -> int:
        return self._steps.num_programs() + self.slots.num_programs()

    def prefill(self, sequence: Sequence, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute a chunk of the sequence. Returns hidden [T, D] of it, their sum [D] float32."""
        is_score = sequence.kind is Kind.SCORE
        sizes = (self._plan.score_chunk,) if is_score else self._plan.prefill_buckets
        size = min(size for size in sizes if size >= length)
        tokens = sequence.tokens[start : start + length]
        table = np.zeros(self._plan.pages_per_seq, np.int32)
        table[: len(sequence.pages)] = sequence.pages
        hidden, total = self._prefill(tokens, start, length, table, size)
        return np.asarray(hidden)[:length], np.asarray(total)

    def set_pages(self, sequence: Sequence) -> None:
        """Refresh the sequence's row of the decode page table."""
        self._tables[sequence.row, : len(sequence.pages)] = sequence.pages

    def sample_one(self, sequence: Sequence, hidden: np.ndarray) -> Sampled:
        """First token of a sequence from the final hidden state [D] of its prompt."""
        ints, floats = self._arrays([sequence], 1)
        return self._sample(hidden[None], ints, floats)

    def decode(self, sequences: list[Sequence]) -> Sampled:
        """One step of all of them; row i of the result belongs to sequence i."""
        size = min(size for size in self._plan.decode_buckets if size >= len(sequences))
        ints, floats = self._arrays(sequences, size)
        return self._decode(ints, floats, [sequence.row for sequence in sequences])

    def capture(self, hidden: np.ndarray) -> Captured:
        """Base quantities of up to `score_chunk` hidden states [T, D]."""
        size = self._plan.score_chunk
        padded = np.zeros((size, hidden.shape[1]), hidden.dtype)
        padded[: len(hidden)] = hidden
        return self._capture(padded)

    def _arrays(self, sequences: list[Sequence], size: int) -> tuple[np.ndarray, np.ndarray]:
        ints = np.zeros((size, 7), np.int32)
        floats = np.zeros((size, 2), np.float32)
        floats[:, step.TOP_P] = 1.0
        ints[len(sequences) :, step.POSITION] = -1
        for row, sequence in enumerate(sequences):
            sampling = sequence.job.sampling
            at = min(sequence.num_computed, len(sequence.tokens) - 1)
            ints[row] = (
                sequence.tokens[at],
                at,
                sequence.slot,
                (sampling.seed or 0) & 0x7FFFFFFF,
                at + 1 - sequence.num_prompt if at >= sequence.num_prompt else 0,
                sampling.top_k,
                sampling.logprobs or 0,
            )
            # The device flushes subnormals to zero, which would mean greedy, or nothing at all.
            warmth = max(sampling.temperature, _LEAST) if sampling.temperature else 0.0
            floats[row] = warmth, max(sampling.top_p, _LEAST)
        return ints, floats

    def _prefill(
        self,
        tokens: list[int],
        start: int,
        length: int,
        table: np.ndarray,
        size: int,
        *,
        write: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        padded = np.zeros(size, np.int32)
        padded[: len(tokens)] = tokens
        span = np.array([start, length if write else 0], np.int32)
        self._pool, hidden, total = self._steps.prefill(
            self._leaves, self._pool, padded, span, table
        )
        return hidden, total

    def _decode(self, ints: np.ndarray, floats: np.ndarray, rows: list[int]) -> Sampled:
        if not rows:
            ints[:, step.POSITION] = -1
        table = np.zeros((len(ints), self._plan.pages_per_seq), np.int32)
        table[: len(rows)] = self._tables[rows]
        self._pool, sampled = self._steps.decode(
            self._leaves, self._pool, self.slots.stack, ints, floats, table
        )
        return jax.tree.map(np.asarray, sampled)

    def _sample(self, hidden: np.ndarray, ints: np.ndarray, floats: np.ndarray) -> Sampled:
        sampled = self._steps.sample(self._leaves, self.slots.stack, hidden, ints, floats)
        return jax.tree.map(np.asarray, sampled)

    def _capture(self, hidden: np.ndarray) -> Captured:
        return jax.tree.map(np.asarray, self._steps.capture(self._leaves, hidden))
