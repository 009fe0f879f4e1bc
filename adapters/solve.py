"""The compiled solver: one step per edit, then replay sweeps until every position holds.

Letters: N positions, J rows, both padded to a bucket. One program per bucket; what is really
there travels as masks and counts, so no feedback ever compiles anything.

A position j with target y holds while its log-odds o_j = z'_y - logsumexp(all other z') reach
need_j. A step on a position that does not adds tau * v_j to its logits, by way of its key:
row v of every position i moves by K_ij tau v_j / K_jj.

  relabel     v = e_y - q, with q the served softmax over the tokens other than y: the direction
              e_y - p scaled so that v_y = 1
  convention  v = e_y, whose tau = need - o_j is exact

tau solves o_j(tau) = need_j + margin. -o_j is a log-sum-exp of lines in tau less a line, thus
convex, with a slope between -2 and -1: Newton's method from 0 approaches from below and cannot
overshoot, where a bisection would take 18 halvings.

Two positions with similar keys and different targets push each other below their needs in turn,
and approach them only geometrically. So a sweep steps half as far again as tau (successive
over-relaxation, at most 2 nats more): half the steps, and the same figures on unseen positions.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Padded [N, J]; each holds the one before it, so that a growing pattern moves to the right only.
BUCKETS = (
    (32, 64), (32, 128), (64, 128), (64, 256),
    (128, 256), (256, 512), (512, 1024), (1024, 1024), (2048, 1024),
)  # fmt: skip
MAX_POSITIONS, MAX_ROWS = BUCKETS[-1]

# Log-odds aimed at beyond the need, so that a sweep ends strictly inside instead of creeping up
# to the bound; 0.2 nat is p' = 0.992 for p* = 0.99.
AIM_MARGIN = 0.2
NEWTON_STEPS = 4  # error below 1e-6 nat from 40 nats away
_EXCESS, _MAX_EXCESS = 0.5, 2.0  # of tau; nats
_LEAST_STEP = 1e-3  # nats; a position at its bound moves less and no longer keeps a sweep going
FLOOR = -1e30  # finite stand-in for -inf


class Problem(NamedTuple):
    """What the solver reads. The matrices are padded to a bucket; past N, J they may hold anything,
    even NaN."""

    gram: Float[np.ndarray, "PN PN"]  # h_i^T M h_j
    logits: Float[np.ndarray, "PN PJ"]  # base, relative to the base log-sum-exp
    num_rows: int  # J
    rest: Float[np.ndarray, " N"]  # log of the base mass outside the rows
    need: Float[np.ndarray, " N"]  # log-odds at which a position holds
    argmax: Int[np.ndarray, " N"]  # base argmax token
    target: Int[np.ndarray, " N"]  # row of the right token, in [0, J)
    is_convention: Bool[np.ndarray, " N"]
    is_active: Bool[np.ndarray, " N"]
    is_first: Bool[np.ndarray, " N"]  # stepped on before the sweeps
    weights: tuple[float, float, float, float]  # token, in-gate feature; max_step, max_shift


class Solution(NamedTuple):
    """What the solver found. Coefficients are zero past N, J and where nobody stepped."""

    coefficients: Float[np.ndarray, "PN PJ"]
    served: Float[np.ndarray, "PN PJ"]  # logits with them; FLOOR past N, J and where inactive
    log_odds: Float[np.ndarray, " N"]
    num_sweeps: int
    num_steps: int


class _Traced(NamedTuple):
    """A problem inside the program: padded, with inactive positions made harmless."""

    kernel: Float[Array, "N N"]  # K_ij, zero unless both are active
    rest: Float[Array, " N"]
    need: Float[Array, " N"]
    target: Int[Array, " N"]
    is_convention: Bool[Array, " N"]
    is_active: Bool[Array, " N"]
    max_step: Float[Array, ""]
    max_shift: Float[Array, ""]


class _Rivals(NamedTuple):
    """One position's tokens other than its target, relative to the strongest of them."""

    mass: Float[Array, " J"]  # zero at the target
    rest: Float[Array, ""]
    lead: Float[Array, ""]  # logit of the target
    is_target: Bool[Array, " J"]


class _State(NamedTuple):
    coefficients: Float[Array, "N J"]
    logits: Float[Array, "N J"]  # served


def _log_odds(
    logits: Float[Array, "N J"], rest: Float[Array, " N"], target: Int[Array, " N"]
) -> Float[Array, " N"]:
    is_target = jnp.arange(logits.shape[1])[None, :] == target[:, None]
    others = jnp.where(is_target, FLOOR, logits)
    peak = jnp.maximum(others.max(axis=1), rest)
    total = jnp.exp(others - peak[:, None]).sum(axis=1) + jnp.exp(rest - peak)
    own = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return own - peak - jnp.log(total)


def _rivals(row: Float[Array, " J"], rest: Float[Array, ""], target: Int[Array, ""]) -> _Rivals:
    is_target = jnp.arange(row.shape[0]) == target
    others = jnp.where(is_target, FLOOR, row)
    peak = jnp.maximum(others.max(), rest)
    return _Rivals(jnp.exp(others - peak), jnp.exp(rest - peak), row[target] - peak, is_target)


def _tau(
    rivals: _Rivals,
    direction: Float[Array, " J"],
    aim: Float[Array, ""],
    max_step: Float[Array, ""],
) -> Float[Array, ""]:
    """How far along `direction` the log-odds reach `aim`, in [0, max_step]. Newton from below."""
    tau = jnp.float32(0)
    for _ in range(NEWTON_STEPS):
        moved = rivals.mass * jnp.exp(tau * direction)
        total = moved.sum() + rivals.rest
        gap = aim - (rivals.lead + tau - jnp.log(total))
        slope = jnp.float32(1) - (moved * direction).sum() / total
        tau = jnp.clip(tau + gap / slope, 0, max_step)
    return tau


def _step(
    problem: _Traced, j: Int[Array, ""], state: _State, excess: float
) -> tuple[_State, Int[Array, ""]]:
    """Move position j to its need, if it does not hold. Returns whether it moved as well."""
    target, need, own = problem.target[j], problem.need[j], problem.kernel[j, j]
    rivals = _rivals(state.logits[j], problem.rest[j], target)
    total = rivals.mass.sum() + rivals.rest
    push = jnp.where(problem.is_convention[j], jnp.float32(0), -rivals.mass / total)
    direction = jnp.where(rivals.is_target, jnp.float32(1), push)
    tau = _tau(rivals, direction, need + AIM_MARGIN, problem.max_step)
    tau = tau + jnp.minimum(excess * tau, _MAX_EXCESS)

    reached = state.coefficients[j, target] * own
    tau = jnp.minimum(tau, jnp.maximum(problem.max_shift - reached, jnp.float32(0)))
    holds = rivals.lead - jnp.log(total) >= need
    tau = jnp.where(holds, jnp.float32(0), tau)
    change = tau / own * direction  # no other row moves further than the target's
    logits = state.logits + problem.kernel[:, j][:, None] * change[None, :]
    has_moved = tau > jnp.float32(_LEAST_STEP)
    return _State(state.coefficients.at[j].add(change), logits), has_moved.astype(jnp.int32)


def _pass(
    problem: _Traced, candidates: Bool[Array, " N"], state: _State, excess: float
) -> tuple[_State, Int[Array, ""]]:
    """One step on each candidate that does not hold by then, in order; and how many moved."""
    order = jnp.argsort(~candidates, stable=True)

    def body(
        k: Int[Array, ""], carry: tuple[_State, Int[Array, ""]]
    ) -> tuple[_State, Int[Array, ""]]:
        inner, count = carry
        inner, moved = _step(problem, order[k], inner, excess)
        return inner, count + moved

    return jax.lax.fori_loop(0, candidates.sum(), body, (state, jnp.int32(0)))


def _traced(
    gram: Float[Array, "N N"],
    numbers: Float[Array, "2 N"],
    ids: Int[Array, "5 N"],
    weights: Float[Array, "4"],
) -> _Traced:
    rest, need = numbers
    argmax, target, is_convention, active = ids[0], ids[1], ids[2] > 0, ids[3] > 0
    token = jnp.where(argmax[:, None] == argmax[None, :], weights[0], jnp.float32(0))
    extra = jnp.where(is_convention[None, :], weights[1], token)  # the form is that of the edit
    both = active[:, None] & active[None, :]
    kernel = jnp.where(both, gram + extra, jnp.float32(0))
    return _Traced(kernel, rest, need, target, is_convention, active, weights[2], weights[3])


@jax.jit
def _solve(
    gram: Float[Array, "N N"],
    base: Float[Array, "N J"],
    warm: Float[Array, "N J"],
    numbers: Float[Array, "2 N"],
    ids: Int[Array, "5 N"],
    limits: Int[Array, "2"],
    weights: Float[Array, "4"],
) -> tuple[Array, Array, Array, Array]:
    problem = _traced(gram, numbers, ids, weights)
    num_rows, max_sweeps = limits
    active, is_row = problem.is_active, jnp.arange(warm.shape[1]) < num_rows
    cell = active[:, None] & is_row[None, :]
    coefficients = jnp.where(cell, warm, jnp.float32(0))
    logits = jnp.where(cell, base, FLOOR) + problem.kernel @ coefficients
    start = _State(coefficients, logits)
    state, steps = _pass(problem, active & (ids[4] > 0), start, 0.0)

    def sweep(carry: tuple[_State, Array, Array, Array]) -> tuple[_State, Array, Array, Array]:
        inner, _, sweeps, total = carry
        fails = active & (_log_odds(inner.logits, problem.rest, problem.target) < problem.need)
        inner, moved = _pass(problem, fails, inner, _EXCESS)
        return inner, moved, sweeps + (moved > 0).astype(jnp.int32), total + moved

    def unfinished(carry: tuple[_State, Array, Array, Array]) -> Array:
        return (carry[1] > 0) & (carry[2] < max_sweeps)

    carry = (state, jnp.int32(1), jnp.int32(0), steps)
    state, _, sweeps, steps = jax.lax.while_loop(unfinished, sweep, carry)
    log_odds = _log_odds(state.logits, problem.rest, problem.target)
    return state.coefficients, state.logits, log_odds, jnp.stack([sweeps, steps])


@functools.cache
def _hosts() -> tuple[object, ...]:
    """The host, where an accelerator is the default: the steps are tiny, and each needs the last.

    Nobody where nothing has to be chosen, or the platform list leaves the host out.
    """
    if jax.default_backend() == "cpu":
        return ()
    try:
        return (jax.devices("cpu")[0],)
    except RuntimeError:
        return ()


def solve(problem: Problem, warm: np.ndarray, *, max_sweeps: int) -> Solution:
    """Step on the `is_first` positions, then sweep over all, starting from `warm` [PN, PJ].

    Ends when every active position holds, when no step moves anything (each failing one is at its
    bound), or after `max_sweeps`.
    """
    count, padded = len(problem.need), len(problem.gram)
    numbers, ids = np.zeros((2, padded), np.float32), np.zeros((5, padded), np.int32)
    numbers[0, :count], numbers[1, :count] = problem.rest, problem.need
    ids[0, :count], ids[1, :count] = problem.argmax, problem.target
    ids[2, :count], ids[3, :count] = problem.is_convention, problem.is_active
    ids[4, :count] = problem.is_first
    limits = np.array([problem.num_rows, max_sweeps], np.int32)
    weights = np.array(problem.weights, np.float32)
    hosts = _hosts()
    with jax.default_device(hosts[0]) if hosts else contextlib.nullcontext():
        parts = _solve(problem.gram, problem.logits, warm, numbers, ids, limits, weights)
        coefficients, served, log_odds, effort = (np.asarray(part) for part in parts)
    return Solution(coefficients, served, log_odds[:count], int(effort[0]), int(effort[1]))


def bucket_of(num_positions: int, num_rows: int) -> tuple[int, int]:
    """The smallest bucket that holds both. The caller has checked that one does."""
    return next(
        bucket for bucket in BUCKETS if num_positions <= bucket[0] and num_rows <= bucket[1]
    )


def compile_buckets(buckets: Sequence[tuple[int, int]] = BUCKETS) -> int:
    """Compile the program for each bucket, at start-up. Returns how many programs there are."""
    for bucket in buckets:
        solve(_blank(bucket), np.zeros(bucket, np.float32), max_sweeps=0)
    return num_compiled()


def num_compiled() -> int:
    """Programs compiled so far in this process; constant after `compile_buckets`."""
    return _solve._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def _blank(bucket: tuple[int, int]) -> Problem:
    nobody, nothing = np.zeros(0, np.bool_), np.zeros(0, np.float32)
    return Problem(
        gram=np.zeros((bucket[0], bucket[0]), np.float32),
        logits=np.zeros(bucket, np.float32),
        num_rows=0, rest=nothing, need=nothing, argmax=nobody, target=nobody,
        is_convention=nobody, is_active=nobody, is_first=nobody, weights=(1.0, 1.0, 1.0, 1.0),
    )  # fmt: skip
