"""The losses against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapters.objective import preference, soft_cross_entropy, thumbs

V = 50


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def drawn(seed, width=6):
    """Logits, and a teacher's likeliest tokens with the mass of the others."""
    rng = np.random.default_rng(seed)
    logits, teacher = rng.standard_normal((2, 3, V)) * 3
    wanted = softmax(teacher)
    ids = np.argsort(-wanted, axis=-1)[:, :width].astype(np.int32)
    top = np.take_along_axis(wanted, ids, axis=-1)
    return logits, ids, top, 1.0 - top.sum(axis=-1)


def as_written(logits, ids, top, rest):
    """The divergence of the outcomes: K tokens, and one for all others."""
    said = softmax(logits)
    picked = np.take_along_axis(said, ids, axis=-1)
    left = 1.0 - picked.sum(axis=-1)
    return (top * np.log(top / picked)).sum(axis=-1) + rest * np.log(rest / left)


@pytest.mark.parametrize("seed", range(5))
def test_targets_with_a_rest_are_a_divergence_of_outcomes(seed):
    logits, ids, top, rest = drawn(seed)
    given = jnp.asarray(ids)
    found = soft_cross_entropy(jnp.float32(logits), given, jnp.float32(top), jnp.float32(rest))
    np.testing.assert_allclose(found, as_written(logits, ids, top, rest), rtol=2e-5, atol=1e-6)


def test_one_token_is_its_negative_log_probability_and_padding_is_nothing():
    logits = drawn(1)[0]
    ids = jnp.array([[7, V, V], [8, V, V], [9, V, V]], jnp.int32)
    one = np.array([[1, 0, 0]] * 3, np.float32)
    found = soft_cross_entropy(jnp.float32(logits), ids, jnp.asarray(one), jnp.zeros(3))
    want = -np.log(softmax(logits)[[0, 1, 2], [7, 8, 9]])
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_it_is_zero_and_flat_where_the_teacher_is_met_and_its_gradient_is_that_of_the_outcomes():
    logits, ids, top, rest = drawn(2)
    own = softmax(logits)
    met = np.take_along_axis(own, ids, axis=-1)

    def total(x, top, rest):
        return soft_cross_entropy(x, jnp.asarray(ids), jnp.float32(top), jnp.float32(rest)).sum()

    left = 1 - met.sum(axis=-1)
    assert abs(float(total(jnp.float32(logits), met, left))) < 1e-5
    flat = jax.grad(total)(jnp.float32(logits), met, left)
    np.testing.assert_allclose(flat, 0, atol=1e-5)

    gradient = np.asarray(jax.grad(total)(jnp.float32(logits), top, rest))
    for place in [(0, int(ids[0, 0])), (1, 3), (2, 40)]:
        step = np.zeros_like(logits)
        step[place] = 1e-5
        ends = [as_written(logits + sign * step, ids, top, rest).sum() for sign in (1, -1)]
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_a_certain_model_and_a_certain_teacher_stay_finite():
    logits = np.full((1, V), -80.0, np.float32)
    logits[0, 3] = 80.0
    ids = jnp.array([[3, 4]], jnp.int32)
    loss, gradient = jax.value_and_grad(
        lambda x: soft_cross_entropy(x, ids, jnp.float32([[0.5, 0.2]]), jnp.float32([0.3])).sum()
    )(jnp.asarray(logits))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert gradient[0, 4] < 0 < gradient[0, 3]


def test_a_pair_is_half_decided_at_the_reference_and_learned_from_its_margin():
    same = jnp.array([-4.0])
    assert float(preference(same, same, same, same)[0]) == pytest.approx(np.log(2))
    # margin (-3 + 4) - (-6 + 5) = 2, beta 0.5
    rest = jnp.array([-5.0])
    loss = preference(jnp.array([-3.0]), jnp.array([-6.0]), same, rest, beta=0.5)
    assert float(loss[0]) == pytest.approx(np.log1p(np.exp(-1.0)))


def test_thumbs_pull_towards_the_good_away_from_the_bad_and_saturate():
    said, base = jnp.array([-2.0, -2.0]), jnp.array([-3.0, -3.0])
    good = jnp.array([True, False])
    point = 0.2 * 0.5
    want = [1 - 1 / (1 + np.exp(-(0.2 - point))), 1 - 1 / (1 + np.exp(0.2 - point))]
    found = thumbs(said, base, good, jnp.float32(0.5), beta=0.2)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    gradient = jax.grad(lambda x: thumbs(x, base, good, jnp.float32(0.5), beta=0.2).sum())(said)
    assert gradient[0] < 0 < gradient[1]
    far = jax.grad(lambda x: thumbs(x, base, good, jnp.float32(0.5), beta=0.2).sum())(said - 200)
    assert np.abs(far).max() < 1e-6  # what is already gone is not pushed any further
