import pytest

from adapters.align import align


@pytest.mark.parametrize(
    ("generated", "corrected", "common", "has_state"),
    [
        ([5, 6, 7, 2], [5, 6, 9, 9, 2], 2, True),  # a token differs
        ([5, 6, 7, 2], [8, 6, 7, 2], 0, True),  # the first token differs
        ([5, 6, 7, 2], [5, 6, 2], 2, True),  # ends earlier: the end token is the target
        ([5, 6, 2], [5, 6, 7, 2], 2, True),  # goes on where the answer ended
        ([5, 6], [5, 6, 7], 2, False),  # the answer was cut off before anything could differ
        ([5, 6, 7], [5, 6], 2, False),  # a correction without its end token
        ([], [5], 0, False),
    ],
)
def test_first_divergence(generated, corrected, common, has_state):
    alignment = align(generated, corrected)
    assert alignment.num_common == common
    assert alignment.has_divergent_state is has_state
    assert not alignment.is_equal
    if has_state:
        assert alignment.generated_next == generated[common]
        assert alignment.corrected_next == corrected[common]


@pytest.mark.parametrize("ids", [[], [4, 2]])
def test_equal_answers_have_nothing_to_correct(ids):
    alignment = align(ids, list(ids))
    assert alignment.is_equal
    assert alignment.num_common == len(ids)
    assert not alignment.has_divergent_state


def test_the_end_token_is_the_target_of_a_shorter_correction():
    assert align([5, 6, 7, 2], [5, 6, 2]).corrected_next == 2
