"""The dense decoder of Llama, Qwen2 and Qwen3, as flax.nnx modules.

The module holds weights and the order of operations. How queries meet keys is the caller's
business: `attend` closes over a paged pool when serving and over nothing when training, so one
definition of the model serves both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engine.model.config import ModelConfig
from engine.model.rope import inverse_frequencies, rotate

Attend = Callable[[int, Array, Array, Array], Array]
"""(layer, q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> [B,T,N,H]; k and v are this call's tokens."""
Adapt = Callable[[int, Array, dict[str, Array]], tuple[Array, ...]]
"""(layer, x, outputs by module) -> outputs: what LoRAs make of the linear modules that read x."""


Wrap = Callable[[Callable[[Array], Array]], Callable[[Array], Array]]
"""Another function that computes the same."""


def unadapted(_layer: int, _x: Array, outputs: dict[str, Array]) -> tuple[Array, ...]:
    """The base model."""
    return tuple(outputs.values())


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang 2019, arXiv:1910.07467, section 4). Sums run in float32."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (wide * scale * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias), kernel [in, out]."""

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        draw = jax.random.normal(rngs.params(), (size_in, size_out), jnp.float32)
        self.kernel = nnx.Param((draw * size_in**-0.5).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*batch X"]) -> Float[Array, "*batch Y"]:
        out = x @ self.kernel[...]
        if self.bias is not None:
            out = out + self.bias[...].reshape((1,) * (out.ndim - 1) + (-1,))
        return out


class Attention(nnx.Module):
    """Projections, optional per-head norms, rotary positions; `attend` does the rest."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        kind = {"dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias, **kind)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias, **kind)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias, **kind)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.out_bias, **kind)
        norm = (config.head_dim, config.rms_eps)
        self.q_norm = RMSNorm(*norm, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm, dtype=dtype) if config.qk_norm else None
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        frequencies: Float[Array, " H2"],
        layer: int,
        attend: Attend,
        adapt: Adapt,
    ) -> Float[Array, "B T D"]:
        split = (*x.shape[:2], -1, self.head_dim)
        outputs = {"q_proj": self.q_proj(x), "k_proj": self.k_proj(x), "v_proj": self.v_proj(x)}
        q, k, v = (y.reshape(split) for y in adapt(layer, x, outputs))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        out = attend(layer, q, k, v).reshape(*x.shape[:2], -1)
        return adapt(layer, out, {"o_proj": self.o_proj(out)})[0]


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        kind = {"bias": config.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, **kind)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, **kind)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, **kind)

    def __call__(self, x: Float[Array, "B T D"], layer: int, adapt: Adapt) -> Float[Array, "B T D"]:
        outputs = {"gate_proj": self.gate_proj(x), "up_proj": self.up_proj(x)}
        gate, up = adapt(layer, x, outputs)
        inner = jax.nn.silu(gate) * up
        return adapt(layer, inner, {"down_proj": self.down_proj(inner)})[0]


class Layer(nnx.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.input_norm = RMSNorm(config.hidden_size, config.rms_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


class Decoder(nnx.Module):
    """Token ids to final hidden states; `logits` reads the head."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            (jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02).astype(dtype)
        )
        self.layers = nnx.List(
            [Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_eps, dtype=dtype)
        if config.tied_embeddings:
            self.head = None
        else:
            kind = {"bias": False, "dtype": dtype, "rngs": rngs}
            self.head = Linear(config.hidden_size, config.vocab_size, **kind)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        adapt: Adapt = unadapted,
        *,
        wrap: Wrap | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, after the last norm: what the head reads.

        Token ids must lie in [0, V). Positions are absolute and set the rotary angle. `wrap` may
        make something else of a layer's function, for what is kept for its gradient.
        """
        frequencies = jnp.asarray(inverse_frequencies(self.config))
        x = self.embedding[...][tokens]
        for index, layer in enumerate(self.layers):

            def through(x: Array, layer: Layer = layer, index: int = index) -> Array:
                normed = layer.input_norm(x)
                x = x + layer.attention(normed, positions, frequencies, index, attend, adapt)
                return x + layer.mlp(layer.mlp_norm(x), index, adapt)

            x = (wrap(through) if wrap else through)(x)
        return self.norm(x)

    def logits(
        self, hidden: Float[Array, "*batch D"], adapt: Adapt = unadapted
    ) -> Float[Array, "*batch V"]:
        """Base logits in float32. Tied embeddings are read, never changed, by the head."""
        if self.head is not None:
            out = self.head(hidden)
        else:
            out = jnp.einsum("...d,vd->...v", hidden, self.embedding[...])
        return adapt(0, hidden, {"lm_head": out})[0].astype(jnp.float32)


def causal_attend(_layer: int, q: Array, k: Array, v: Array) -> Array:
    """Attention of a whole sequence to itself, without a cache: what training uses."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
