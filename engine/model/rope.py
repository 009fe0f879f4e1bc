"""Rotary position embedding (Su 2021, arXiv:2104.09864), in the half-split form of Llama."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engine.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular step per position and channel pair, [H / 2] float32.

    Llama 3.1 stretches the long wavelengths by `factor`, keeps the short ones and blends
    between (Llama team 2024, arXiv:2407.21783, section 3.4.2 and the released config).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_len * frequencies / (2 * np.pi)  # over the trained context
        blend = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
        frequencies = frequencies * (blend + (1 - blend) / scaling.factor)
    return frequencies.astype(np.float32)


def rotate(
    x: Float[Array, "B T X H"], positions: Int[Array, "B T"], frequencies: Float[Array, " H2"]
) -> Float[Array, "B T X H"]:
    """Rotate channel pairs (i, i + H/2) by position * frequency. Angles and sums in float32."""
    angle_BT1F = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
