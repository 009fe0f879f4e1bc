"""Ways to keep a stream of conventions below the head, the good ones and those that fail.

sequential   one LoRA, trained on and on
fresh        a new LoRA for each convention, merged into what was learned before
+ewc         held by the Fisher information of everything before it (EWC++ on the product)
+replay      a few answers of every earlier convention and of base traffic in each batch
+prior       the Fisher information of base traffic from the start
routed       a LoRA for each convention, the right one for each question (an oracle)
merged       the same LoRAs, as their mean
joint        all conventions at once: what can be had
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from adapters.consolidate import Learned
from adapters.example import Example
from adapters.lora import compressed, merge
from adapters.tune import TuneConfig
from engine.api import LoraTable
from sona.bench.continual import Record
from sona.bench.lab import Lab
from sona.bench.stream import Task
from sona.bench.tasks import Item

ARMS = (
    "sequential", "fresh", "fresh+ewc", "fresh+replay", "fresh+ewc+replay+prior", "routed",
    "merged", "joint",
)  # fmt: skip
CONFIG = TuneConfig(rank=8, alpha=16.0, learning_rate=5e-3, num_steps=60)
_KEPT = 10  # answers of a convention that are replayed
_NUM_RETAINED = 64  # answers by which the penalty's weight is held


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """A stream as a model sees it."""

    tasks: Sequence[Task]
    new: Sequence[Sequence[Example]]  # by task
    confirmed: Sequence[Sequence[Example]]
    generic: Sequence[Example]  # base traffic that no task changes
    exam: Sequence[Item]  # more of it, held out
    seed: int


class Arm(Protocol):
    """A learner of one course."""

    def learn(self, stage: int) -> None:
        """Take in the lessons of a task."""
        ...

    def table(self, task: int | None) -> LoraTable | None:
        """What answers a task's questions, or (None) those of base traffic."""
        ...


@dataclass(slots=True)
class Sequential:
    """One LoRA for all."""

    lab: Lab
    course: Course
    shared: LoraTable | None = None

    def learn(self, stage: int) -> None:
        course = self.course
        pools = [course.new[stage], course.confirmed[stage]]
        seed = 100 * course.seed + stage
        self.shared = self.lab.train(pools, start=self.shared, seed=seed)

    def table(self, task: int | None) -> LoraTable | None:
        return self.shared


@dataclass(slots=True)
class Fresh:
    """Merge and begin anew, with or without what keeps the old."""

    lab: Lab
    course: Course
    has_ewc: bool
    has_replay: bool
    has_prior: bool
    learned: Learned = field(default_factory=Learned)
    kept: list[Example] = field(default_factory=list[Example])

    def __post_init__(self) -> None:
        if self.has_prior:
            fisher = self.lab.fisher(self.course.generic, None, self.course.seed)
            self.learned = Learned(None, fisher)

    def learn(self, stage: int) -> None:
        course, lab, before = self.course, self.lab, self.learned
        pools = [course.new[stage], course.confirmed[stage]]
        if self.has_replay:
            pools += [self.kept, course.generic]
        is_held = self.has_ewc and before.fisher is not None
        retained = [*self.kept, *course.generic][:_NUM_RETAINED] if is_held else []
        seed = 100 * course.seed + stage
        fresh = lab.train(
            pools,
            learned=before,
            fisher=before.fisher.normalised() if is_held and before.fisher else None,
            retained=retained,
            seed=seed,
        )
        parts = [(fresh, 1.0)] if before.table is None else [(before.table, 1.0), (fresh, 1.0)]
        own = [*course.new[stage], *course.confirmed[stage]]
        fisher = lab.fisher(own, merge(parts), seed)
        self.learned, _ = before.consolidated(fresh, fisher, rank=lab.max_rank)
        self.kept += course.new[stage][:_KEPT]

    def table(self, task: int | None) -> LoraTable | None:
        return self.learned.table


@dataclass(slots=True)
class Separate:
    """A LoRA for each task: the right one by an oracle, or the mean of all."""

    lab: Lab
    course: Course
    is_merged: bool
    own: list[LoraTable] = field(default_factory=list[LoraTable])

    def learn(self, stage: int) -> None:
        course = self.course
        pools = [course.new[stage], course.confirmed[stage]]
        self.own.append(self.lab.train(pools, seed=100 * course.seed + stage))

    def table(self, task: int | None) -> LoraTable | None:
        if self.is_merged:
            mean = merge([(each, 1.0 / len(self.own)) for each in self.own])
            return compressed(mean, self.lab.max_rank)[0]
        return self.own[task] if task is not None and task < len(self.own) else None


@dataclass(slots=True)
class Joint:
    """Everything at once, at the end."""

    lab: Lab
    course: Course
    whole: LoraTable | None = None

    def learn(self, stage: int) -> None:
        course, num = self.course, len(self.course.tasks)
        if stage < num - 1:
            return
        wide = min(4 * CONFIG.rank, self.lab.max_rank)
        config = replace(CONFIG, rank=wide, alpha=2.0 * wide, num_steps=CONFIG.num_steps * num)
        new = [example for part in course.new for example in part]
        confirmed = [example for part in course.confirmed for example in part]
        pools = [new, confirmed, course.generic]
        self.whole = self.lab.train(pools, seed=course.seed, config=config)

    def table(self, task: int | None) -> LoraTable | None:
        return self.whole


def arm_of(name: str, lab: Lab, course: Course) -> Arm:
    """A learner by the name of its arm. Raises ValueError."""
    if name not in ARMS:
        raise ValueError(f"there is no arm {name!r}; choose from {', '.join(ARMS)}")
    parts = set(name.split("+"))
    if "fresh" in parts:
        return Fresh(lab, course, "ewc" in parts, "replay" in parts, "prior" in parts)
    if name in ("routed", "merged"):
        return Separate(lab, course, is_merged=name == "merged")
    return Joint(lab, course) if name == "joint" else Sequential(lab, course)


async def follow(arm: Arm, lab: Lab, course: Course, base: Record) -> Record:
    """Teach a course task by task, with an exam in everything after each."""
    rows, generic = [], []
    for stage in range(len(course.tasks)):
        arm.learn(stage)
        row, rest = await examine(arm, lab, course)
        rows.append(row)
        generic.append(rest)
    return Record(np.array(rows), base.accuracy[0], np.array(generic), base.generic_base)


async def examine(arm: Arm | None, lab: Lab, course: Course) -> tuple[list[float], float]:
    """Accuracy on every task's held-out items and on base traffic; arm None is the base."""
    row = []
    for index, task in enumerate(course.tasks):
        table = None if arm is None else arm.table(index)
        row.append(await lab.exam(task.held_out, lambda item, t=task: (t.target(item),), table))
    table = None if arm is None else arm.table(None)
    return row, await lab.exam(course.exam, lambda item: item.answers, table)
