from dataclasses import replace

import numpy as np
import pytest
from reference.head_edits import World, log_softmax
from support.patterns import Topic, bf16

from adapters.errors import AdapterError
from adapters.head_config import HeadConfig
from adapters.served import apply_table
from adapters.state import HeadState
from adapters.table import TableLimits, export


@pytest.fixture
def topic():
    return Topic(World(seed=2))


def shifts_by_the_kernel(state, topic, hidden, argmax):
    """sum_j K(., j) a_j over the whole vocabulary in float64, edit by edit."""
    columns, scale = state.columns, topic.metric.mean_norm
    shifts = np.zeros((len(hidden), topic.world.vocab))
    for j in range(state.num_positions):
        kernel = hidden @ state.keys.rows[j].astype(np.float64)
        if columns["is_convention"][j]:
            kernel = kernel + state.config.const_weight * scale
        else:
            kernel = kernel + state.config.token_weight * scale * (argmax == columns["argmax"][j])
        value = state.coefficients[j, : state.base.num_rows].astype(np.float64)
        shifts[:, state.base.row_ids] += kernel[:, None] * value[None, :]
    return shifts


def table_shifts(table, hidden, argmax, vocab):
    return apply_table(table, hidden, argmax, np.zeros((len(hidden), vocab)))


def fresh(topic, state, count=20):
    """Unseen states: some of the gate with a known base answer, some generic."""
    hidden = np.concatenate([topic.facts(count)[0], topic.world.generic(count)])
    argmax = (hidden @ topic.world.head.T).argmax(1).astype(np.int32)
    argmax[0] = state.columns["argmax"][0]  # at least one token key answers
    return hidden, argmax


def mixed(topic):
    """A convention in the gate, relabels far from it that do not contradict it."""
    states, said, _ = topic.facts(4)
    target = next(label for label in topic.labels if label not in said)
    elsewhere = bf16(topic.world.generic(5))
    others = [label for label in topic.labels if label != target][:5]
    batches = topic.batches(states, np.full(4, target))
    batches += topic.batches(elsewhere, others, prefix="r")
    weak = HeadConfig(const_weight=0.05)  # a strong one would reach the other states
    state, _ = topic.learned(batches, HeadState.empty(topic.metric, weak))
    assert 0 < state.columns["is_convention"].sum() < state.num_positions
    return state


def test_factors_say_what_the_edits_say(topic):
    state = mixed(topic)
    table, report = export(state)
    assert report.is_exact
    hidden, argmax = fresh(topic, state)
    want = shifts_by_the_kernel(state, topic, hidden, argmax)
    got = table_shifts(table, hidden, argmax, topic.world.vocab)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_edits_of_one_convention_share_a_rank(topic):
    states, said, _ = topic.facts(20)
    target = next(label for label in topic.labels if label not in said)
    state, _ = topic.learned(topic.batches(states, np.full(20, target)))
    used = int(state.coefficients.any(1).sum())
    assert used > 1
    table, report = export(state)
    assert (report.form, report.rank, report.num_rows, report.num_tokens) == ("merged", 1, 1, 0)
    assert table.row_ids.tolist() == [target]
    hidden, argmax = fresh(topic, state)
    want = shifts_by_the_kernel(state, topic, hidden, argmax)
    np.testing.assert_allclose(
        table_shifts(table, hidden, argmax, topic.world.vocab), want, atol=1e-4 * np.abs(want).max()
    )


def test_few_rows_hold_any_number_of_edits(topic):
    # Three base answers, two new ones: many edits, but never more than their rows.
    answers = np.repeat(topic.labels[:3], 14)
    states = topic.states(topic.world.draw(42), answers)
    targets = topic.labels[3:5][np.arange(42) % 2]
    state, _ = topic.learned(topic.batches(states, targets))
    num_rows = int(state.coefficients.any(0).sum())
    num_used = int(state.coefficients.any(1).sum())
    limits = TableLimits(rank=num_rows)
    assert num_used > num_rows
    table, report = export(state, limits)
    assert (report.form, report.rank, report.is_exact) == ("by row", num_rows, True)
    hidden, argmax = fresh(topic, state)
    want = shifts_by_the_kernel(state, topic, hidden, argmax)
    np.testing.assert_allclose(
        table_shifts(table, hidden, argmax, topic.world.vocab), want, atol=1e-4 * np.abs(want).max()
    )


def test_forms_do_not_share_their_features(topic):
    # The same base token under both forms: only the relabels answer to it.
    answers = np.full(42, topic.labels[0])
    states = topic.states(topic.world.draw(42), answers)
    state, _ = topic.learned(topic.batches(states, topic.labels[3:5][np.arange(42) % 2]))
    columns = state.columns.copy()
    columns["is_convention"] = np.arange(42) % 5 == 0
    state = replace(state, columns=columns)
    num_rows = int(state.coefficients.any(0).sum())
    table, report = export(state, TableLimits(rank=num_rows))
    assert report.form == "by row"
    hidden, argmax = fresh(topic, state)
    want = shifts_by_the_kernel(state, topic, hidden, argmax)
    np.testing.assert_allclose(
        table_shifts(table, hidden, argmax, topic.world.vocab), want, atol=1e-4 * np.abs(want).max()
    )


@pytest.fixture
def crowded(topic):
    """Twenty different facts and eight confirmed neighbours."""
    states, said, targets = topic.facts(28)
    batches = topic.batches(states[:20], targets[:20])
    batches.append(topic.batch("ok", states[20:], said[20:], is_edit=False))
    state, report = topic.learned(batches)
    assert report.num_failing == 0
    return state, batches


def probabilities_under(table, topic, batches):
    """Full-vocabulary probabilities of all targets under a table."""
    hidden = np.concatenate([batch.capture.hidden for batch in batches]).astype(np.float64)
    targets = np.concatenate([batch.targets for batch in batches])
    base = hidden @ topic.world.head.T
    served = np.exp(log_softmax(apply_table(table, hidden, base.argmax(1), base)))
    return served[np.arange(len(targets)), targets]


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_truncation_is_the_best_of_its_rank(topic, crowded, rank):
    state, batches = crowded
    table, report = export(state, TableLimits(rank=rank))
    assert (report.form, report.rank, report.is_exact) == ("truncated", rank, False)
    hidden = np.concatenate([batch.capture.hidden for batch in batches]).astype(np.float64)
    argmax = (hidden @ topic.world.head.T).argmax(1)
    weight = np.r_[np.full(20, 0.5 / 20), np.full(8, 0.5 / 8)]
    want = shifts_by_the_kernel(state, topic, hidden, argmax)
    got = table_shifts(table, hidden, argmax, topic.world.vocab)
    error = (weight[:, None] * (want - got) ** 2).sum()
    singular = np.linalg.svd(np.sqrt(weight)[:, None] * want, compute_uv=False)
    # Eckart and Young: nothing of this rank can come closer than the singular values left out.
    assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-2)


def test_a_truncated_convention_keeps_its_in_gate_part(topic):
    state = mixed(topic)
    assert state.columns["is_convention"].any()
    hidden, argmax = fresh(topic, state)
    whole, _ = export(state)
    number = len(whole.keys)
    table, report = export(state, TableLimits(rank=number - 1))
    assert report.form == "truncated"
    want = shifts_by_the_kernel(state, topic, hidden, argmax)
    got = table_shifts(table, hidden, argmax, topic.world.vocab)
    # One direction of eight is gone: near the whole, not equal to it.
    assert 0 < np.linalg.norm(got - want) < 0.4 * np.linalg.norm(want)
    kept = probabilities_under(table, topic, state.log)
    assert report.num_kept_after == int((kept > 0.5).sum())


@pytest.mark.parametrize("rank", [2, 12])
def test_the_report_of_a_truncation_is_a_replay(topic, crowded, rank):
    state, batches = crowded
    table, report = export(state, TableLimits(rank=rank))
    served = probabilities_under(table, topic, batches)
    assert report.num_kept_after == int((served[:20] > 0.5).sum())
    assert report.min_probability_after == pytest.approx(served[:20].min(), abs=5e-3)
    assert report.num_kept_before == report.num_edits == 20
    assert report.num_holding_before == report.num_constraints == 8
    if rank == 2:
        assert report.num_kept_after < 20  # twenty facts do not fit into two directions
    else:
        assert report.num_kept_after >= 19


def test_more_rows_than_the_slot_keeps_the_strongest(topic, crowded):
    state, batches = crowded
    whole, _ = export(state)
    table, report = export(state, TableLimits(max_rows=14))
    assert report.num_dropped_rows == len(whole.row_ids) - 14
    assert len(table.row_ids) == 14
    hidden = np.concatenate([batch.capture.hidden for batch in batches]).astype(np.float64)
    argmax = (hidden @ topic.world.head.T).argmax(1)
    energy = (shifts_by_the_kernel(state, topic, hidden, argmax) ** 2).sum(0)
    strongest = np.argsort(-energy)[:14]
    assert set(table.row_ids) == set(strongest) < set(whole.row_ids)
    assert not report.is_exact
    served = probabilities_under(table, topic, batches)
    assert report.num_kept_after == int((served[:20] > 0.5).sum())


def test_more_tokens_than_the_slot_keeps_the_strongest(topic, crowded):
    state, batches = crowded
    whole, _ = export(state)
    table, report = export(state, TableLimits(max_tokens=2))
    assert len(whole.token_ids) == report.num_tokens + report.num_dropped_tokens > 2
    assert len(table.token_ids) == 2
    served = probabilities_under(table, topic, batches)
    assert report.num_kept_after == int((served[:20] > 0.5).sum())
    assert report.min_probability_after == pytest.approx(served[:20].min(), abs=5e-3)


def test_nothing_learned_is_an_empty_table(topic):
    table, report = export(HeadState.empty(topic.metric))
    assert table.keys.shape == (0, topic.world.dim)
    assert table.values.shape == (0, 0)
    assert (report.rank, report.num_edits, report.is_exact) == (0, 0, True)
    logits = topic.world.generic(3) @ topic.world.head.T
    same = apply_table(table, topic.world.generic(3), np.zeros(3, np.int32), logits)
    np.testing.assert_array_equal(same, logits)


def test_tables_are_float32_with_distinct_ids(topic, crowded):
    for limits in (TableLimits(), TableLimits(rank=6), TableLimits(max_rows=9, max_tokens=3)):
        table, _ = export(crowded[0], limits)
        for name in ("keys", "token_keys", "const_keys", "values"):
            assert getattr(table, name).dtype == np.float32
        for ids in (table.row_ids, table.token_ids):
            assert ids.dtype == np.int32
            assert len(np.unique(ids)) == len(ids)
        rank = len(table.keys)
        assert table.token_keys.shape == (rank, len(table.token_ids))
        assert table.const_keys.shape == (rank,)
        assert table.values.shape == (rank, len(table.row_ids))


def test_a_slot_of_no_size_is_refused():
    with pytest.raises(AdapterError, match="rank 0"):
        TableLimits(rank=0)
