"""Scores as counts: by hand, and on simulated users with and without a preference."""

import random

import numpy as np
import pytest

from adapters.choices import ChoicePoint

GOOD, BAD = 7, 8


def test_shifts_by_hand():
    point = ChoicePoint()
    for token_id, score in ((GOOD, 1.0), (GOOD, 1.0), (BAD, 0.0), (BAD, 0.5)):
        point = point.with_score(token_id, score)
    # mean 2.5 / 4; 6 (2 - 2 * .625) / 6 and 6 (.5 - 2 * .625) / 6
    assert point.mean == 0.625
    assert point.shifts() == pytest.approx({GOOD: 0.75, BAD: -0.75})


def test_order_does_not_matter_and_what_is_not_counted_never_was():
    scores = [(random.Random(seed).choice([GOOD, BAD]), seed % 3 / 2) for seed in range(20)]
    forth, back = ChoicePoint(), ChoicePoint()
    for token_id, score in scores:
        forth = forth.with_score(token_id, score)
    for token_id, score in reversed(scores):
        back = back.with_score(token_id, score)
    assert forth.shifts() == pytest.approx(back.shifts())


def test_equal_scores_move_nothing():
    point = ChoicePoint()
    for token_id in (GOOD, GOOD, GOOD, BAD):
        point = point.with_score(token_id, 0.9)
    assert point.shifts() == pytest.approx({GOOD: 0.0, BAD: 0.0})
    assert ChoicePoint().shifts() == {}


def test_trust_is_a_weight():
    whole = ChoicePoint().with_score(GOOD, 1.0, weight=2.0).with_score(BAD, 0.0, weight=2.0)
    twice = ChoicePoint()
    for token_id, score in ((GOOD, 1.0), (GOOD, 1.0), (BAD, 0.0), (BAD, 0.0)):
        twice = twice.with_score(token_id, score)
    assert whole.shifts() == twice.shifts()


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_scores_out_of_range_are_refused(score):
    with pytest.raises(ValueError, match="score is"):
        ChoicePoint().with_score(GOOD, score)
    with pytest.raises(ValueError, match="weight is"):
        ChoicePoint().with_score(GOOD, 1.0, weight=0.0)


def preferred(num_thumbs, pleases, *, flipped=0.0, users=300):
    """P(GOOD) of each simulated user after so many thumbs; both were equally likely at first."""
    rng, found = np.random.default_rng(0), []
    for _ in range(users):
        point = ChoicePoint()
        for _ in range(num_thumbs):
            shifts = point.shifts()
            odds = np.exp(shifts.get(GOOD, 0.0) - shifts.get(BAD, 0.0))
            said = GOOD if rng.random() < odds / (1 + odds) else BAD
            is_up = rng.random() < pleases[said]
            point = point.with_score(said, float(is_up != (rng.random() < flipped)))
        shifts = point.shifts()
        odds = np.exp(shifts.get(GOOD, 0.0) - shifts.get(BAD, 0.0))
        found.append(odds / (1 + odds))
    return np.array(found)


def test_a_preference_is_found_and_noise_is_not_taken_for_one():
    clear = {GOOD: 1.0, BAD: 0.0}
    assert preferred(8, clear).mean() > 0.85
    assert preferred(32, clear).mean() > 0.90
    assert preferred(32, clear, flipped=0.2).mean() > 0.80
    for rate in (0.5, 0.8, 0.95):  # thumbs that have nothing to do with what was said
        blind = preferred(64, {GOOD: rate, BAD: rate})
        assert abs(blind.mean() - 0.5) < 0.05
        assert (np.maximum(blind, 1 - blind) > 0.95).mean() < 0.02
