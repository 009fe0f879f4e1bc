"""The Fisher estimate against the exact information of a small softmax model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapters.fisher import Fisher, FisherEstimate
from engine import LoraTable

V, D, Y = 7, 4, 3


class Softmax:
    """Embedding, one linear module, a head: all of it written out."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.embedding = rng.standard_normal((V, D)).astype(np.float32)
        self.linear = rng.standard_normal((D, Y)).astype(np.float32) * 0.5
        self.head = rng.standard_normal((Y, V)).astype(np.float32)

    @property
    def weights(self):
        return (self.embedding, self.linear, self.head)

    def hidden(self, weights, tokens, adapt, *, rematerialise):
        x = weights[0][tokens]
        return adapt(0, x, {"m": x @ weights[1]})[0]

    def logits(self, weights, hidden, adapt):
        return hidden @ weights[2]

    def exact(self, tokens, counted):
        """Sums of E[delta^2] over labels of the model's own, and of x^2."""
        x = self.embedding[tokens][counted].astype(np.float64)
        logits = x @ self.linear @ self.head
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        g = np.zeros(Y)
        for label in range(V):
            delta = (np.eye(V)[label] - p) @ self.head.T
            g += (p[:, label, None] * delta**2).sum(axis=0)
        return g, (x**2).sum(axis=0)


def test_factors_are_the_exact_ones_in_the_mean_over_labels():
    model = Softmax(0)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (2, 6)).astype(np.int32)
    counted = np.ones((2, 6), bool)
    counted[1, 3:] = False
    estimate = FisherEstimate(model, {"m": (1, D, Y)})
    draws = [estimate(tokens, counted, seed=seed) for seed in range(600)]
    g, c = model.exact(tokens, counted)
    np.testing.assert_allclose(draws[0].c["m"][0], c, rtol=1e-5)
    mean = np.mean([draw.g["m"][0] for draw in draws], axis=0)
    np.testing.assert_allclose(mean, g, rtol=0.1)
    assert draws[0].count == 9


def test_labels_of_the_data_would_be_another_thing():
    """A model that is sure and wrong has large empirical gradients and hardly any information."""
    model = Softmax(0)
    model.head *= 40
    tokens = np.arange(6, dtype=np.int32)[None]
    found = FisherEstimate(model, {"m": (1, D, Y)})(tokens, np.ones((1, 6), bool), seed=0)

    def of_data(w):
        logits = model.embedding[tokens[0, :-1]] @ w @ model.head
        return jax.nn.log_softmax(logits)[jnp.arange(5), tokens[0, 1:]].sum()

    empirical = np.asarray(jax.grad(of_data)(jnp.asarray(model.linear))) ** 2
    assert found.g["m"].sum() * found.c["m"].mean() < 0.1 * empirical.sum()


def test_what_runs_below_is_part_of_the_model():
    model = Softmax(2)
    rng = np.random.default_rng(3)
    table = LoraTable(
        {"m": rng.standard_normal((1, 2, D)).astype(np.float32)},
        {"m": rng.standard_normal((1, 2, Y)).astype(np.float32)},
    )
    tokens = rng.integers(0, V, (1, 6)).astype(np.int32)
    counted = np.ones((1, 6), bool)
    below = FisherEstimate(model, {"m": (1, D, Y)})(tokens, counted, seed=0, learned=table)
    model.linear = model.linear + table.a["m"][0].T @ table.b["m"][0]
    merged = FisherEstimate(model, {"m": (1, D, Y)})(tokens, counted, seed=0)
    np.testing.assert_allclose(below.g["m"], merged.g["m"], rtol=1e-3)


def test_normalised_is_1_on_average_and_no_row_is_free():
    rng = np.random.default_rng(4)
    g = {m: rng.random((2, 5)).astype(np.float32) for m in "ab"}
    c = {m: rng.random((2, 9)).astype(np.float32) for m in "ab"}
    g["a"][0, 3] = 0.0
    scaled = Fisher(g, c, 30.0).normalised()
    mean = np.mean([np.einsum("LY,LX->LYX", scaled.g[m], scaled.c[m]) for m in "ab"])
    assert mean == pytest.approx(1.0, rel=1e-5)
    assert scaled.g["a"][0, 3] > 0


def test_a_running_sum_forgets_by_its_decay():
    one = Fisher({"m": np.ones((1, 2))}, {"m": np.full((1, 3), 2.0)}, 10.0)
    two = one.plus(one, decay=0.5)
    assert (two.g["m"][0, 0], two.c["m"][0, 0], two.count) == (1.5, 3.0, 15.0)
