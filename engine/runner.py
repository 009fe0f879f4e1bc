"""Runs the scheduler's work on the device: pool, slots, rows, programs. Engine thread only."""

from collections.abc import Callable
from typing import cast

import jax
import numpy as np

from engine import step
from engine.config import EnginePlan
from engine.kv.pool import new_pool
from engine.model import LoadedModel
from engine.ops.lora_delta import LoraStack
from engine.rows import SamplingRows
from engine.sequence import Kind, Sequence
from engine.slots import HeadSlots, LoraSlots
from engine.step import Batch, Captured, Read, Sampled

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
        shapes = [(1, size) for size in chunks]
        if plan.splits_step:
            shapes += [(size, 1) for size in plan.decode_buckets]
        stacks = [self.loras.none, self.loras.stack] if self.loras.sizes else [self.loras.none]
        jobs = [(shape, stack) for stack in stacks for shape in sorted(set(shapes))]
        jobs += [((size, 0), stack) for stack in stacks for size in plan.decode_buckets]
        state = np.zeros((1, 1), np.float32)
        for done, ((rows, size), stack) in enumerate(jobs):
            progress("compile steps", done, len(jobs) + 1)
            nowhere, slots = np.full((rows, size or 1), -1, np.int32), np.zeros(rows, np.int32)
            table = np.zeros((rows, plan.pages_per_seq), np.int32)
            if size:
                hidden = self._forward(np.zeros_like(nowhere), nowhere, table, stack, slots)
                state = np.asarray(hidden)[:1, :1]
            else:
                self._step(np.zeros_like(nowhere), nowhere, table, [], None, stack, slots)
                if rows == plan.decode_buckets[0]:  # the first token after a prompt
                    self._sample(np.repeat(state, rows, axis=0), [], None, stack, slots)
        progress("compile captures", len(jobs), len(jobs) + 1)
        slice_D = np.repeat(state[0], plan.slice_tokens, axis=0)
        self.capture(slice_D)
        for stack in stacks:
            nothing = np.zeros(plan.slice_tokens, np.int32)
            self._read(slice_D, nothing, np.zeros(2, np.int32), 0, stack)
        self.copy_pages([])
        self._num_warm = self._num_programs()
        progress("compile", len(jobs) + 1, len(jobs) + 1)

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
        hidden = self._forward(tokens, positions, table, *self._loras_of([sequence], 1))
        return np.asarray(hidden)[0, :length]

    def sample_one(self, sequence: Sequence, hidden: np.ndarray, masks: Masks) -> Sampled:
        """First token of a sequence from the final hidden state [D] of its prompt."""
        size = self._plan.decode_buckets[0]
        padded = np.zeros((size, 1, len(hidden)), hidden.dtype)
        padded[0, 0] = hidden
        return self._sample(padded, [sequence], masks, *self._loras_of([sequence], size))

    def decode(self, sequences: list[Sequence], masks: Masks) -> tuple[np.ndarray, Sampled]:
        """One step of all of them: the hidden state [D] of each input token, and what follows.

        Row i belongs to sequence i. `masks` is called while an accelerator computes.
        """
        size = min(size for size in self._plan.decode_buckets if size >= len(sequences))
        tokens, positions = np.zeros((size, 1), np.int32), np.full((size, 1), -1, np.int32)
        for row, sequence in enumerate(sequences):
            at = sequence.num_computed
            tokens[row, 0], positions[row, 0] = sequence.tokens[at], at
            self._tables[sequence.row, : len(sequence.pages)] = sequence.pages
        table = np.zeros((size, self._plan.pages_per_seq), np.int32)
        table[: len(sequences)] = self._tables[[sequence.row for sequence in sequences]]
        loras = self._loras_of(sequences, size)
        hidden, sampled = self._step(tokens, positions, table, sequences, masks, *loras)
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
        stack, _ = self._loras_of([sequence], 1)
        num_best = sampling.prompt_logprobs or 0
        return self._read(self._slice(hidden), padded, slots, num_best, stack)

    def _slice(self, hidden: np.ndarray) -> np.ndarray:
        padded = np.zeros((self._plan.slice_tokens, hidden.shape[1]), hidden.dtype)
        padded[: len(hidden)] = hidden
        return padded

    def _read(
        self,
        hidden: np.ndarray,
        tokens: np.ndarray,
        slots: np.ndarray,
        num_logprobs: int,
        loras: LoraStack,
    ) -> Read:
        counts = np.full(len(tokens), num_logprobs, np.int32)
        read = self._steps.read(
            self._leaves, self.heads.stack, loras, hidden, tokens, slots, counts
        )
        return jax.tree.map(np.asarray, read)

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        table: np.ndarray,
        loras: LoraStack,
        lora_slots: np.ndarray,
    ) -> jax.Array:
        self._pool, hidden = self._steps.forward(
            self._leaves, self._pool, loras, tokens, positions, table, lora_slots
        )
        return hidden

    def _step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        table: np.ndarray,
        sequences: list[Sequence],
        masks: Masks,
        loras: LoraStack,
        lora_slots: np.ndarray,
    ) -> tuple[jax.Array, Sampled]:
        """One token of every row: in two programs where the host has time between them."""
        if self._plan.splits_step:
            hidden = self._forward(tokens, positions, table, loras, lora_slots)
            return hidden, self._sample(hidden, sequences, masks, loras, lora_slots)
        batch = self._batch(sequences, len(tokens), masks)
        self._pool, hidden, sampled = self._steps.decode(
            self._leaves, self._pool, self.heads.stack, loras, self._rows.device,
            tokens, positions, table, batch, lora_slots,
        )  # fmt: skip
        return hidden, jax.tree.map(np.asarray, sampled)

    def _sample(
        self,
        hidden: jax.Array | np.ndarray,
        sequences: list[Sequence],
        masks: Masks,
        loras: LoraStack,
        lora_slots: np.ndarray,
    ) -> Sampled:
        batch = self._batch(sequences, len(hidden), masks)
        sampled = self._steps.sample(
            self._leaves, self.heads.stack, loras, self._rows.device, hidden, batch, lora_slots
        )
        return jax.tree.map(np.asarray, sampled)

    def _batch(self, sequences: list[Sequence], size: int, masks: Masks) -> Batch:
        ints, floats = self._rows.settings(sequences, size)
        words = self._no_masks[size]
        if masks is not None:
            words = np.zeros_like(words)
            masks(words)
        return Batch(*cast(tuple[jax.Array, ...], (words, ints, floats)))

    def _loras_of(self, sequences: list[Sequence], size: int) -> tuple[LoraStack, np.ndarray]:
        """The stack that a batch needs, and its rows' slots. Without a LoRA it needs none."""
        slots = np.zeros(size, np.int32)
        slots[: len(sequences)] = [sequence.lora_slot for sequence in sequences]
        return (self.loras.stack if slots.any() else self.loras.none), slots
