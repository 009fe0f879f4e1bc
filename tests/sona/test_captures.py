"""The ring of captured states: oldest first, by bytes and by age."""

import numpy as np

from engine.api import Capture
from sona.captures import CaptureRing


def capture(rows):
    return Capture(
        np.zeros((rows, 4), np.float32), np.zeros((rows, 2), np.int32),
        np.zeros((rows, 2), np.float32), np.zeros(rows, np.float32),
    )  # fmt: skip


ROW = 4 * 4 + 2 * 4 + 2 * 4 + 4  # bytes of one row above


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_oldest_go_when_the_budget_is_full():
    ring = CaptureRing(10 * ROW, 100.0, clock=Clock())
    for name in "abc":
        ring.put("t", name, 0, capture(4))
    assert ring.get("t", "a", 0) is None
    assert ring.get("t", "b", 0) is not None and ring.get("t", "c", 0) is not None
    assert ring.num_bytes == 8 * ROW


def test_what_is_larger_than_the_budget_is_not_kept_and_displaces_nothing():
    ring = CaptureRing(10 * ROW, 100.0, clock=Clock())
    ring.put("t", "a", 0, capture(4))
    ring.put("t", "big", 0, capture(11))
    assert ring.get("t", "big", 0) is None
    assert ring.get("t", "a", 0) is not None


def test_age_ends_them():
    clock = Clock()
    ring = CaptureRing(100 * ROW, 10.0, clock=clock)
    ring.put("t", "a", 0, capture(1))
    clock.now = 9.0
    ring.put("t", "b", 0, capture(1))
    assert ring.get("t", "a", 0) is not None
    clock.now = 10.0
    assert ring.get("t", "a", 0) is None
    assert ring.get("t", "b", 0) is not None
    ring.put("t", "c", 0, capture(1))
    assert ring.num_bytes == 2 * ROW  # a was dropped


def test_tenants_do_not_see_each_other_and_a_second_put_replaces():
    ring = CaptureRing(100 * ROW, 10.0, clock=Clock())
    ring.put("t", "a", 0, capture(1))
    assert ring.get("u", "a", 0) is None
    ring.put("t", "a", 0, capture(3))
    assert ring.num_bytes == 3 * ROW
    assert ring.get("t", "a", 1) is None  # another answer to the same request
