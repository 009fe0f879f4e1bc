"""First steps against float64 sums over the whole kernel, and against the compiled program."""

import numpy as np
import pytest
from reference.head_edits import log_softmax, logit

from adapters.first_steps import first_steps
from adapters.solve import AIM_MARGIN, FLOOR, Problem, solve

NEED = float(logit(0.99))
COUNT, ROWS, SHAPE = 11, 24, (32, 64)


def kernel(problem):
    """K in float64, one column per edit."""
    same = problem.argmax[:, None] == problem.argmax[None, :]
    token, const = problem.weights[:2]
    form = np.where(problem.is_convention[None, :], const, token * same)
    return problem.gram[:COUNT, :COUNT].astype(np.float64) + form


def served(problem, coefficients):
    """Served logits [N, J] in float64, from the base's."""
    base = problem.logits[:COUNT, :ROWS].astype(np.float64)
    return base + kernel(problem) @ coefficients[:COUNT, :ROWS].astype(np.float64)


def odds(problem, coefficients):
    """Log-odds of each position's target, by a softmax over rows and rest."""
    logits = np.concatenate([served(problem, coefficients), problem.rest[:, None]], axis=1)
    own = np.exp(log_softmax(logits)[np.arange(COUNT), problem.target])
    return logit(own)


def padded(array, junk):
    full = np.full(SHAPE if array.shape[1] == ROWS else (SHAPE[0],) * 2, junk, np.float32)
    full[: array.shape[0], : array.shape[1]] = array
    return full


def taught(seed=0):
    """Seven positions with random coefficients, four to come; everything past them is junk."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((COUNT, 16)) + rng.standard_normal(16)
    problem = Problem(
        gram=padded(states @ states.T, np.nan),
        logits=padded(rng.standard_normal((COUNT, ROWS)) * 3 - 4, np.nan),
        num_rows=ROWS,
        rest=(rng.standard_normal(COUNT) - 1).astype(np.float32),
        need=np.full(COUNT, NEED, np.float32),
        argmax=rng.integers(0, 3, COUNT).astype(np.int32),
        target=rng.integers(0, ROWS, COUNT).astype(np.int32),
        is_convention=np.arange(COUNT) % 3 == 0,
        is_active=np.ones(COUNT, np.bool_),
        is_first=np.arange(COUNT) >= 7,
        weights=(2.0, 10.0, 30.0, 60.0),
    )
    coefficients = np.zeros(SHAPE, np.float32)
    coefficients[:7, :ROWS] = rng.standard_normal((7, ROWS)) * 0.05
    return problem, coefficients


def stepped(problem, coefficients):
    return first_steps(problem, coefficients, padded(served(problem, coefficients), FLOOR))


def test_what_it_reports_is_what_the_coefficients_give():
    problem, coefficients = taught()
    solution = stepped(problem, coefficients)
    np.testing.assert_allclose(
        solution.served[:COUNT, :ROWS], served(problem, solution.coefficients), atol=1e-4
    )
    np.testing.assert_allclose(solution.log_odds, odds(problem, solution.coefficients), atol=1e-3)
    assert (solution.served[COUNT:] == FLOOR).all()
    assert not solution.coefficients[COUNT:].any()
    np.testing.assert_array_equal(solution.coefficients[:7], coefficients[:7])


@pytest.mark.parametrize("seed", range(4))
def test_the_last_edit_lands_on_the_aim(seed):
    problem, coefficients = taught(seed)
    solution = stepped(problem, coefficients)
    assert odds(problem, solution.coefficients)[-1] == pytest.approx(NEED + AIM_MARGIN, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_the_compiled_program(seed):
    problem, coefficients = taught(seed)
    want = solve(problem, coefficients, max_sweeps=0)
    got = stepped(problem, coefficients)
    np.testing.assert_allclose(got.coefficients, want.coefficients, atol=2e-5)
    np.testing.assert_allclose(got.log_odds, want.log_odds, atol=1e-3)
    assert got.num_steps == want.num_steps == 4


def test_what_holds_or_is_inactive_is_left_alone():
    problem, coefficients = taught()
    problem.need[8] = -100.0
    problem.is_active[9] = False
    solution = stepped(problem, coefficients)
    assert np.flatnonzero(solution.coefficients.any(1)).tolist() == [*range(7), 7, 10]
    assert solution.num_steps == 2


def test_a_step_is_no_longer_than_allowed():
    problem, coefficients = taught()
    problem = problem._replace(weights=(2.0, 10.0, 0.5, 60.0))
    solution = stepped(problem, coefficients)
    own = np.diagonal(kernel(problem))[7:]
    steps = solution.coefficients[np.arange(7, COUNT), problem.target[7:]] * own
    np.testing.assert_allclose(steps, 0.5, rtol=1e-5)
