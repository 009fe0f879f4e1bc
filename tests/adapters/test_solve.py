import itertools

import jax
import numpy as np
import pytest
from reference.head_edits import log_softmax, logit

from adapters import solve as solver
from adapters.solve import Problem, bucket_of, compile_buckets, num_compiled, solve

NEED = float(logit(0.99))


def problem(count, num_rows, *, shape=(32, 64), seed=0, junk=np.nan):
    """Random positions on random rows; everything past the counts is `junk`."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((count, 16)) + rng.standard_normal(16)

    def padded(array, sizes):
        full = np.full(sizes, junk, np.float32)
        full[tuple(slice(length) for length in array.shape)] = array
        return full

    return Problem(
        gram=padded(states @ states.T, (shape[0], shape[0])),
        logits=padded(rng.standard_normal((count, num_rows)) * 3 - 4, shape),
        num_rows=num_rows,
        rest=(rng.standard_normal(count) - 1).astype(np.float32),
        need=np.full(count, NEED, np.float32),
        argmax=rng.integers(0, 5, count).astype(np.int32),
        target=rng.integers(0, num_rows, count).astype(np.int32),
        is_convention=np.zeros(count, np.bool_),
        is_active=np.ones(count, np.bool_),
        is_first=np.zeros(count, np.bool_),
        weights=(2.0, 10.0, 30.0, 60.0),
    )


def served_probability(problem, coefficients, count, num_rows):
    """Float64 softmax over rows and rest, from the coefficients alone."""
    same = problem.argmax[:count, None] == problem.argmax[None, :count]
    kernel = problem.gram[:count, :count] + np.where(
        problem.is_convention[:count], problem.weights[1], problem.weights[0] * same
    )
    logits = problem.logits[:count, :num_rows] + kernel.astype(np.float64) @ coefficients[
        :count, :num_rows
    ].astype(np.float64)
    logprobs = log_softmax(np.concatenate([logits, problem.rest[:count, None]], axis=1))
    return np.exp(logprobs[np.arange(count), problem.target[:count]])


def zeros(shape=(32, 64)):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30], ids=["nan", "inf", "huge"])
def test_padding_may_hold_anything(junk):
    clean = solve(problem(9, 20, junk=0.0), zeros(), max_sweeps=50)
    warm = np.full((32, 64), junk, np.float32)
    warm[:9, :20] = 0.0
    dirty = solve(problem(9, 20, junk=junk), warm, max_sweeps=50)
    np.testing.assert_array_equal(dirty.coefficients[9:], 0)
    np.testing.assert_array_equal(dirty.coefficients[:, 20:], 0)
    assert np.isfinite(dirty.coefficients).all()
    np.testing.assert_array_equal(dirty.log_odds, clean.log_odds)


@pytest.mark.parametrize("num_conventions", [0, 4])
def test_everything_holds_after_the_sweeps(num_conventions):
    given = problem(12, 30)
    given.is_convention[:num_conventions] = True  # their kernel has no token part
    given.target[:num_conventions] = 7
    solution = solve(given, zeros(), max_sweeps=50)
    probability = served_probability(given, solution.coefficients, 12, 30)
    assert (probability >= 0.99 - 1e-5).all()  # float32 logits
    np.testing.assert_allclose(
        logit(probability.clip(1e-12, 1 - 1e-12)), solution.log_odds[:12], atol=1e-3
    )
    assert 0 < solution.num_sweeps < 50


@pytest.mark.parametrize("is_convention", [False, True])
def test_one_step_lands_on_the_aim(is_convention):
    given = problem(1, 30, seed=4)
    given.is_convention[0], given.is_first[0] = is_convention, True
    solution = solve(given, zeros(), max_sweeps=0)
    probability = served_probability(given, solution.coefficients, 1, 30)
    assert logit(probability[0]) == pytest.approx(NEED + solver.AIM_MARGIN, abs=1e-3)
    assert solution.num_steps == 1
    if is_convention:  # v = e_y: only the target's row moves
        assert np.count_nonzero(solution.coefficients) == 1


def test_only_first_positions_are_stepped_on_before_the_sweeps():
    given = problem(6, 20)
    first = np.zeros(len(given.need), np.bool_)
    first[3] = True
    solution = solve(given._replace(is_first=first), zeros(), max_sweeps=0)
    assert np.flatnonzero(solution.coefficients.any(1)).tolist() == [3]


def test_a_step_that_serves_a_twin_leaves_it_alone():
    given = problem(2, 20)
    given.gram[:2, :2] = given.gram[0, 0]
    given.argmax[1], given.target[1] = given.argmax[0], given.target[0]
    given.logits[1], given.rest[1] = given.logits[0], given.rest[0]
    given.need[1] += 0.5 * solver.AIM_MARGIN  # above it now, though not where a step would aim
    first = np.zeros(len(given.need), np.bool_)
    first[:2] = True
    solution = solve(given._replace(is_first=first), zeros(), max_sweeps=0)
    assert solution.num_steps == 1
    assert not solution.coefficients[1].any()


def test_what_holds_is_left_alone():
    given = problem(12, 30)
    once = solve(given, zeros(), max_sweeps=50)
    again = solve(given, once.coefficients, max_sweeps=50)
    np.testing.assert_array_equal(again.coefficients, once.coefficients)
    assert again.num_steps == 0


def test_a_pair_that_can_hardly_be_told_apart_takes_few_sweeps():
    # Keys of cosine 0.95 and two targets: 13 sweeps of plain steps.
    given = problem(2, 20)
    given.gram[:2, :2] = np.array([[1.0, 0.95], [0.95, 1.0]]) * given.gram[0, 0]
    given.argmax[:2], given.target[:2] = (3, 4), (4, 5)
    given.logits[1], given.rest[1] = given.logits[0], given.rest[0]
    solution = solve(given, zeros(), max_sweeps=100)
    assert (solution.log_odds[:2] >= NEED).all()
    assert solution.num_sweeps <= 8


def test_an_impossible_pair_stops_at_the_bound():
    # The same key and base token, two targets: no coefficients can serve both.
    given = problem(2, 20)
    gram = given.gram.copy()
    gram[:2, :2] = gram[0, 0]
    argmax, target = given.argmax.copy(), given.target.copy()
    argmax[:2], target[:2] = 3, (4, 5)
    given = given._replace(gram=gram, argmax=argmax, target=target)
    solution = solve(given, zeros(), max_sweeps=10_000)
    assert solution.num_sweeps < 200  # ended because nothing moved any more
    shift = np.abs(solution.coefficients[:2]) * (gram[0, 0] + given.weights[0])
    assert shift.max() <= 60.0 * (1 + 1e-5)
    assert (solution.log_odds[:2] < NEED).any()
    probability = served_probability(given, solution.coefficients, 2, 20)
    np.testing.assert_allclose(
        logit(probability.clip(1e-300, 1 - 1e-12)), solution.log_odds[:2], rtol=1e-3, atol=1e-2
    )


def test_no_feedback_compiles_anything_after_the_warm_up():
    compile_buckets(((32, 64), (128, 256)))
    before = num_compiled()
    for count, num_rows, shape in [(1, 3, (32, 64)), (32, 64, (32, 64)), (33, 65, (128, 256))]:
        for sweeps in (0, 7, 50):
            solve(problem(count, num_rows, shape=shape), zeros(shape), max_sweeps=sweeps)
    assert num_compiled() == before


def test_the_host_solves_where_an_accelerator_is_the_default(monkeypatch):
    given = problem(5, 20)
    want = solve(given, zeros(), max_sweeps=50)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    solver._hosts.cache_clear()
    try:
        assert [str(device) for device in solver._hosts()] == [str(jax.devices("cpu")[0])]
        got = solve(given, zeros(), max_sweeps=50)
    finally:
        solver._hosts.cache_clear()
    np.testing.assert_array_equal(got.coefficients, want.coefficients)


def test_bucket_of_is_the_smallest_that_fits():
    assert bucket_of(0, 0) == (32, 64)
    assert bucket_of(32, 64) == (32, 64)
    assert bucket_of(32, 65) == (32, 128)
    assert bucket_of(33, 1) == (64, 128)
    assert bucket_of(1, 257) == (256, 512)
    assert bucket_of(2048, 1024) == (2048, 1024)


def test_each_bucket_holds_the_one_before_it():
    for smaller, larger in itertools.pairwise(solver.BUCKETS):
        assert smaller[0] <= larger[0]
        assert smaller[1] <= larger[1]
