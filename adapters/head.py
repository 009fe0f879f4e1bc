"""Head edits of one pattern, solved together: (state, batch) -> (state, report).

An edit says: at hidden state h_j, where the base's argmax is c_j, token y_j must have probability
p*. It shifts the logits of a query (h, c) by K(h, c; j) a_j, with a_j a vector over the pattern's
rows and the kernel of the edit's form (see `adapters.forms`):

  relabel      h^T M h_j + a hC [c = c_j]        "where you would have said c, here, say y"
  convention   h^T M h_j + w hC                  "in this gate, say y"

hC is the mean of h^T M h over generic states, so that a and w mean the same for every model.
Edits with similar keys undo each other; so after a first step on the new ones, all positions,
confirmed answers included, are stepped on in turn until each holds (`adapters.solve`).

A state is a fold over its log. `remove` folds the rest of the log again from nothing: what is
left is, to the bit, what would be there if the removed feedback had never come.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from adapters.base_rows import HeadRows
from adapters.batch import Batch, check
from adapters.errors import AdapterNotFound
from adapters.first_steps import MAX_FIRST, first_steps
from adapters.forms import Evidence, conventions, extend_strength
from adapters.grow import admit, grow
from adapters.solve import Problem, Solution, solve
from adapters.state import HeadState, logit, probability


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveReport:
    """How a solve ended. It speaks of the given positions only: no claim about any other."""

    num_edits: int
    num_constraints: int
    num_conventions: int  # edits in that form
    num_rows: int
    num_failing: int  # active positions below their bound
    failing: tuple[str, ...]  # their feedbacks
    min_probability: float  # over active edits; 1 without any
    num_sweeps: int
    num_steps: int
    num_dropped: int  # constraints the pattern had no room for
    conflicts_with: tuple[str, ...]  # feedbacks of which a position was replaced
    is_settled: bool


def add(state: HeadState, batch: Batch, head_rows: HeadRows) -> tuple[HeadState, SolveReport]:
    """Take in a feedback's positions and step once on each new edit.

    A state whose sweeps are due is settled first, so that a log always folds the same way.

    Raises:
      CandidateRejected: arrays that cannot be (see `batch.check`), or a pattern without room for
        the edits. Constraints without room are dropped and counted.
    """
    check(batch, state.keys.rows.shape[1])
    if not state.is_settled:
        state, _ = settle(state)
    admitted, row_ids = admit(state, batch)
    num_dropped = len(batch.targets) - len(admitted.targets)
    grown = grow(state, admitted, row_ids, head_rows)
    if grown.num_positions == state.num_positions:
        return replace(grown, log=(*state.log, batch)), _report(grown, (0, 0), num_dropped, ())
    verdict = _contradictions(grown, state.num_positions)
    grown.columns["has_yielded"][state.num_positions :] = ~verdict.is_active[state.num_positions :]
    columns, warm, is_first = _choose_forms(grown, state.num_positions, verdict)
    solution = _stepped(grown, columns, warm, is_first, state.num_positions)
    added = replace(
        grown,
        columns=columns,
        coefficients=solution.coefficients,
        served=solution.served,
        log_odds=solution.log_odds,
        is_settled=False,
        log=(*state.log, batch),
    )
    effort = (solution.num_sweeps, solution.num_steps)
    return added, _report(added, effort, num_dropped, verdict.replaced)


def settle(state: HeadState) -> tuple[HeadState, SolveReport]:
    """Sweep over all positions until each holds or nothing moves."""
    if state.is_settled:
        return state, _report(state, (0, 0), 0, ())
    nobody = np.zeros(state.num_positions, np.bool_)
    problem = _problem(state, state.columns, nobody)
    solution = solve(problem, state.coefficients, max_sweeps=state.config.max_sweeps)
    settled = replace(
        state,
        coefficients=solution.coefficients,
        served=solution.served,
        log_odds=solution.log_odds,
        is_settled=True,
    )
    return settled, _report(settled, (solution.num_sweeps, solution.num_steps), 0, ())


def learn(state: HeadState, batch: Batch, head_rows: HeadRows) -> tuple[HeadState, SolveReport]:
    """`add`, then `settle`. The report is of the end, with what `add` replaced and dropped."""
    added, first = add(state, batch, head_rows)
    settled, last = settle(added)
    return settled, replace(
        last,
        num_steps=first.num_steps + last.num_steps,
        num_dropped=first.num_dropped,
        conflicts_with=first.conflicts_with,
    )


def replay(empty: HeadState, log: Iterable[Batch], head_rows: HeadRows) -> HeadState:
    """Learn a log from nothing."""
    for batch in log:
        empty, _ = learn(empty, batch, head_rows)
    return empty


def remove(state: HeadState, feedback_id: str, head_rows: HeadRows) -> HeadState:
    """The state as if this feedback had never come. Raises AdapterNotFound if it did not."""
    rest = [batch for batch in state.log if batch.feedback_id != feedback_id]
    if len(rest) == len(state.log):
        raise AdapterNotFound(
            f"feedback {feedback_id} is not in this pattern's log of {len(state.log)} batches; "
            "name one that was learned"
        )
    return replay(HeadState.empty(state.metric, state.config), rest, head_rows)


class _Verdict(NamedTuple):
    """What new positions do to the older ones."""

    is_active: np.ndarray  # [N]
    is_repeat: np.ndarray  # [N]
    replaced: tuple[str, ...]  # feedbacks that lost a position


def _contradictions(state: HeadState, old: int) -> _Verdict:
    """Who stays in action once the positions from `old` on have spoken: the newest word counts.

    Two positions contradict each other when their keys cannot be told apart, their base argmax is
    the same and their targets differ. A token that a corrected answer merely left standing is not
    such a word: it gives way to what was learned before it.
    """
    columns, count = state.columns, state.num_positions
    new, past = slice(old, None), slice(None, old)
    norms = columns["norm"][new, None] * columns["norm"][None, past]
    same = (
        (state.gram[old:count, :old] >= state.config.same_key_cosine * np.sqrt(norms))
        & (columns["argmax"][new, None] == columns["argmax"][None, past])
        & columns["is_active"][None, past]
        & (columns["feedback"][new, None] != columns["feedback"][None, past])
    )
    if not same.any():
        return _Verdict(columns["is_active"], columns["is_repeat"], ())
    agrees = columns["target"][new, None] == columns["target"][None, past]
    is_active, is_repeat = columns["is_active"].copy(), columns["is_repeat"].copy()
    is_repeat[new] = (same & agrees).any(1)
    against = same & ~agrees
    is_left_standing = ~columns["is_edit"][new] & _corrects(state, old)
    is_active[new] = ~(is_left_standing & against.any(1))
    replaced = against[~is_left_standing].any(0)
    is_active[past] &= ~replaced
    return _Verdict(is_active, is_repeat, state.feedbacks(np.flatnonzero(replaced)))


def _corrects(state: HeadState, old: int) -> bool:
    """The feedback of the positions from `old` on corrected something, now or in an earlier batch.

    A feedback without any edit is a confirmation: somebody vouched for the whole answer.
    """
    columns = state.columns
    return bool(columns["is_edit"][columns["feedback"] == columns["feedback"][old]].any())


def _choose_forms(
    state: HeadState, old: int, verdict: _Verdict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose each target's form anew. Returns the columns, where to start, and who steps first [N].

    Who changed form starts from zero; the solver itself drops whoever is no longer active.
    """
    columns, config, count = state.columns, state.config, state.num_positions
    const = config.const_weight * state.metric.mean_norm
    logits = state.base.logits[:count]
    is_member = verdict.is_active & columns["is_edit"] & (columns["argmax"] != columns["target"])
    evidence = Evidence(
        gram=state.gram[:count, :count], argmax=columns["argmax"], target=columns["target"],
        feedback=columns["feedback"], is_active=verdict.is_active, is_member=is_member,
        is_repeat=verdict.is_repeat,
    )  # fmt: skip
    is_intact = not columns["strength"][:old][~verdict.is_active[:old]].any()
    known = columns["strength"][: old if is_intact else 0]
    unknown = np.arange(len(known), count)
    own = logits[unknown, columns["row"][unknown]].astype(np.float64)
    needed = logit(config.target_probability) - own + np.log1p(-np.exp(np.minimum(own, -1e-6)))
    strength = extend_strength(known, evidence, needed, const)
    taught = conventions(evidence, strength, logits, columns["argmax_logit"], columns["row"], const)
    is_convention = is_member & (columns["target"][:, None] == taught[None, :]).any(1)
    is_first = is_convention != columns["is_convention"]
    coefficients = state.coefficients
    if is_first.any():
        coefficients = coefficients.copy()
        coefficients[:count][is_first] = 0.0
    is_first[old:] = True
    chosen = columns.copy()
    chosen["is_active"], chosen["is_repeat"] = verdict.is_active, verdict.is_repeat
    chosen["strength"], chosen["is_convention"] = strength, is_convention
    return chosen, coefficients, is_first & columns["is_edit"]


def _stepped(
    state: HeadState, columns: np.ndarray, warm: np.ndarray, is_first: np.ndarray, old: int
) -> Solution:
    """One step on each of `is_first` [N]; the short way where nothing old has changed."""
    problem = _problem(state, columns, is_first)
    past = columns[:old]
    is_as_before = (past["is_active"] == state.columns["is_active"][:old]).all()
    if is_as_before and not is_first[:old].any() and np.count_nonzero(is_first) <= MAX_FIRST:
        return first_steps(problem, warm, state.served)
    return solve(problem, warm, max_sweeps=0)


def _problem(state: HeadState, columns: np.ndarray, is_first: np.ndarray) -> Problem:
    """What the compiled programs read."""
    config, scale = state.config, state.metric.mean_norm
    weights = (config.token_weight * scale, config.const_weight * scale,
               config.max_step, config.max_shift)  # fmt: skip
    return Problem(
        gram=state.gram,
        logits=state.base.logits,
        num_rows=state.base.num_rows,
        rest=state.base.rest,
        need=columns["need"],
        argmax=columns["argmax"],
        target=columns["row"],
        is_convention=columns["is_convention"],
        is_active=columns["is_active"],
        is_first=is_first,
        weights=weights,
    )


def _report(
    state: HeadState, effort: tuple[int, int], num_dropped: int, conflicts: tuple[str, ...]
) -> SolveReport:
    columns = state.columns
    active, edits = columns["is_active"], columns["is_edit"]
    is_edit, fails = active & edits, active & (state.log_odds < columns["need"])
    num_active, num_edits = int(np.count_nonzero(active)), int(np.count_nonzero(is_edit))
    return SolveReport(
        num_edits=num_edits,
        num_constraints=num_active - num_edits,
        num_conventions=int(np.count_nonzero(active & columns["is_convention"])),
        num_rows=state.base.num_rows,
        num_failing=int(np.count_nonzero(fails)),
        failing=state.feedbacks(fails),
        min_probability=probability(state.log_odds.min(initial=np.inf, where=is_edit)),
        num_sweeps=effort[0],
        num_steps=effort[1],
        num_dropped=num_dropped,
        conflicts_with=conflicts,
        is_settled=state.is_settled,
    )
