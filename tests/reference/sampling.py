"""The distribution that sampling settings ask for, in float64, by sorting."""

import numpy as np


def distribution(logits, params, *, prompt=(), answer=(), allowed=None, stop_ids=()):
    """Probabilities [V] of the next token after `answer`, for logits [V]."""
    x = np.array(logits, np.float64)
    if allowed is not None:
        x[np.setdiff1d(np.arange(len(x)), list(allowed))] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(answer) < params.min_tokens:
        x[list(stop_ids)] = -np.inf
    x = _penalised(x, params, prompt, answer)
    if not params.temperature:
        return np.eye(len(x))[x.argmax()]
    order = np.argsort(-x, kind="stable")
    scaled = x / params.temperature
    kept = order[: params.top_k] if params.top_k else order
    weights = np.exp(scaled[kept] - scaled[kept].max())
    weights /= weights.sum()
    kept = kept[: np.searchsorted(np.cumsum(weights), params.top_p - 1e-9) + 1]
    weights = weights[: len(kept)]
    likely = weights >= params.min_p * weights.max()
    out = np.zeros(len(x))
    out[kept[likely]] = weights[likely] / weights[likely].sum()
    return out


def _penalised(x, params, prompt, answer):
    counts = np.bincount(np.array(answer, int), minlength=len(x))
    seen = counts > 0
    seen[list(prompt)] = True
    x = np.where(
        seen, np.where(x > 0, x / params.repetition_penalty, x * params.repetition_penalty), x
    )
    return x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
