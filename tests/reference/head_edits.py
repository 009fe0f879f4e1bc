"""Head edits by the book: whole vocabulary, float64, loops, bisection. Slow and plain.

Also a small world of hidden states to learn in: anisotropic directions with a 1/k spectrum, states
that mix a common mean, a topic, an entity, the token the base is about to say, and noise.
"""

from dataclasses import dataclass

import numpy as np


def log_softmax(logits):
    """Over the last axis."""
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def logit(probability):
    return np.log(probability / (1.0 - probability))


class World:
    """Hidden states [n, dim] and a head [vocab, dim] of a base model that is sure of itself."""

    def __init__(self, *, dim=48, vocab=300, seed=0, sharpness=2.0, noise=0.10):
        self.rng = np.random.default_rng(seed)
        self.dim, self.vocab = dim, vocab
        self.turn = np.linalg.qr(self.rng.standard_normal((dim, dim)))[0]
        spectrum = 1.0 / np.arange(1, dim + 1)
        self.scale = np.sqrt(spectrum / spectrum.sum())
        mean = self.rng.standard_normal(dim)
        self.mean = mean / np.linalg.norm(mean)
        self.head = self.rng.standard_normal((vocab, dim)) / np.sqrt(dim) * sharpness
        self.share = np.sqrt([0.35, 0.25, 0.15, noise])
        self.answer_share = 6.2 / np.sqrt(dim)

    def draw(self, count):
        """Directions [count, dim] with the world's spectrum."""
        return (self.rng.standard_normal((count, self.dim)) * self.scale) @ self.turn.T

    def states(self, topics, entities, answers):
        """States about `entities` [n, dim] at which the base says `answers` [n]."""
        said = self.head[answers]
        said = said / np.linalg.norm(said, axis=1, keepdims=True)
        parts = self.share[0] * self.mean + self.share[1] * topics + self.share[2] * entities
        mixed = parts + self.answer_share * said + self.share[3] * self.draw(len(entities))
        return mixed / np.sqrt((mixed * mixed).mean(1, keepdims=True))

    def generic(self, count):
        """States of unrelated prompts."""
        answers = self.rng.integers(0, self.vocab, count)
        return self.states(self.draw(count), self.draw(count), answers)


def key_metric(hidden, rank=None):
    """M = (C + tr C / D I)^-1, the spectrum beyond `rank` at its mean; and the mean of h^T M h."""
    dim = hidden.shape[1]
    covariance = hidden.T @ hidden / len(hidden)
    energy, directions = np.linalg.eigh(covariance)
    if rank is not None and rank < dim:
        energy = energy.copy()
        energy[: dim - rank] = energy[: dim - rank].mean()
    ridge = np.trace(covariance) / dim
    metric = directions @ np.diag(1.0 / (energy + ridge)) @ directions.T
    return metric, float(np.einsum("nd,de,ne->n", hidden, metric, hidden).mean())


@dataclass
class Edit:
    hidden: np.ndarray  # [dim]
    target: int
    convention: bool = False
    need: float = 0.99  # probability at which it holds


class Solver:
    """Edits on the rows `rows`, full-vocabulary softmax everywhere."""

    def __init__(self, head, metric, mean_norm, edits, rows, *, token=0.3, const=1.0):
        self.head, self.metric, self.edits = head, metric, edits
        self.token, self.const = token * mean_norm, const * mean_norm
        self.is_row = np.zeros(len(head), bool)
        self.is_row[np.asarray(rows)] = True
        self.values = np.zeros((len(edits), len(head)))  # a_j on the whole vocabulary

    def kernel(self, hidden, edit):
        extra = self.token * (np.argmax(self.head @ hidden) == np.argmax(self.head @ edit.hidden))
        return hidden @ self.metric @ edit.hidden + (self.const if edit.convention else extra)

    def served(self, hidden):
        """Served log-probabilities [vocab] at one state."""
        logits = self.head @ hidden
        for edit, value in zip(self.edits, self.values, strict=True):
            if value.any():
                logits = logits + self.kernel(hidden, edit) * value
        return log_softmax(logits)

    def probability(self, index):
        edit = self.edits[index]
        return float(np.exp(self.served(edit.hidden)[edit.target]))

    def direction(self, index):
        """v: e_y for a convention, else e_y - p on the rows, scaled to 1 at y."""
        edit = self.edits[index]
        value = np.zeros(len(self.head))
        if not edit.convention:
            served = np.exp(self.served(edit.hidden))
            value[self.is_row] = -served[self.is_row]
            value /= 1.0 - served[edit.target]
        value[edit.target] = 1.0
        return value

    def step(self, index, *, margin=0.1, largest=30.0):
        """One step on an edit that does not hold, by bisection to its need plus the margin."""
        edit = self.edits[index]
        if self.probability(index) >= edit.need:
            return False
        aim = 1.0 / (1.0 + np.exp(-(logit(edit.need) + margin)))
        value, logits = self.direction(index), self.served(edit.hidden)
        low, high = 0.0, largest
        for _ in range(60):
            middle = 0.5 * (low + high)
            reached = np.exp(log_softmax(logits + middle * value)[edit.target])
            low, high = (middle, high) if reached < aim else (low, middle)
        self.values[index] += high * value / self.kernel(edit.hidden, edit)
        return True

    def sweep(self, limit=50):
        """Step on every failing edit in turn until none fails."""
        for count in range(limit):
            if not any([self.step(index) for index in range(len(self.edits))]):
                return count
        return limit
