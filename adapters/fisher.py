"""How much what is said depends on each weight: the Fisher information, true and factored.

For a linear module the gradient of a label's log-probability is delta x^T, delta the gradient at
its outputs and x its inputs. The diagonal of the Fisher information over the weights is kept as

    F_ij = g_i c_j        g_i = E[delta_i^2]   c_j = E[x_j^2]

with one label drawn from the model itself at each position: labels of the data would give the
empirical Fisher, which is another thing (van de Ven 2025, arXiv:2502.11756, section 3; Martens
2015, arXiv:1503.05671, section 2 for the factors). Labels are drawn independently, so the squares
of their summed gradients have the expectation of the sum of squares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from adapters.lora import Factors, adapted_by
from engine import LoraTable

_FLOOR = 1e-3  # of the mean: a row never seen is not free


class Model(Protocol):
    """The served model over whole sequences, as functions of its weights."""

    @property
    def weights(self) -> Any:
        """What the functions take first."""
        ...

    def hidden(self, weights: Any, tokens: Array, adapt: Any, *, rematerialise: bool) -> Array:
        """Final hidden states [B, T, D] of tokens [B, T]."""
        ...

    def logits(self, weights: Any, hidden: Array, adapt: Any) -> Array:
        """Logits [..., V] of states [..., D]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Fisher:
    """Sums over positions, by module; both factors of every layer."""

    g: Mapping[str, np.ndarray]  # [L, Y] float32, sums of delta^2
    c: Mapping[str, np.ndarray]  # [L, X] float32, sums of x^2
    count: float  # positions, each with its weight

    def plus(self, other: "Fisher", *, decay: float = 1.0) -> "Fisher":
        """A running sum: what is here counts `decay` as much as before."""
        return Fisher(
            {m: decay * g + other.g[m] for m, g in self.g.items()},
            {m: decay * c + other.c[m] for m, c in self.c.items()},
            decay * self.count + other.count,
        )

    def normalised(self) -> "Fisher":
        """Means instead of sums, scaled so that F_ij is 1 on average, with a floor on each factor.

        The scale makes one penalty weight mean the same for every model.
        """
        g = {m: _floored(sums / self.count) for m, sums in self.g.items()}
        c = {m: _floored(sums / self.count) for m, sums in self.c.items()}
        total = sum(float((g[m].sum(axis=1) * c[m].sum(axis=1)).sum()) for m in g)
        size = sum(g[m].shape[1] * c[m].size for m in g)
        return Fisher({m: g[m] * (size / total) for m in g}, c, 1.0)


def _floored(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, _FLOOR * max(float(values.mean()), np.finfo(np.float32).tiny))


class FisherEstimate:
    """Compiled estimates over one model. One program for each shape of tokens."""

    def __init__(self, model: Model, modules: Mapping[str, tuple[int, int, int]]) -> None:
        """`modules`: name -> (layers, size in, size out), of those that are estimated."""
        self._model, self._modules = model, dict(modules)
        self._sums = jax.jit(self._trace)

    def __call__(
        self,
        tokens: np.ndarray,
        is_counted: np.ndarray,
        *,
        seed: int,
        learned: LoraTable | None = None,
    ) -> Fisher:
        """Sums over sequences [B, T] at the positions that count [B, T].

        `learned` is served below: the information is that of what is said with it.
        """
        factors = ({}, {}) if learned is None else (dict(learned.a), dict(learned.b))
        g, c = self._sums(self._model.weights, factors, tokens, is_counted, jax.random.key(seed))
        return Fisher(
            {m: np.asarray(each) for m, each in g.items()},
            {m: np.asarray(each) for m, each in c.items()},
            float(is_counted.sum()),
        )

    def _trace(
        self,
        weights: Any,
        learned: Factors,
        tokens: Int[Array, "B T"],
        is_counted: Bool[Array, "B T"],
        key: Array,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        batch = tokens.shape
        probes = {m: jnp.zeros((size[0], *batch, size[2])) for m, size in self._modules.items()}
        below = adapted_by(learned)

        def log_likelihood(probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            inputs: dict[str, list[Array]] = {m: [] for m in self._modules}

            def adapt(layer: int, x: Array, outputs: dict[str, Array]) -> tuple[Array, ...]:
                names = list(outputs)
                ys = dict(zip(names, below(layer, x, outputs), strict=True))
                for module in set(names) & set(self._modules):
                    square = jnp.where(is_counted[..., None], x.astype(jnp.float32) ** 2, 0.0)
                    inputs[module].append(square.sum(axis=(0, 1)))
                    ys[module] = ys[module] + probes[module][layer].astype(ys[module].dtype)
                return tuple(ys.values())

            hidden = self._model.hidden(weights, tokens, adapt, rematerialise=False)
            logits = self._model.logits(weights, hidden, adapt)
            labels = jax.random.categorical(key, jax.lax.stop_gradient(logits), axis=-1)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
            total = jnp.where(is_counted, chosen[..., 0], 0.0).sum()
            return total, {m: jnp.stack(each) for m, each in inputs.items()}

        deltas, c = jax.grad(log_likelihood, has_aux=True)(probes)
        return {m: (delta**2).sum(axis=(1, 2)) for m, delta in deltas.items()}, c
