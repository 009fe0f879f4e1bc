"""The settings of the rows of a batch: most in two small tables, the rest on the device.

A sequence takes its row of the tables when it is first sampled there; what was in it is
overwritten whole. Counts for penalties and biases of single tokens are uploaded for the few
sequences that ask for them.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from engine import sampling
from engine.config import EnginePlan
from engine.params import MAX_BIASES, MAX_EOS_IDS, MAX_STOP_IDS
from engine.sampling import IN_PROMPT, NUM_FLOATS, NUM_INTS, Rows
from engine.sequence import Sequence

_LEAST = 1e-5  # temperature or top_p: smaller ones choose the best token as well
_NEVER = -1e30
_ALWAYS = np.iinfo(np.int32).max
_WIDTH = MAX_BIASES + MAX_STOP_IDS + MAX_EOS_IDS
_AT_ONCE = 64  # tokens counted in one call


class SamplingRows:
    """Owner of the sampling settings and counts. Lives on the engine thread."""

    def __init__(self, plan: EnginePlan, *, vocab_size: int) -> None:
        self._vocab_size, num_rows = vocab_size, plan.max_num_seqs
        self._ints = np.zeros((num_rows, NUM_INTS), np.int32)
        self._floats = np.zeros((num_rows, NUM_FLOATS), np.float32)
        self._seated: list[Sequence | None] = [None] * num_rows
        self._num_counted = [0] * num_rows
        self.device = _empty(num_rows, vocab_size)
        # Fresh function objects: jit counts programs per function, not per jit.
        self._write = jax.jit(functools.partial(_write_row), donate_argnums=0)
        self._count = jax.jit(functools.partial(_count_tokens), donate_argnums=0)
        self._upload(0, np.zeros(vocab_size, np.int32), {}, (), 0)  # compiles it
        self._add([], [])

    def num_programs(self) -> int:
        """Compiled variants of the uploads; growth after warm-up is a bug."""
        return self._write._cache_size() + self._count._cache_size()  # pyright: ignore

    def settings(self, sequences: list[Sequence], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Integers [size, 9] and floats [size, 6] of the rows that are about to be sampled."""
        for sequence in sequences:
            if self._seated[sequence.row] is not sequence:
                self._seat(sequence)
        rows = [sequence.row for sequence in sequences]
        ints = np.zeros((size, NUM_INTS), np.int32)
        floats = np.zeros((size, NUM_FLOATS), np.float32)
        floats[:, sampling.TOP_P] = floats[:, sampling.REPETITION] = 1.0
        ints[: len(rows)], floats[: len(rows)] = self._ints[rows], self._floats[rows]
        ints[: len(rows), sampling.SLOT] = [sequence.slot for sequence in sequences]
        ints[: len(rows), sampling.INDEX] = [sequence.num_generated for sequence in sequences]
        if ints[:, sampling.IS_PENALISED].any():
            self._catch_up(sequences)
        return ints, floats

    def _seat(self, sequence: Sequence) -> None:
        params, row = sequence.job.sampling, sequence.row
        ints, floats = self._ints[row], self._floats[row]
        blocked = sequence.stop_ids if params.min_tokens else ()
        ints[sampling.SEED] = ((params.seed or 0) + sequence.index) & 0x7FFFFFFF
        ints[sampling.TOP_K], ints[sampling.NUM_LOGPROBS] = params.top_k, params.logprobs or 0
        ints[sampling.ROW] = row
        ints[sampling.IS_BIASED] = bool(params.logit_bias or blocked)
        ints[sampling.IS_PENALISED] = params.has_penalties
        ints[sampling.IS_MASKED] = sequence.matcher is not None
        # The device flushes subnormals to zero, which would mean greedy, or nothing at all.
        floats[sampling.TEMPERATURE] = params.temperature and max(params.temperature, _LEAST)
        floats[sampling.TOP_P] = max(params.top_p, _LEAST)
        floats[sampling.MIN_P] = params.min_p
        floats[sampling.REPETITION] = params.repetition_penalty
        floats[sampling.PRESENCE] = params.presence_penalty
        floats[sampling.FREQUENCY] = params.frequency_penalty
        if ints[sampling.IS_BIASED] or params.has_penalties:
            tally = np.bincount(
                sequence.tokens[sequence.num_prompt :], minlength=self._vocab_size
            ).astype(np.int32)
            tally[list(set(sequence.tokens[: sequence.num_prompt]))] += IN_PROMPT
            self._upload(row, tally, params.logit_bias, tuple(blocked), params.min_tokens)
        self._num_counted[row] = len(sequence.tokens)
        self._seated[row] = sequence

    def _upload(
        self,
        row: int,
        tally: np.ndarray,
        biases: Mapping[int, float],
        blocked: tuple[int, ...],
        until: int,
    ) -> None:
        ids = np.full(_WIDTH, self._vocab_size, np.int32)
        values, untils = np.zeros(_WIDTH, np.float32), np.zeros(_WIDTH, np.int32)
        count, total = len(biases), len(biases) + len(blocked)
        ids[:total] = [*biases, *blocked]
        values[:count], values[count:total] = list(biases.values()), _NEVER
        untils[:count], untils[count:total] = _ALWAYS, until
        self.device = self._write(self.device, np.int32(row), tally, ids, values, untils)

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Count the tokens that came since a penalised row was sampled last."""
        rows: list[int] = []
        tokens: list[int] = []
        for sequence in sequences:
            row = sequence.row
            if self._ints[row, sampling.IS_PENALISED]:
                new = sequence.tokens[self._num_counted[row] :]
                rows += [row] * len(new)
                tokens += new
                self._num_counted[row] = len(sequence.tokens)
        for at in range(0, len(rows), _AT_ONCE):
            self._add(rows[at : at + _AT_ONCE], tokens[at : at + _AT_ONCE])

    def _add(self, rows: list[int], tokens: list[int]) -> None:
        padded = np.full((2, _AT_ONCE), len(self._seated), np.int32)
        padded[0, : len(rows)], padded[1, : len(rows)] = rows, tokens
        self.device = self._count(self.device, padded)


def _empty(num_rows: int, vocab_size: int) -> Rows:
    return Rows(
        tally=jnp.zeros((num_rows, vocab_size), jnp.int32),
        bias_ids=jnp.full((num_rows, _WIDTH), vocab_size, jnp.int32),
        bias=jnp.zeros((num_rows, _WIDTH), jnp.float32),
        bias_until=jnp.zeros((num_rows, _WIDTH), jnp.int32),
    )


def _write_row(
    rows: Rows, row: Int[Array, ""], tally: Array, ids: Array, bias: Array, until: Array
) -> Rows:
    one = Rows(tally, ids, bias, until)
    return Rows(*(whole.at[row].set(part) for whole, part in zip(rows, one, strict=True)))


def _count_tokens(rows: Rows, pairs: Int[Array, "2 K"]) -> Rows:
    """Add one to the tally of each (row, token); a row outside the table is padding."""
    return rows._replace(tally=rows.tally.at[pairs[0], pairs[1]].add(1, mode="drop"))
