"""What a head table does to logits: the reference of the served addition, and exact previews."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from adapters.base_rows import BaseRows, HeadRows, log_odds
from engine import Capture, HeadTable

_CHUNK = 64  # positions at a time: bounds the working set at full table size


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """How far a table moves the base model on given positions, were its gate to let them in."""

    mean_kl: float  # nats, KL(base || served)
    max_kl: float
    flip_fraction: float  # of positions whose likeliest token changes


def reactions(
    table: HeadTable, hidden: Float[np.ndarray, "N D"], base_argmax: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N R"]:
    """u: how strongly each rank of the table answers to each position, float32."""
    reads = (base_argmax[:, None] == table.token_ids[None, :]).astype(np.float32)
    answer = np.asarray(hidden, np.float32) @ table.keys.T
    return answer + reads @ table.token_keys.T + table.const_keys[None, :]


def apply_table(
    table: HeadTable,
    hidden: Float[np.ndarray, "N D"],
    base_argmax: Int[np.ndarray, " N"],
    base_logits: Float[np.ndarray, "N V"],
) -> Float[np.ndarray, "N V"]:
    """The served logits over the whole vocabulary."""
    logits = base_logits.copy()
    logits[:, table.row_ids] += reactions(table, hidden, base_argmax) @ table.values
    return logits


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    base: Float[np.ndarray, "N J"]  # relative to the base log-sum-exp
    shift: Float[np.ndarray, "N J"]
    rest: Float[np.ndarray, " N"]
    columns: Int[np.ndarray, " N"]  # of the wanted tokens


def _served(
    table: HeadTable, capture: Capture, wanted: Int[np.ndarray, " N"], head_rows: HeadRows
) -> _Served:
    """Base logits and shifts on the table's rows and the wanted tokens; table rows first."""
    extra = np.setdiff1d(wanted, table.row_ids)
    ids = np.concatenate([table.row_ids, extra]).astype(np.int32)
    shape = (len(wanted), len(ids))
    rows = BaseRows.empty(capture.hidden.shape[1]).extended(ids, capture, head_rows, shape)
    shift = np.zeros(shape, np.float64)
    reaction = reactions(table, capture.hidden, capture.top_ids[:, 0])
    shift[:, : len(table.row_ids)] = reaction @ table.values
    return _Served(
        rows.logits.astype(np.float64), shift, rows.rest.astype(np.float64), rows.columns(wanted)
    )


def _chunks(capture: Capture) -> list[slice]:
    return [slice(at, at + _CHUNK) for at in range(0, len(capture.rest_logprob), _CHUNK)]


def _part(capture: Capture, at: slice) -> Capture:
    return Capture(
        capture.hidden[at], capture.top_ids[at],
        capture.top_logprobs[at], capture.rest_logprob[at],
    )  # fmt: skip


def served_logprobs(
    table: HeadTable, capture: Capture, targets: Int[np.ndarray, " N"], head_rows: HeadRows
) -> Float[np.ndarray, " N"]:
    """Log-probability of each target under the table at temperature 1, float64."""
    logprobs = np.empty(len(targets), np.float64)
    for at in _chunks(capture):
        served = _served(table, _part(capture, at), targets[at], head_rows)
        odds = log_odds(served.base + served.shift, served.rest, served.columns)
        logprobs[at] = -np.logaddexp(0.0, -odds)
    return logprobs


def disturbance(table: HeadTable, capture: Capture, head_rows: HeadRows) -> Disturbance:
    """Exact divergence from the base: KL = l' - l - sum over touched rows of p_v delta_v.

    For positions that the gate lets in by mistake: multiply by how often it does.
    """
    divergence, flips = [np.zeros(0)], 0
    for at in _chunks(capture):
        part = _part(capture, at)
        argmax = part.top_ids[:, 0]
        served = _served(table, part, argmax, head_rows)
        moved = served.base + served.shift
        everything = np.concatenate([moved, served.rest[:, None]], axis=1)
        log_total = np.logaddexp.reduce(everything, axis=1)
        divergence.append(log_total - (np.exp(served.base) * served.shift).sum(1))
        own = np.take_along_axis(moved, served.columns[:, None], 1)[:, 0]
        flips += int((_strongest(part, moved, table) > own).sum())
    everywhere = np.maximum(np.concatenate(divergence), 0.0)
    count = max(len(everywhere), 1)
    return Disturbance(
        mean_kl=float(everywhere.sum()) / count,
        max_kl=float(everywhere.max(initial=0.0)),
        flip_fraction=flips / count,
    )


def _strongest(
    capture: Capture, moved: Float[np.ndarray, "N J"], table: HeadTable
) -> Float[np.ndarray, " N"]:
    """The greatest served logit: among the table's rows, or a captured one it leaves alone."""
    untouched = np.where(
        np.isin(capture.top_ids, table.row_ids), -np.inf, capture.top_logprobs
    ).max(1)
    return np.maximum(moved.max(1), untouched)
