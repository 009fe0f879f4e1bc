"""Patterns to learn in tests: a made-up world's states as batches of feedback."""

import numpy as np
from support.captures import capture_of, rows_of

from adapters.batch import Batch
from adapters.head import learn
from adapters.metric import KeyMetric
from adapters.state import HeadState


def bf16(states):
    """States that bfloat16 holds exactly, so that a reference sees what the learner sees."""
    return capture_of(states, np.ones((65, states.shape[1]))).hidden.astype(np.float64)


class Topic:
    """Prompts of one gate in a world: each about an entity, at which the base says an answer."""

    def __init__(self, world):
        self.world = world
        self.rows = rows_of(world.head)
        self.metric = KeyMetric.fit(world.generic(1500))
        self.topic = world.draw(1)
        self.labels = world.rng.choice(world.vocab, 16, replace=False)

    def states(self, entities, answers):
        """One state for each entity, in bfloat16 precision, float64."""
        topics = np.repeat(self.topic, len(entities), axis=0)
        return bf16(self.world.states(topics, entities, answers))

    def facts(self, count, wrong=None):
        """`count` states about different entities, what the base says there, and other labels."""
        answers = self.world.rng.choice(self.labels, count) if wrong is None else wrong
        states = self.states(self.world.draw(count), answers)
        said = (states @ self.world.head.T).argmax(1)
        others = [self.world.rng.choice(self.labels[self.labels != token]) for token in said]
        return states, said, np.array(others)

    def batch(self, feedback_id, states, targets, *, is_edit=True):
        """Feedback on some states; `is_edit` for all of them or one by one."""
        count = len(states)
        return Batch(
            feedback_id=feedback_id,
            capture=capture_of(states, self.world.head),
            targets=np.asarray(targets, np.int32),
            is_edit=np.broadcast_to(np.asarray(is_edit, np.bool_), (count,)).copy(),
        )

    def batches(self, states, targets, prefix="f"):
        """One correction for each state."""
        return [
            self.batch(f"{prefix}{index}", states[index : index + 1], targets[index : index + 1])
            for index in range(len(states))
        ]

    def learned(self, batches, state=None):
        """The state after these batches, at least one, and the last report."""
        first, *others = batches
        state, report = learn(state or HeadState.empty(self.metric), first, self.rows)
        for batch in others:
            state, report = learn(state, batch, self.rows)
        return state, report
