"""What inner LoRAs are trained for. Every function is a loss of the served model, per row.

soft_cross_entropy   corrections, distillation, replay: targets with the mass of what is left
preference           pairs, against a reference (Rafailov 2023, arXiv:2305.18290, equation 7)
thumbs               single answers, good or bad (Ethayarajh 2024, arXiv:2402.01306, section 4)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LEAST_REST = -30.0  # log-mass outside the targets: below it a float32 sum cannot tell it from 0


def soft_cross_entropy(
    logits: Float[Array, "*batch V"],
    ids: Int[Array, "*batch K"],
    probabilities: Float[Array, "*batch K"],
    rest: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """KL divergence of what is said from the target, in nats: 0 where they agree.

    The target is K tokens and the mass of all others as one more outcome; ids of V are padding.
    What the model gives to the others is the log-sum-exp outside the K, never a difference of
    masses, which is wrong by rounding where the K have nearly all.
    """
    vocab_size = logits.shape[-1]
    total = jax.nn.logsumexp(logits, axis=-1)
    is_given = ids < vocab_size
    picked = jnp.take_along_axis(logits, jnp.minimum(ids, vocab_size - 1), axis=-1)
    log_said = picked - total[..., None]
    flat_ids = ids.reshape(-1, ids.shape[-1])
    flat = logits.reshape(-1, vocab_size)
    rows = jnp.arange(len(flat))[:, None]
    outside = flat.at[rows, flat_ids].set(-jnp.inf, mode="drop").reshape(logits.shape)
    log_rest = jnp.maximum(jax.nn.logsumexp(outside, axis=-1) - total, _LEAST_REST)
    per_token = _divergence(probabilities, jnp.where(is_given, log_said, 0.0))
    return per_token.sum(axis=-1) + _divergence(rest, log_rest)


def _divergence(wanted: Array, log_said: Array) -> Array:
    """wanted * (log wanted - log said), 0 where nothing is wanted."""
    is_wanted = wanted > 0
    safe = jnp.where(is_wanted, wanted, 1.0)
    return jnp.where(is_wanted, wanted * (jnp.log(safe) - log_said), 0.0)


def preference(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    base_chosen: Float[Array, " B"],
    base_rejected: Float[Array, " B"],
    *,
    beta: float = 0.1,
) -> Float[Array, " B"]:
    """DPO loss of pairs; the arguments are log-probabilities of whole answers."""
    margin = (chosen - base_chosen) - (rejected - base_rejected)
    return -jax.nn.log_sigmoid(beta * margin)


def thumbs(
    said: Float[Array, " B"],
    base_said: Float[Array, " B"],
    is_good: Bool[Array, " B"],
    divergence: Float[Array, ""],
    *,
    beta: float = 0.1,
) -> Float[Array, " B"]:
    """KTO loss of single answers, good and bad ones weighted alike.

    `divergence` is an estimate of KL(now || base) on answers to other prompts, in nats; no gradient
    goes through it. The reference point is beta times it.
    """
    point = beta * jax.lax.stop_gradient(jnp.maximum(divergence, 0.0))
    reward = beta * (said - base_said)
    signed = jnp.where(is_good, reward - point, point - reward)
    return 1.0 - jax.nn.sigmoid(signed)
