"""The stream of conventions: apart from each other, and its halves apart."""

import pytest

from sona.bench.stream import stream


@pytest.fixture(scope="module", params=[0, 1, 5])
def tasks(request):
    return stream(request.param, num_lessons=8, num_held_out=20)


def test_twelve_conventions_in_the_seed_s_own_order(tasks):
    assert len({task.name for task in tasks}) == 12
    orders = {tuple(task.name for task in stream(seed, num_lessons=1, num_held_out=1))
              for seed in range(3)}  # fmt: skip
    assert len(orders) == 3


def test_no_answer_is_changed_by_two(tasks):
    for task in tasks:
        for item in (*task.lessons, *task.held_out):
            changed_by = [other.name for other in tasks if other.convention.apply(item)]
            assert changed_by == [task.name]
            assert task.target(item) not in item.answers


def test_what_is_confirmed_stays_right_and_what_is_examined_was_not_taught(tasks):
    for task in tasks:
        for item in task.confirmed:
            assert all(other.convention.apply(item) is None for other in tasks)
        taught = {item.identity for item in task.lessons}
        assert not taught & {item.identity for item in task.held_out}
