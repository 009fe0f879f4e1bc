import numpy as np
import pytest

from adapters.forms import Evidence, conventions, extend_strength

CONST = 1.0
NEW, OLD, OTHER = 9, 5, 6  # token ids; their rows are 0, 1, 2
ROW = {NEW: 0, OLD: 1, OTHER: 2}


def decided(positions, *, gram=None):
    """Conventions of positions (argmax, target, feedback, is_edit, base log-prob of NEW)."""
    argmax, target, feedback, is_edit, _ = (np.array(part) for part in zip(*positions, strict=True))
    count = len(positions)
    gram = np.full((count, count), 0.5) + 0.5 * np.eye(count) if gram is None else gram
    logits = np.zeros((count, 3))
    for index, position in enumerate(positions):
        logits[index, ROW[NEW]] = position[4]
    evidence = Evidence(
        gram=gram,
        argmax=argmax,
        target=target,
        feedback=feedback,
        is_active=np.ones(count, bool),
        is_member=is_edit & (argmax != target),
        is_repeat=np.zeros(count, bool),
    )
    needed = np.log(99.0) - logits[np.arange(count), [ROW[t] for t in target]]
    strength = extend_strength(np.zeros(0), evidence, needed, CONST)
    rows = np.array([ROW[token] for token in target])
    return conventions(evidence, strength, logits, np.zeros(count), rows, CONST).tolist()


FIRST, SECOND = (OLD, NEW, 0, True, -10.0), (OLD, NEW, 1, True, -10.0)


def test_two_feedbacks_with_one_target_make_a_convention():
    assert decided([FIRST, SECOND]) == [NEW]


def test_one_feedback_does_not_however_often_it_says_so():
    assert decided([FIRST, (OLD, NEW, 0, True, -10.0)]) == []


def test_a_token_the_base_had_right_is_no_evidence():
    assert decided([FIRST, (NEW, NEW, 1, True, 0.0)]) == []


def test_a_confirmation_of_the_replaced_token_contradicts():
    # Far away (base log-prob -40, no similarity), yet "OLD becomes NEW" is false there.
    gram = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert decided([FIRST, SECOND, (OLD, OLD, 2, False, -40.0)], gram=gram) == []


@pytest.mark.parametrize(("base_logprob", "contradicts"), [(-4.0, True), (-40.0, False)])
def test_a_confirmation_that_the_convention_would_flip_contradicts(base_logprob, contradicts):
    # Needed shift 4.6 + 10 = 14.6; at a position of similarity 0.5 about three quarters arrive,
    # 11 nats: enough to overtake from -4, not from -40.
    got = decided([FIRST, SECOND, (OTHER, OTHER, 2, False, base_logprob)])
    assert got == ([] if contradicts else [NEW])


def test_a_correction_to_another_token_contradicts_like_a_confirmation():
    assert decided([FIRST, SECOND, (OLD, OTHER, 2, True, -40.0)]) == []


def test_a_confirmation_of_the_new_token_agrees():
    assert decided([FIRST, SECOND, (OLD, NEW, 2, False, -10.0)]) == [NEW]


def test_repeats_do_not_count_as_a_second_opinion():
    positions = [FIRST, SECOND]
    argmax, target = np.array([OLD, OLD]), np.array([NEW, NEW])
    evidence = Evidence(
        gram=np.ones((2, 2)), argmax=argmax, target=target, feedback=np.array([0, 1]),
        is_active=np.ones(2, bool), is_member=np.ones(2, bool), is_repeat=np.array([False, True]),
    )  # fmt: skip
    strength = extend_strength(np.zeros(0), evidence, np.full(2, 14.6), CONST)
    logits = np.full((2, 3), -10.0)
    assert len(positions) == 2
    assert conventions(evidence, strength, logits, np.zeros(2), np.zeros(2, int), CONST).size == 0


def test_strengths_reach_what_each_member_needs():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((7, 4)) + 2.0
    gram = states @ states.T
    evidence = Evidence(
        gram=gram, argmax=np.zeros(7, int), target=np.array([1, 1, 2, 1, 2, 1, 1]),
        feedback=np.arange(7), is_active=np.ones(7, bool),
        is_member=np.array([1, 1, 1, 1, 1, 0, 1], bool), is_repeat=np.zeros(7, bool),
    )  # fmt: skip
    needed = rng.uniform(5, 20, 7)
    strength = extend_strength(np.zeros(0), evidence, needed, CONST)
    for target in (1, 2):
        member = evidence.is_member & (evidence.target == target)
        reached = (gram[np.ix_(member, member)] + CONST) @ strength[member]
        assert (reached >= needed[member] - 1e-9).all()
    assert strength[5] == 0.0
    # Continuing from the first four gives the same numbers.
    np.testing.assert_array_equal(
        extend_strength(strength[:4], evidence, needed[4:], CONST), strength
    )
