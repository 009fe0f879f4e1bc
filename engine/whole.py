"""Whole sequences through the model at once, without a cache: what a gradient goes through."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engine.model import Decoder, LoadedModel
from engine.model.decoder import Adapt, causal_attend, unadapted


@dataclass(frozen=True, slots=True, eq=False)
class WholeSequences:
    """The served model as pure functions of its weights.

    The weights are an argument, so that a compiled gradient holds no copy of them. Sequences are
    filled up on the right: nothing before the filling sees it.
    """

    weights: tuple[Array, ...]
    graph: nnx.GraphDef
    tree: Any  # jax does not export the type of a tree structure

    def hidden(
        self,
        weights: tuple[Array, ...],
        tokens: Int[Array, "B T"],
        adapt: Adapt = unadapted,
        *,
        rematerialise: bool = True,
    ) -> Float[Array, "B T D"]:
        """Final hidden states. With `rematerialise` a layer's inside is computed again for the
        gradient instead of being kept (Chen 2016, arXiv:1604.06174, section 4)."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        wrap = jax.checkpoint if rematerialise else None
        return self._decoder(weights)(tokens, positions, causal_attend, adapt, wrap=wrap)

    def logits(
        self,
        weights: tuple[Array, ...],
        hidden: Float[Array, "*batch D"],
        adapt: Adapt = unadapted,
    ) -> Float[Array, "*batch V"]:
        """What the head says about states, before any head edit; float32."""
        return self._decoder(weights).logits(hidden, adapt)

    def _decoder(self, weights: tuple[Array, ...]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, weights))


def whole_sequences(model: LoadedModel) -> WholeSequences:
    """The functions of a loaded model; nothing is copied."""
    leaves, tree = jax.tree.flatten(model.params)
    return WholeSequences(tuple(leaves), model.graph, tree)
