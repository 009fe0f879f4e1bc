"""The usual correction's first step: a few new edits on top of served logits that are known.

The same step as in `adapters.solve`, whose letters and formulas hold here, in NumPy and on the
host: it touches one row of logits per edit. A compiled call takes longer to hand its arguments to
another thread and to wake up again than all of this.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from adapters.base_rows import log_odds
from adapters.solve import AIM_MARGIN, FLOOR, NEWTON_STEPS, Problem, Solution

MAX_FIRST = 4  # edits; beyond, the compiled program takes no longer


def first_steps(
    problem: Problem, warm: Float[np.ndarray, "PN PJ"], served: Float[np.ndarray, "PN PJ"]
) -> Solution:
    """What `solve` gives without sweeps, from the served logits instead of the base's.

    Args:
      problem: `is_first` names positions without coefficients.
      warm: coefficients of the others, zero past N, J.
      served: logits with them; FLOOR past N, J. Written over: the solution's is this array.
    """
    count, num_rows = len(problem.need), problem.num_rows
    edits = np.flatnonzero(problem.is_first & problem.is_active)
    columns = _kernel_columns(problem, edits)
    coefficients, rows, num_steps = warm.copy(), served[:count, :num_rows], 0
    for column, j in zip(columns, edits.tolist(), strict=True):
        change = _change(problem, j, rows[j], float(column[j]))
        if change is not None:
            coefficients[j, :num_rows] = change
            rows += column[:, None] * change
            num_steps += 1
    odds = log_odds(rows, problem.rest, problem.target)
    return Solution(coefficients, served, odds, 0, num_steps)


def _kernel_columns(problem: Problem, edits: Int[np.ndarray, " P"]) -> Float[np.ndarray, "P N"]:
    """K of all positions with each edit, zero where inactive."""
    count = len(problem.need)
    token_weight, const_weight = problem.weights[:2]
    token = token_weight * (problem.argmax[edits][:, None] == problem.argmax)
    extra = np.where(problem.is_convention[edits][:, None], const_weight, token)
    return ((problem.gram[edits, :count] + extra) * problem.is_active).astype(np.float32)


def _change(
    problem: Problem, j: int, row: Float[np.ndarray, " J"], own: float
) -> Float[np.ndarray, " J"] | None:
    """What the step adds to position j's coefficients; None when it holds already."""
    max_step, max_shift = problem.weights[2:]
    target, log_rest, need = int(problem.target[j]), float(problem.rest[j]), float(problem.need[j])
    mass = row.copy()
    mass[target] = FLOOR
    peak = max(float(mass.max()), log_rest)
    np.exp(mass - np.float32(peak), out=mass)  # of the rivals, relative to the strongest
    rest, lead = math.exp(log_rest - peak), float(row[target]) - peak
    total = float(mass.sum()) + rest
    odds = lead - math.log(total)
    if odds >= need:
        return None
    aim = need + AIM_MARGIN
    if problem.is_convention[j]:
        direction, tau = np.zeros_like(row), min(aim - odds, max_step)
    else:
        direction = mass / np.float32(-total)
        tau = _tau(mass, direction, (rest, lead), aim, max_step)
    direction[target] = 1.0
    direction *= np.float32(min(tau, max_shift) / own)
    return direction


def _tau(
    mass: Float[np.ndarray, " J"],
    direction: Float[np.ndarray, " J"],
    rest_and_lead: tuple[float, float],
    aim: float,
    max_step: float,
) -> float:
    """How far along `direction` the log-odds reach `aim`, in [0, max_step]. Newton from below."""
    (rest, lead), tau = rest_and_lead, 0.0
    for _ in range(NEWTON_STEPS):
        moved = mass * np.exp(np.float32(tau) * direction)
        total = float(moved.sum()) + rest
        gap = aim - (lead + tau - math.log(total))
        slope = 1.0 - float(moved @ direction) / total
        tau = min(max(tau + gap / slope, 0.0), max_step)
    return tau
