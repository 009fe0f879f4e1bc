"""Runs the scheduler's work on the device: pool, slots, rows, programs. Engine thread only."""

from collections.abc import Callable

import jax
import numpy as np

from engine import step
from engine.config import EnginePlan
from engine.kv.pool import new_pool
from engine.model import LoadedModel
from engine.rows import SamplingRows
from engine.sequence import Kind, Sequence
from engine.slots import HeadSlots, LoraSlots
from engine.step import Captured, Read, Sampled

Progress = Callable[[str, int, int], None]
"""(what, done, total) while compiling."""
Masks = Callable[[np.ndarray], None] | None
"""Sets the bits of allowed tokens in [B, W] int32, all clear; None: nothing is masked."""


class Runner:
    """Owner of everything on the device."""

    def __init__(self, model: LoadedModel, plan: EnginePlan) -> None:
        config = model.config
        self._plan = plan
        self._leaves = tuple(jax.tree.leaves(model.params))
        self._steps = step.make_steps(model)
        self.heads = HeadSlots(plan, hidden_size=config.hidden_size, vocab_size=config.vocab_size)
        self.loras = LoraSlots(plan, config)
        self._rows = SamplingRows(plan, vocab_size=config.vocab_size)
        self._pool = new_pool(
            num_layers=config.num_layers,
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=plan.dtype,
        )
        self._tables = np.zeros((plan.max_num_seqs, plan.pages_per_seq), np.int32)
        self._mask_words = -(-config.vocab_size // 32)
        self._no_masks = {
            size: np.zeros((size, self._mask_words), np.int32) for size in plan.decode_buckets
        }
        self._num_warm = 0

    def warm_up(self, progress: Progress) -> None:
        """Compile every shape that serving can ask for."""
        plan = self._plan
        chunks = sorted({*plan.prefill_buckets, plan.slice_tokens})
        shapes = [(1, size) for size in chunks] + [(size, 1) for size in plan.decode_buckets]
        total = len(set(shapes)) + len(plan.decode_buckets) + 2
        done = 0
        state = np.zeros((1, 1), np.float32)
        for shape in sorted(set(shapes)):
            progress("compile forward", done, total)
            hidden = self._forward(np.zeros(shape, np.int32), np.full(shape, -1, np.int32), [])
            done += 1
            if shape[1] == 1:
                progress("compile sampling", done, total)
                self._sample(hidden, [], None)
                done += 1
            state = np.asarray(hidden)[:1, :1]
        self._sample(np.repeat(state, plan.decode_buckets[0], axis=0), [], None)  # of a prompt
        progress("compile captures", done, total)
        slice_D = np.repeat(state[0], plan.slice_tokens, axis=0)
        self.capture(slice_D)
        self._read(slice_D, np.zeros(plan.slice_tokens, np.int32), np.zeros(2, np.int32), 0)
        progress("compile copies", done + 1, total)
        self.copy_pages([])
        self._num_warm = self._num_programs()
        progress("compile", total, total)

    @property
    def num_recompiles(self) -> int:
        """Programs compiled since `warm_up`. Anything above 0 is a bug."""
        return self._num_programs() - self._num_warm

    def _num_programs(self) -> int:
        owners = (self._steps, self.heads, self.loras, self._rows)
        return sum(owner.num_programs() for owner in owners)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages onto pages, before anybody writes."""
        size = self._plan.max_num_seqs
        for at in range(0, len(pairs) or 1, size):
            sources, targets = np.zeros(size, np.int32), np.full(size, self._plan.num_pages)
            for index, (source, target) in enumerate(pairs[at : at + size]):
                sources[index], targets[index] = source, target
            self._pool = self._steps.copy(self._pool, sources, targets.astype(np.int32))

    def prefill(self, sequence: Sequence, start: int, length: int) -> np.ndarray:
        """Compute a chunk of the sequence. Returns its final hidden states [length, D]."""
        is_slice = sequence.kind is Kind.CAPTURE
        sizes = (self._plan.slice_tokens,) if is_slice else self._plan.prefill_buckets
        size = min(size for size in sizes if size >= length)
        tokens, positions = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
        tokens[0, :length] = sequence.tokens[start : start + length]
        positions[0, :length] = np.arange(start, start + length)
        table = np.zeros((1, self._plan.pages_per_seq), np.int32)
        table[0, : len(sequence.pages)] = sequence.pages
        hidden = self._forward(tokens, positions, [sequence], table)
        return np.asarray(hidden)[0, :length]

    def sample_one(self, sequence: Sequence, hidden: np.ndarray, masks: Masks) -> Sampled:
        """First token of a sequence from the final hidden state [D] of its prompt."""
        size = self._plan.decode_buckets[0]
        padded = np.zeros((size, 1, len(hidden)), hidden.dtype)
        padded[0, 0] = hidden
        return self._sample(padded, [sequence], masks)

    def decode(self, sequences: list[Sequence], masks: Masks) -> tuple[np.ndarray, Sampled]:
        """One step of all of them: the hidden state [D] of each input token, and what follows.

        Row i belongs to sequence i. `masks` is called while the device computes.
        """
        size = min(size for size in self._plan.decode_buckets if size >= len(sequences))
        tokens, positions = np.zeros((size, 1), np.int32), np.full((size, 1), -1, np.int32)
        for row, sequence in enumerate(sequences):
            at = sequence.num_computed
            tokens[row, 0], positions[row, 0] = sequence.tokens[at], at
            self._tables[sequence.row, : len(sequence.pages)] = sequence.pages
        table = np.zeros((size, self._plan.pages_per_seq), np.int32)
        table[: len(sequences)] = self._tables[[sequence.row for sequence in sequences]]
        hidden = self._forward(tokens, positions, sequences, table)
        sampled = self._sample(hidden, sequences, masks)
        return np.asarray(hidden)[: len(sequences), 0], sampled

    def capture(self, hidden: np.ndarray) -> Captured:
        """Base quantities of up to `slice_tokens` hidden states [T, D]."""
        return jax.tree.map(np.asarray, self._steps.capture(self._leaves, self._slice(hidden)))

    def read(self, sequence: Sequence, hidden: np.ndarray, tokens: list[int]) -> Read:
        """Log-probabilities of given tokens after up to `slice_tokens` hidden states [T, D]."""
        padded = np.zeros(self._plan.slice_tokens, np.int32)
        padded[: len(tokens)] = tokens
        slots = np.array([sequence.slot, sequence.lora_slot], np.int32)
        sampling = sequence.job.sampling
        return self._read(self._slice(hidden), padded, slots, sampling.prompt_logprobs or 0)

    def _slice(self, hidden: np.ndarray) -> np.ndarray:
        padded = np.zeros((self._plan.slice_tokens, hidden.shape[1]), hidden.dtype)
        padded[: len(hidden)] = hidden
        return padded

    def _read(
        self, hidden: np.ndarray, tokens: np.ndarray, slots: np.ndarray, num_logprobs: int
    ) -> Read:
        counts = np.full(len(tokens), num_logprobs, np.int32)
        read = self._steps.read(
            self._leaves, self.heads.stack, self.loras.stack, hidden, tokens, slots, counts
        )
        return jax.tree.map(np.asarray, read)

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        sequences: list[Sequence],
        table: np.ndarray | None = None,
    ) -> jax.Array:
        if table is None:
            table = np.zeros((len(tokens), self._plan.pages_per_seq), np.int32)
        slots = self._lora_slots(sequences, len(tokens))
        self._pool, hidden = self._steps.forward(
            self._leaves, self._pool, self.loras.stack, tokens, positions, table, slots
        )
        return hidden

    def _sample(
        self, hidden: jax.Array | np.ndarray, sequences: list[Sequence], masks: Masks
    ) -> Sampled:
        size = len(hidden)
        ints, floats = self._rows.settings(sequences, size)
        words = self._no_masks[size]
        if masks is not None:
            words = np.zeros_like(words)
            masks(words)
        sampled = self._steps.sample(
            self._leaves, self.heads.stack, self.loras.stack, self._rows.device, hidden,
            words, ints, floats, self._lora_slots(sequences, size),
        )  # fmt: skip
        return jax.tree.map(np.asarray, sampled)

    def _lora_slots(self, sequences: list[Sequence], size: int) -> np.ndarray:
        slots = np.zeros(size, np.int32)
        slots[: len(sequences)] = [sequence.lora_slot for sequence in sequences]
        return slots
