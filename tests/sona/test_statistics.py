"""t-intervals against published quantiles."""

import pytest

from sona.bench.statistics import Figure, quantile


def test_interval_of_five_values():
    # t quantile 0.975 with 4 degrees of freedom is 2.776 (any table); s of 1..5 is sqrt(2.5).
    low, high = Figure((1.0, 2.0, 3.0, 4.0, 5.0)).interval
    half = 2.7764 * (2.5 / 5) ** 0.5
    assert low == pytest.approx(3 - half, abs=1e-3)
    assert high == pytest.approx(3 + half, abs=1e-3)


def test_one_value_has_no_interval():
    assert Figure((0.7,)).interval == (0.7, 0.7)


def test_quantiles_interpolate():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.25) == 2.5
    assert quantile([4.0], 0.99) == 4.0
