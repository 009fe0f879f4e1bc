import numpy as np

from adapters.growing import Growing


def filled(start, count):
    return np.arange(start, start + 3 * count, dtype=np.float32).reshape(count, 3)


def test_older_versions_keep_their_rows_when_newer_ones_grow():
    versions, want = [Growing.empty(3, np.float32)], np.zeros((0, 3), np.float32)
    for step in range(50):  # beyond the first capacity
        versions.append(versions[-1].append(filled(step, 2)))
        want = np.concatenate([want, filled(step, 2)])
    for count, version in enumerate(versions):
        np.testing.assert_array_equal(version.rows, want[: 2 * count])


def test_two_heirs_of_one_version_do_not_see_each_other():
    parent = Growing.empty(3, np.float32).append(filled(0, 2))
    first, second = parent.append(filled(10, 1)), parent.append(filled(20, 1))
    np.testing.assert_array_equal(first.rows[2], filled(10, 1)[0])
    np.testing.assert_array_equal(second.rows[2], filled(20, 1)[0])
    np.testing.assert_array_equal(parent.rows, filled(0, 2))


def test_the_newest_version_grows_without_copying():
    parent = Growing.empty(3, np.float32).append(filled(0, 2))
    assert np.shares_memory(parent.rows, parent.append(filled(10, 1)).rows)
