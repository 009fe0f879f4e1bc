"""Intervals and wagers: by hand, and how often they are wrong on what is no better."""

import math

import numpy as np
import pytest
from scipy import stats

from adapters.evidence import Wager, gain, upper_loss


def test_a_gain_is_over_users_not_over_items():
    found = gain({"a": [1.0, 1.0, 1.0, 1.0], "b": [0.0], "c": [0.5, 0.5]})
    half = stats.t.ppf(0.975, 2) * 0.5 / math.sqrt(3)  # means 1, 0, .5: deviation .5
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_one_user_is_no_evidence():
    found = gain({"a": [1.0] * 1_000})
    assert (found.low, found.high, found.num_users) == (-math.inf, math.inf, 1)


@pytest.mark.parametrize("bad", [{}, {"a": []}, {"a": [math.nan]}, {"a": [1.0], "b": []}])
def test_what_is_no_evidence_at_all_is_refused(bad):
    with pytest.raises(ValueError, match="differences"):
        gain(bad)


def test_users_who_differ_are_not_taken_for_a_gain():
    """Items of a user share its taste: an interval over items would promote far more often."""
    rng = np.random.default_rng(0)
    promoted = by_items = 0
    for _ in range(600):
        tastes = rng.normal(0.0, 0.15, 8)
        drawn = {str(i): rng.normal(taste, 0.3, 20).tolist() for i, taste in enumerate(tastes)}
        promoted += gain(drawn).low > 0
        items = np.concatenate(list(drawn.values()))
        half = stats.t.ppf(0.975, len(items) - 1) * items.std(ddof=1) / math.sqrt(len(items))
        by_items += items.mean() - half > 0
    assert promoted / 600 < 0.05
    assert by_items / 600 > 0.10


def test_none_seen_in_n_may_still_be_three():
    assert upper_loss(0, 300) == pytest.approx(3 / 300, rel=0.01)
    assert upper_loss(3, 3) == 1.0
    # the bound is the share at which so few or fewer would be seen once in twenty
    bound = upper_loss(4, 200)
    assert stats.binom.cdf(4, 200, bound) == pytest.approx(0.05, rel=1e-6)
    with pytest.raises(ValueError, match="at least one pair"):
        upper_loss(0, 0)


def outcomes(rng, mean, count):
    """Differences of two right-or-wrong marks: -1, 0 or 1."""
    p = np.array([0.15 - mean / 2, 0.7, 0.15 + mean / 2])
    return rng.choice([-1.0, 0.0, 1.0], size=count, p=p)


def test_a_wager_is_won_on_a_gain_and_hardly_ever_without_one_however_often_one_looks():
    rng = np.random.default_rng(1)

    def first_shown(mean, count):
        wager = Wager()
        for at, outcome in enumerate(outcomes(rng, mean, count)):
            wager = wager.after(float(outcome))
            if wager.is_shown(0.05):
                return at
        return None

    wrong = sum(first_shown(0.0, 800) is not None for _ in range(300))
    assert wrong / 300 <= 0.05 + 0.025
    worse = sum(first_shown(-0.05, 800) is not None for _ in range(100))
    assert worse / 100 <= 0.05
    found = [first_shown(0.15, 2_000) for _ in range(60)]
    assert all(at is not None for at in found)
    assert np.median([at for at in found if at is not None]) < 250


def test_a_naive_test_at_every_look_would_be_wrong_much_more_often():
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(100):
        seen = outcomes(rng, 0.0, 800)
        counts = np.arange(1, 801)
        means = np.cumsum(seen) / counts
        deviations = np.sqrt(np.maximum(np.cumsum(seen**2) / counts - means**2, 1e-9))
        wrong += bool((means[30:] > 1.645 * deviations[30:] / np.sqrt(counts[30:])).any())
    assert wrong / 100 > 0.15


@pytest.mark.parametrize("outcome", [1.1, -2.0, math.nan])
def test_an_outcome_out_of_range_is_refused(outcome):
    with pytest.raises(ValueError, match="outcome is"):
        Wager().after(outcome)
