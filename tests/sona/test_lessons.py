"""Feedback as positions: the interval map of the module's docstring, by hand."""

import numpy as np

from engine.api import Capture
from sona.journal import PositionKind
from sona.loops.lessons import as_batch, captured_lesson, scored_lesson

EDIT, CONSTRAINT = PositionKind.EDIT, PositionKind.CONSTRAINT
A, B, C, D, E, X = 10, 11, 12, 13, 14, 15


def capture(argmax, logprobs=None):
    """States whose base argmax and its log-probability are given."""
    count = len(argmax)
    top = np.full((count, 2), -5.0, np.float32)
    top[:, 0] = -0.1 if logprobs is None else logprobs
    ids = np.stack([np.asarray(argmax), np.full(count, 99)], axis=1).astype(np.int32)
    hidden = np.arange(count, dtype=np.float32)[:, None]
    return Capture(hidden, ids, top, np.full(count, -9.0, np.float32))


def test_the_first_divergence_is_an_edit_and_what_precedes_it_stays():
    lesson = captured_lesson([A, B, C, D], [A, B, X, E], capture([A, B, C, D]))
    assert lesson is not None
    assert lesson.indices == (0, 1, 2)
    assert lesson.target_ids == (A, B, X)
    assert lesson.kinds == (CONSTRAINT, CONSTRAINT, EDIT)
    np.testing.assert_array_equal(lesson.capture.hidden[:, 0], [0, 1, 2])


def test_of_a_long_beginning_the_least_certain_tokens_are_kept():
    answer = [A, B, C, D, E, A, B]
    states = capture(answer, [-0.1, -2.0, -0.2, -3.0, -0.3, -1.0, -0.1])
    lesson = captured_lesson(answer, [*answer[:6], X], states)
    assert lesson is not None
    assert lesson.indices == (1, 3, 5, 6)


def test_nothing_predicts_what_follows_the_last_token():
    assert captured_lesson([A, B], [A, B, C], capture([A, B])) is None
    assert captured_lesson([A, B, C], [A, B], capture([A, B, C])) is None


def test_states_that_were_not_kept_teach_nothing():
    assert captured_lesson([A, B, C], [A, B, X], capture([A, B])) is None


def test_a_pass_edits_what_the_base_would_not_say_and_skips_what_is_known():
    lesson = scored_lesson([A, X, C, D], capture([A, B, C, E]), skip=(0, 1))
    assert lesson is not None
    assert lesson.indices == (2, 3)
    assert lesson.kinds == (CONSTRAINT, EDIT)
    assert scored_lesson([A], capture([A]), skip=(0,)) is None


def test_a_confirmation_edits_nothing():
    lesson = scored_lesson([A, X], capture([A, B]), is_confirmation=True)
    assert lesson is not None
    assert lesson.kinds == (CONSTRAINT, CONSTRAINT)
    batch = as_batch("f", lesson)
    assert not batch.is_edit.any()
    assert batch.targets.tolist() == [A, X]
