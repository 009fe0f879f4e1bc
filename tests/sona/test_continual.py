"""The figures of a stream, worked out by hand."""

import numpy as np
import pytest

from sona.bench.continual import Record


def test_three_tasks_by_hand():
    record = Record(
        accuracy=np.array([[0.9, 0.2, 0.0], [0.5, 0.8, 0.1], [0.6, 0.4, 1.0]]),
        base=np.array([0.1, 0.1, 0.0]),
        generic=np.array([0.9, 0.8, 0.72]),
        generic_base=0.9,
    )
    assert record.final == pytest.approx((0.6 + 0.4 + 1.0) / 3)
    assert record.learned == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    assert record.backward == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert record.forward == pytest.approx(((0.2 - 0.1) + (0.1 - 0.0)) / 2)
    assert record.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert record.retained == pytest.approx(0.8)


def test_one_task_forgets_nothing():
    one = Record(np.array([[0.7]]), np.array([0.0]), np.array([1.0]), 1.0)
    assert (one.backward, one.forward, one.forgetting) == (0.0, 0.0, 0.0)
