"""The learner against full-vocabulary truth in float64, and its promises about logs."""

import ml_dtypes
import numpy as np
import pytest
from reference.head_edits import Edit, Solver, World, log_softmax, logit
from support.patterns import Topic, bf16

from adapters.errors import AdapterNotFound, CandidateRejected
from adapters.head import add, learn, remove, replay, settle
from adapters.head_config import HeadConfig
from adapters.served import apply_table
from adapters.solve import AIM_MARGIN, compile_buckets, num_compiled
from adapters.state import HeadState
from adapters.table import export

AIM = float(1.0 / (1.0 + np.exp(-(logit(0.99) + AIM_MARGIN))))
# Gathered logits come out of float32 products, the captured ones out of float64: 1e-3 nat.
TOLERANCE = 2e-3


@pytest.fixture
def topic():
    return Topic(World(seed=1))


def reference_of(topic, state, batches):
    """The reference solver with the same edits on the same rows, nothing solved yet."""
    columns = state.columns
    dense = topic.metric.apply(np.eye(topic.world.dim, dtype=np.float32)).astype(np.float64)
    hidden = np.concatenate([b.capture.hidden for b in batches]).astype(np.float64)
    edits = [
        Edit(h, int(y), bool(c), float(1 / (1 + np.exp(-need))))
        for h, y, c, need in zip(
            hidden,
            columns["target"],
            columns["is_convention"],
            columns["need"].astype(float),
            strict=True,
        )
    ]
    return Solver(topic.world.head, dense, topic.metric.mean_norm, edits, state.base.row_ids)


def served_probabilities(topic, state, batches):
    """Full-vocabulary probabilities of all targets from the state's coefficients."""
    reference = reference_of(topic, state, batches)
    count, num_rows = state.num_positions, state.base.num_rows
    reference.values[:, state.base.row_ids] = state.coefficients[:count, :num_rows]
    return np.array([reference.probability(index) for index in range(count)])


def largest_shift(state):
    """The most any coefficient moves a logit at its own position, in nats."""
    count = state.num_positions
    return np.abs(state.coefficients[:count] * state.columns["norm"][:, None]).max()


def assert_same(one, other):
    """Bit for bit: what is served and what is solved from here on."""
    left, right = export(one)[0], export(other)[0]
    for name in left.__slots__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    np.testing.assert_array_equal(one.log_odds, other.log_odds)
    np.testing.assert_array_equal(one.coefficients, other.coefficients)
    np.testing.assert_array_equal(one.columns, other.columns)


def test_one_relabel_equals_the_reference_step(topic):
    states, _, targets = topic.facts(1)
    batches = topic.batches(states, targets)
    state, report = add(HeadState.empty(topic.metric), batches[0], topic.rows)
    reference = reference_of(topic, state, batches)
    assert reference.step(0, margin=AIM_MARGIN)
    got = np.zeros(topic.world.vocab)
    got[state.base.row_ids] = state.coefficients[0, : state.base.num_rows]
    np.testing.assert_allclose(got, reference.values[0], atol=1e-3 * np.abs(reference.values).max())
    assert served_probabilities(topic, state, batches)[0] == pytest.approx(AIM, abs=1e-4)
    assert (report.num_edits, report.num_steps, report.is_settled) == (1, 1, False)


def test_a_target_far_outside_the_captured_logits(topic):
    states, _, _ = topic.facts(3)
    targets = np.argsort(states @ topic.world.head.T, axis=1)[:, 5]  # the sixth least likely
    batches = topic.batches(states, targets)
    assert not (batches[0].capture.top_ids == targets[0]).any()
    state, report = topic.learned(batches)
    probabilities = served_probabilities(topic, state, batches)
    assert report.num_failing == 0
    assert (probabilities >= 0.99 - 1e-4).all()
    np.testing.assert_allclose(probabilities, state.probabilities, atol=TOLERANCE)


def test_unrounded_states_cost_little(topic):
    # The engine's logits come from unrounded states, the capture holds bfloat16: what was
    # learned on one must hold on the other.
    states = topic.world.states(np.repeat(topic.topic, 8, 0), topic.world.draw(8), topic.labels[:8])
    targets = np.roll(topic.labels[:8], 3)
    state, _ = topic.learned(topic.batches(states, targets))
    table, _ = export(state)
    base = states @ topic.world.head.T
    served = np.exp(log_softmax(apply_table(table, states, base.argmax(1), base)))
    assert served[np.arange(8), targets].min() > 0.98  # 0.99 less the rounding of 60 nats of shift


@pytest.mark.parametrize("order", ["as drawn", "reversed", "shuffled"])
def test_all_edits_hold_after_the_last(topic, order):
    states, _, targets = topic.facts(24)
    take = {
        "as drawn": np.arange(24),
        "reversed": np.arange(24)[::-1],
        "shuffled": topic.world.rng.permutation(24),
    }[order]
    batches = topic.batches(states[take], targets[take])
    state, report = topic.learned(batches)
    assert report.num_failing == 0
    assert served_probabilities(topic, state, batches).min() >= 0.99 - 1e-3


def test_without_sweeps_earlier_edits_are_lost(topic):
    # What the sweeps are for: the same stream, first steps only.
    states, _, targets = topic.facts(24)
    batches = topic.batches(states, targets)
    config = HeadConfig(max_sweeps=0)
    state, report = topic.learned(batches, HeadState.empty(topic.metric, config))
    assert report.num_failing > 3
    assert served_probabilities(topic, state, batches).min() < 0.9


def test_the_sweeps_end_where_the_reference_ends(topic):
    # Not the same path (a sweep here skips what held at its start), so not the same numbers:
    # both must hold everything, and agree on what an unseen paraphrase is told.
    entities = topic.world.draw(6)
    answers = topic.world.rng.choice(topic.labels, 6)
    states, again = topic.states(entities, answers), topic.states(entities, answers)
    said = (states @ topic.world.head.T).argmax(1)
    targets = np.array([topic.labels[topic.labels != token][3] for token in said])
    batches = topic.batches(states, targets)
    state, _ = topic.learned(batches)
    reference = reference_of(topic, state, batches)
    assert reference.sweep() < 50
    ours = reference_of(topic, state, batches)
    ours.values[:, state.base.row_ids] = state.coefficients[:6, : state.base.num_rows]
    for hidden in again:
        assert ours.served(hidden).argmax() == reference.served(hidden).argmax()


def test_a_served_token_that_is_likely_enough_is_left_alone(topic):
    states, said, _ = topic.facts(1)
    sharper = bf16(states * 3.0)  # the base is now sure
    state, report = topic.learned([topic.batch("f", sharper, said)])
    assert report.min_probability >= 0.99
    assert not state.coefficients.any()
    assert export(state)[0].keys.shape == (0, topic.world.dim)


def test_log_probabilities_far_below_float32_range(topic):
    # Logits eight times sharper: targets around exp(-75), where exp underflows in float32.
    world = World(seed=1, sharpness=16.0)
    topic = Topic(world)
    states, _, _ = topic.facts(8)
    logprobs = log_softmax(states @ world.head.T)
    targets = np.abs(logprobs + 75.0).argmin(1)
    np.testing.assert_allclose(logprobs[np.arange(8), targets], -75.0, atol=5.0)
    batches = topic.batches(states, targets)
    state, report = topic.learned(batches)
    assert np.isfinite(state.coefficients).all()
    assert np.isfinite(state.log_odds).all()
    assert largest_shift(state) <= 101
    assert report.num_failing == 0  # up to 100 nats for the target, as many against its rivals
    assert served_probabilities(topic, state, batches).min() > 0.97


def test_a_target_nothing_can_reach_fails_alone_and_says_so(topic):
    states, _, targets = topic.facts(6)
    config = HeadConfig(max_shift=8.0)
    batches = topic.batches(states, targets)
    hopeless = topic.states(topic.world.draw(1), topic.labels[:1])
    token = np.argsort(hopeless @ topic.world.head.T, axis=1)[0, 0]
    batches.append(topic.batch("hopeless", hopeless, [token]))
    state, report = topic.learned(batches, HeadState.empty(topic.metric, config))
    assert "hopeless" in report.failing
    assert report.min_probability < 0.99
    assert np.isfinite(state.coefficients).all()
    assert largest_shift(state) <= 8.0 * (1 + 1e-5)


def test_confirmed_answers_stay():
    topic = Topic(World(dim=128, seed=1))
    # Neighbours with the same base answer as a corrected entity: the correction reaches them.
    answers = np.full(12, topic.labels[0])
    states = topic.states(topic.world.draw(12), answers)
    said = (states @ topic.world.head.T).argmax(1)
    target = topic.labels[5]
    confirmed = topic.batch("ok", states[4:], said[4:], is_edit=False)
    corrections = topic.batches(states[:4], np.full(4, target))
    state, report = topic.learned([confirmed, *corrections])
    without, _ = topic.learned(corrections)
    assert report.num_failing == 0
    assert report.num_constraints == 8
    batches = [confirmed, *corrections]
    kept = served_probabilities(topic, state, batches)[:8]
    base = np.exp(log_softmax(states[4:] @ topic.world.head.T))[np.arange(8), said[4:]]
    assert (kept >= 0.99 * base.clip(max=1.0) - 2e-3).all()
    table, _ = export(without)  # the edits alone would have taken some of them
    logits = states[4:] @ topic.world.head.T
    assert (apply_table(table, states[4:], said[4:], logits).argmax(1) != said[4:]).any()


def test_tokens_before_the_corrected_one_are_constraints_of_the_same_feedback(topic):
    states, said, targets = topic.facts(4)
    batch = topic.batch(
        "f", states, [said[0], said[1], said[2], targets[3]], is_edit=[False, False, False, True]
    )
    state, report = topic.learned([batch])
    assert (report.num_edits, report.num_constraints, report.num_failing) == (1, 3, 0)
    assert served_probabilities(topic, state, [batch])[3] >= 0.99 - 1e-4


def test_a_confirmation_that_comes_late_gets_its_token_back(topic):
    answers = np.full(2, topic.labels[0])
    entity = topic.world.draw(1)
    states = topic.states(np.concatenate([entity, entity + 0.3 * topic.world.draw(1)]), answers)
    said = (states @ topic.world.head.T).argmax(1)
    first, _ = topic.learned(topic.batches(states[:1], topic.labels[5:6]))
    late = topic.batch("late", states[1:], said[1:], is_edit=False)
    state, report = topic.learned([late], first)
    if report.conflicts_with:  # too near to be told apart: the newest word counts
        assert report.conflicts_with == ("f0",)
    assert report.num_failing == 0
    assert state.probabilities[1] > 0.5


def test_corrections_with_a_common_target_become_a_convention(topic):
    states, said, _ = topic.facts(6)
    target = next(label for label in topic.labels if label not in said)
    batches = topic.batches(states, np.full(6, target))
    first, report = topic.learned(batches[:1])
    assert report.num_conventions == 0
    assert not first.columns["is_convention"].any()
    state, report = topic.learned(batches[1:], first)
    assert report.num_conventions == 6
    assert report.num_failing == 0
    table, table_report = export(state)
    assert (table_report.form, len(table.keys)) == ("merged", 1)  # one e_y, whatever the number
    assert served_probabilities(topic, state, batches).min() >= 0.99 - 1e-3
    # Prompts never seen, whatever the base says there, are told the same.
    fresh, _, _ = topic.facts(30)
    logits = fresh @ topic.world.head.T
    held_out = apply_table(table, fresh, logits.argmax(1), logits).argmax(1)
    assert (held_out == target).mean() >= 0.9


def test_a_confirmed_convention_must_stay_as_likely_as_it_was(topic):
    states, said, _ = topic.facts(4)
    target = next(label for label in topic.labels if label not in said)
    batches = topic.batches(states[:3], np.full(3, target))
    state, _ = topic.learned(batches)
    confirmed = topic.batch("ok", states[3:], [target], is_edit=False)
    after, report = topic.learned([confirmed], state)
    assert report.num_conventions == 3
    reference = reference_of(topic, after, [*batches, confirmed])
    count, num_rows = state.num_positions, state.base.num_rows
    reference.values[:count, state.base.row_ids] = state.coefficients[:count, :num_rows]
    served = reference.probability(3)  # by the convention: the base would not say it
    assert 0.02 < served < 1.0
    assert after.columns["need"][3] == pytest.approx(logit(0.99 * served), abs=2e-2)


def test_a_confirmation_turns_a_convention_back_into_relabels(topic):
    states, said, _ = topic.facts(8)
    target = next(label for label in topic.labels if label not in said)
    convention, report = topic.learned(topic.batches(states[:4], np.full(4, target)))
    assert report.num_conventions == 4
    confirmed = topic.batch("ok", states[4:], said[4:], is_edit=False)
    state, report = topic.learned([confirmed], convention)
    assert report.num_conventions == 0
    assert report.num_failing == 0
    # And it is what it would have been in the other order of evidence: no trace of the detour
    # in the forms, and everything holds.
    batches = [*topic.batches(states[:4], np.full(4, target)), confirmed]
    probabilities = served_probabilities(topic, state, batches)
    assert probabilities[:4].min() >= 0.99 - 1e-3
    assert probabilities[4:].min() > 0.5


def test_a_correction_without_its_confirmation_becomes_a_convention_again(topic):
    states, said, _ = topic.facts(8)
    target = next(label for label in topic.labels if label not in said)
    batches = topic.batches(states[:4], np.full(4, target))
    confirmed = topic.batch("ok", states[4:], said[4:], is_edit=False)
    state, _ = topic.learned([*batches, confirmed])
    assert_same(remove(state, "ok", topic.rows), topic.learned(batches)[0])


def test_ten_contradictions_on_one_key_do_not_add_up(topic):
    states, _, _ = topic.facts(1)
    one, two = topic.labels[3], topic.labels[4]
    state, _ = topic.learned([topic.batch("f0", states, [one])])
    alone = largest_shift(state)
    for turn in range(1, 11):
        target = two if turn % 2 else one
        state, report = topic.learned([topic.batch(f"f{turn}", states, [target])], state)
        assert report.conflicts_with == (f"f{turn - 1}",)
        assert (report.num_edits, report.num_failing) == (1, 0)
    assert largest_shift(state) <= 1.1 * alone
    assert state.probabilities[-1] >= 0.99
    assert export(state)[0].keys.shape[0] == 1


def test_a_contradiction_replaces_the_position_not_the_whole_feedback(topic):
    states, _, targets = topic.facts(3)
    first = topic.batch("first", states, targets)
    other = next(label for label in topic.labels if label not in targets)
    state, report = topic.learned([first, topic.batch("second", states[1:2], [other])])
    assert report.conflicts_with == ("first",)
    assert report.num_edits == 3
    np.testing.assert_array_equal(state.columns["is_active"], [True, False, True, True])
    assert report.num_failing == 0


def test_a_replaced_correction_no_longer_speaks_for_a_convention(topic):
    states, said, _ = topic.facts(3)
    target, other = [label for label in topic.labels if label not in said][:2]
    batches = topic.batches(states[:2], [target, target])
    state, report = topic.learned(batches)
    assert report.num_conventions == 2
    state, report = topic.learned([topic.batch("new", states[:1], [other])], state)
    assert report.conflicts_with == ("f0",)
    assert report.num_conventions == 0
    # What is left of the evidence is that of the second correction alone.
    alone, _ = topic.learned(batches[1:])
    assert state.columns["strength"][0] == 0.0
    assert state.columns["strength"][1] == pytest.approx(alone.columns["strength"][0], rel=1e-6)


def test_a_feedback_does_not_contradict_itself(topic):
    # Two positions of one answer that nothing tells apart, in its two batches.
    states, _, _ = topic.facts(1)
    one, two = topic.labels[3], topic.labels[4]
    batches = [topic.batch("f", states, [one]), topic.batch("f", states, [two])]
    _, report = topic.learned(batches)
    assert report.conflicts_with == ()
    assert report.num_edits == 2
    assert report.failing == ("f",)  # both cannot hold, and the report says so


def test_what_a_corrected_answer_left_standing_does_not_undo_an_edit(topic):
    # The answer was made before the edit went live, and its author corrected another token.
    states, said, targets = topic.facts(2)
    edited, _ = topic.learned([topic.batch("f0", states[:1], targets[:1])])
    stale = topic.batch("f1", states, [said[0], targets[1]], is_edit=[False, True])
    state, report = topic.learned([stale], edited)
    assert report.conflicts_with == ()
    np.testing.assert_array_equal(state.columns["is_active"], [True, False, True])
    # Somebody who confirms that very answer means it.
    state, report = topic.learned([topic.batch("f2", states[:1], said[:1], is_edit=False)], edited)
    assert report.conflicts_with == ("f0",)
    assert report.num_edits == 0
    assert not state.coefficients.any()


@pytest.mark.parametrize("index", [0, 5, 11])
def test_removal_leaves_what_never_having_been_would(topic, index):
    states, said, targets = topic.facts(12)
    batches = topic.batches(states[:8], targets[:8])
    batches += [topic.batch("ok", states[8:], said[8:], is_edit=False)]
    batches += topic.batches(states[:3], np.roll(targets, 1)[:3], prefix="again")  # contradictions
    state, _ = topic.learned(batches)
    left = [batch for number, batch in enumerate(batches) if number != index]
    assert_same(remove(state, batches[index].feedback_id, topic.rows), topic.learned(left)[0])


def test_removing_the_last_feedback_restores_the_state_before_it(topic):
    states, _, targets = topic.facts(6)
    batches = topic.batches(states, targets)
    before, _ = topic.learned(batches[:5])
    after, _ = topic.learned(batches[5:], before)
    assert_same(remove(after, "f5", topic.rows), before)


def test_removal_takes_both_batches_of_a_feedback(topic):
    states, _, targets = topic.facts(5)
    batches = topic.batches(states[:3], targets[:3])
    late = topic.batch("f1", states[3:], targets[3:])  # the rest of f1's answer
    state, _ = topic.learned([*batches, late])
    assert_same(remove(state, "f1", topic.rows), topic.learned([batches[0], batches[2]])[0])


def test_removal_of_an_unknown_feedback_is_refused(topic):
    with pytest.raises(AdapterNotFound, match="nobody"):
        remove(HeadState.empty(topic.metric), "nobody", topic.rows)


def test_a_log_folds_the_same_whether_or_not_the_sweeps_came_late(topic):
    states, _, targets = topic.facts(8)
    batches = topic.batches(states, targets)
    eager, _ = topic.learned(batches)
    lazy = HeadState.empty(topic.metric)
    for batch in batches:
        lazy, report = add(lazy, batch, topic.rows)
        assert not report.is_settled
    assert_same(settle(lazy)[0], eager)
    assert_same(replay(HeadState.empty(topic.metric), eager.log, topic.rows), eager)


def test_older_states_survive_their_heirs(topic):
    states, _, targets = topic.facts(6)
    batches = topic.batches(states, targets)
    parent, _ = topic.learned(batches[:3])
    table, log_odds = export(parent)[0], parent.log_odds.copy()
    one, _ = topic.learned(batches[3:5], parent)
    two, _ = topic.learned(batches[5:], parent)  # another heir of the same parent
    np.testing.assert_array_equal(export(parent)[0].values, table.values)
    np.testing.assert_array_equal(export(parent)[0].keys, table.keys)
    np.testing.assert_array_equal(parent.log_odds, log_odds)
    assert_same(one, topic.learned(batches[:5])[0])
    assert_same(two, topic.learned([*batches[:3], batches[5]])[0])


def test_no_feedback_compiles_anything(topic):
    compile_buckets()
    before = num_compiled()
    states, said, targets = topic.facts(40)
    state, _ = topic.learned(topic.batches(states, targets))
    state, _ = topic.learned([topic.batch("ok", states, said, is_edit=False)], state)
    remove(state, "f7", topic.rows)
    assert num_compiled() == before


def test_a_batch_without_positions_changes_nothing(topic):
    states, _, targets = topic.facts(2)
    state, _ = topic.learned(topic.batches(states, targets))
    after, report = learn(state, topic.batch("empty", states[:0], targets[:0]), topic.rows)
    np.testing.assert_array_equal(after.coefficients, state.coefficients)
    assert report.is_settled
    assert report.num_steps == 0


def test_constraints_beyond_the_room_are_dropped_and_counted(topic, monkeypatch):
    monkeypatch.setattr("adapters.grow.MAX_POSITIONS", 5)
    states, said, targets = topic.facts(8)
    mixed = topic.batch(
        "f", states, np.r_[said[:6], targets[6:]], is_edit=np.r_[[False] * 6, [True] * 2]
    )
    state, report = topic.learned([mixed])
    assert (report.num_edits, report.num_constraints, report.num_dropped) == (2, 3, 3)
    with pytest.raises(CandidateRejected, match="no room for 1 more edits"):
        learn(state, topic.batch("g", states[:1], targets[:1]), topic.rows)


def test_edits_beyond_the_rows_are_refused(topic, monkeypatch):
    monkeypatch.setattr("adapters.grow.MAX_ROWS", 6)
    states, _, targets = topic.facts(3)
    state, report = topic.learned([topic.batch("f", states[:1], targets[:1])])
    assert report.num_rows == 5
    room = next(i for i in (1, 2) if targets[i] not in state.base.row_ids)
    second = topic.batch("g", states[room : room + 1], [targets[room]])
    state, report = topic.learned([second], state)
    assert report.num_rows == 6  # its target, and no base token any more
    assert report.num_failing == 0
    missing = next(label for label in topic.labels if label not in state.base.row_ids)
    with pytest.raises(CandidateRejected, match="on 6 rows"):
        learn(state, topic.batch("h", states[2:], [missing]), topic.rows)


def broken(batch, **arrays):
    capture = batch.capture
    fields = {name: arrays.get(name, getattr(capture, name)) for name in capture.__slots__}
    return type(batch)(
        feedback_id=batch.feedback_id,
        capture=type(capture)(**fields),
        targets=arrays.get("targets", batch.targets),
        is_edit=batch.is_edit,
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden", lambda b: b.capture.hidden * ml_dtypes.bfloat16(np.nan), "hidden state is zero"),
        ("hidden", lambda b: b.capture.hidden * ml_dtypes.bfloat16(0), "hidden state is zero"),
        ("hidden", lambda b: b.capture.hidden[:, 1:], "hidden has shape"),
        ("top_ids", lambda b: b.capture.top_ids[:, :10], "top_ids has shape"),
        ("top_logprobs", lambda b: b.capture.top_logprobs * np.nan, "log-probability"),
        ("top_logprobs", lambda b: b.capture.top_logprobs + 30, "log-probability"),
        ("rest_logprob", lambda b: b.capture.rest_logprob * np.nan, "log-probability"),
        ("targets", lambda b: b.targets - 10_000, "no token id"),
    ],
)
def test_impossible_captures_are_refused(topic, name, value, message):
    states, _, targets = topic.facts(2)
    batch = topic.batch("bad", states, targets)
    with pytest.raises(CandidateRejected, match=message):
        learn(HeadState.empty(topic.metric), broken(batch, **{name: value(batch)}), topic.rows)
