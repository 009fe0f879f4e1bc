"""Training an inner LoRA in slices: one batch's gradient at a time, an update after several.

A slice is a function of arrays alone, so it can run between two steps of serving; the state
between slices is a plain tree of arrays, which can be written to disk and taken up again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from adapters.consolidate import penalty
from adapters.example import Padded
from adapters.fisher import Fisher, Model
from adapters.lora import Factors, adapted_by
from adapters.objective import soft_cross_entropy
from engine import LoraTable

Modules = Mapping[str, tuple[int, int, int]]
"""name -> (layers, size in, size out) of the linear modules that a LoRA adapts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """How a LoRA is trained. The defaults are those of docs/learning.md."""

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 5e-3
    warmup_steps: int = 5
    num_steps: int = 120
    max_norm: float = 1.0  # of the gradient

    @property
    def scale(self) -> float:
        """Of the product of the factors (Hu 2021, arXiv:2106.09685, section 4.1)."""
        return self.alpha / self.rank


class TuneState(NamedTuple):
    """Everything between two slices."""

    factors: Factors
    optimiser: Any
    total: Factors  # gradients since the last update
    num_slices: Array  # that are in it
    step: Array


class Slice(NamedTuple):
    """What one batch said."""

    loss: Float[Array, ""]  # nats per target, the penalty left out
    penalty: Float[Array, ""]
    norm: Float[Array, ""]  # of the gradient


class Tuner:
    """Compiled slices over one model. Holds no state of a training."""

    def __init__(self, model: Model, modules: Modules, config: TuneConfig) -> None:
        self._model, self._modules, self._config = model, dict(modules), config
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, config.num_steps
        )
        self._optimiser = optax.chain(
            optax.clip_by_global_norm(config.max_norm), optax.adam(schedule)
        )
        self._slice = jax.jit(self._trace_slice, donate_argnums=1)
        self._update = jax.jit(self._trace_update, donate_argnums=0)
        self._loss = jax.jit(self._trace_loss)

    def start(self, seed: int, *, table: LoraTable | None = None) -> TuneState:
        """A LoRA that says nothing yet, first factors drawn, second factors 0; or `table`."""
        rng, rank = np.random.default_rng(seed), self._config.rank
        a = {
            m: jnp.asarray(rng.standard_normal((layers, rank, x)) * x**-0.5, jnp.float32)
            for m, (layers, x, _) in self._modules.items()
        }
        b = {m: jnp.zeros((layers, rank, y)) for m, (layers, _, y) in self._modules.items()}
        if table is not None:
            a = {m: jnp.asarray(each) for m, each in table.a.items()}
            b = {m: jnp.asarray(each) / self._config.scale for m, each in table.b.items()}
        nothing = jax.tree.map(jnp.zeros_like, (a, b))
        zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))  # two: a slice uses them up
        return TuneState((a, b), self._optimiser.init((a, b)), nothing, *zeros)

    def slice(
        self,
        state: TuneState,
        batch: Padded,
        *,
        learned: LoraTable | None = None,
        fisher: Fisher | None = None,
        weight: float = 0.0,
    ) -> tuple[TuneState, Slice]:
        """Add the gradient of one batch, and of `weight` times the EWC penalty.

        `learned` is what was learned before, below the new LoRA and fixed. `state` is used up.
        """
        return self._slice(
            self._model.weights, state, _arrays(batch),
            _factors(learned), _information(fisher, self._modules), np.float32(weight),
        )  # fmt: skip

    def update(self, state: TuneState) -> TuneState:
        """Step along the mean gradient of the slices since the last one. `state` is used up."""
        return self._update(state)

    def loss(
        self, table: LoraTable | None, batch: Padded, *, learned: LoraTable | None = None
    ) -> np.ndarray:
        """Nats of each target [B, A], 0 where there is none, with a LoRA or without."""
        args = (_factors(learned), _factors(table), _arrays(batch))
        return np.asarray(self._loss(self._model.weights, *args))

    def table(self, state: TuneState) -> LoraTable:
        """The LoRA as it is served: its scale in the second factors."""
        a, b = state.factors
        scale = np.float32(self._config.scale)
        return LoraTable(
            {m: np.asarray(each) for m, each in a.items()},
            {m: np.asarray(each) * scale for m, each in b.items()},
        )

    def _scaled(self, factors: Factors) -> Factors:
        a, b = factors
        return a, {m: self._config.scale * each for m, each in b.items()}

    def _held(self, scaled: Factors, fisher: Factors) -> Float[Array, ""]:
        """What a change of the weights costs; 0 where nothing is held."""
        return penalty(scaled, fisher) if fisher[0] else jnp.zeros(())

    def _trace_loss(
        self, weights: Any, learned: Factors, factors: Factors, batch: dict[str, Array]
    ) -> Float[Array, "B A"]:
        adapt = adapted_by(learned, factors)
        hidden = self._model.hidden(weights, batch["tokens"], adapt, rematerialise=True)
        states = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)
        logits = self._model.logits(weights, states, adapt)
        nats = soft_cross_entropy(logits, batch["ids"], batch["probabilities"], batch["rest"])
        return jnp.where(batch["weight"] > 0, nats, 0.0)

    def _trace_slice(
        self,
        weights: Any,
        state: TuneState,
        batch: dict[str, Array],
        learned: Factors,
        fisher: Factors,
        weight: Float[Array, ""],
    ) -> tuple[TuneState, Slice]:
        def objective(factors: Factors) -> tuple[Array, tuple[Array, Array]]:
            scaled = self._scaled(factors)
            nats = self._trace_loss(weights, learned, scaled, batch)
            loss = (nats * batch["weight"]).sum() / jnp.maximum(batch["weight"].sum(), 1e-9)
            held = self._held(scaled, fisher)
            return loss + weight * held, (loss, held)

        gradient, (loss, held) = jax.grad(objective, has_aux=True)(state.factors)
        total = jax.tree.map(jnp.add, state.total, gradient)
        after = state._replace(total=total, num_slices=state.num_slices + 1)
        return after, Slice(loss, held, optax.tree.norm(gradient))

    def _trace_update(self, state: TuneState) -> TuneState:
        count = jnp.maximum(state.num_slices, 1).astype(jnp.float32)
        mean = jax.tree.map(lambda each: each / count, state.total)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            change, optimiser = self._optimiser.update(mean, state.optimiser, state.factors)
            factors: Any = optax.apply_updates(state.factors, change)  # pyright: ignore
        nothing = jax.tree.map(jnp.zeros_like, state.total)
        return TuneState(
            factors, optimiser, nothing, jnp.zeros_like(state.num_slices), state.step + 1
        )


def _arrays(batch: Padded) -> dict[str, np.ndarray]:
    return {
        "tokens": batch.tokens, "at": batch.at, "ids": batch.ids,
        "probabilities": batch.probabilities, "rest": batch.rest, "weight": batch.weight,
    }  # fmt: skip


def _factors(table: LoraTable | None) -> Factors:
    return ({}, {}) if table is None else (dict(table.a), dict(table.b))


def _information(fisher: Fisher | None, modules: Modules) -> Factors:
    if fisher is None:
        return {}, {}
    return {m: fisher.c[m] for m in modules}, {m: fisher.g[m] for m in modules}
