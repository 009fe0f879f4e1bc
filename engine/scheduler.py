"""Who runs next. Integers and deques; no arrays, no device.

A prompt is computed in chunks, one sequence at a time, and a decode step of everybody runs
between two chunks. When pages run out the sequence admitted last gives its pages back and starts
again from its tokens (Kwon 2023, arXiv:2309.06180, section 4.5). Teacher-forced passes take
what users leave and lose their pages first.
"""

import time
from collections import deque
from dataclasses import dataclass

from engine.config import EnginePlan
from engine.kv.pages import PageTable
from engine.sequence import Kind, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens [start, start + length) of one sequence."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Decode:
    """One token of each sequence."""

    sequences: list[Sequence]


class Scheduler:
    """Owner of the queues and of every page a sequence holds."""

    def __init__(self, plan: EnginePlan) -> None:
        self._plan = plan
        self.pages = PageTable(plan.num_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by admission, oldest first
        self.scoring: deque[Sequence] = deque()
        self._rows = list(range(plan.max_num_seqs - 1, -1, -1))
        self._decoded_last = True
        self._preempted: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_user_work(self) -> bool:
        """Whether any user waits for anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a job."""
        (self.scoring if sequence.kind is Kind.SCORE else self.waiting).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a job, finished or cancelled; its pages and row return now."""
        self._give_back(sequence)
        for queue in (self.waiting, self.running, self.scoring):
            if sequence in queue:
                queue.remove(sequence)

    def take_preempted(self) -> list[Sequence]:
        """Sequences that lost their pages since the last call; what else they hold must go too."""
        taken, self._preempted = self._preempted, []
        return taken

    def next(self, *, may_learn: bool) -> Chunk | Decode | None:
        """The next piece of work, with its pages reserved; None when there is nothing to do."""
        self._admit()
        if may_learn or not self.has_user_work:
            chunk = self._next_score()
            if chunk is not None:
                return chunk
        prefilling = next((s for s in self.running if not s.is_prefilled), None)
        decoding = [s for s in self.running if s.is_decoding]
        if prefilling is not None and (self._decoded_last or not decoding):
            self._decoded_last = False
            return self._chunk(prefilling, self._plan.prefill_buckets[-1])
        self._decoded_last = True
        decoding = self._reserve(decoding)
        return Decode(decoding) if decoding else None

    def _admit(self) -> None:
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            if not self._take_pages(sequence, len(sequence.tokens) + 1, may_evict=True):
                return
            self.waiting.popleft()
            sequence.row = self._rows.pop()
            sequence.admitted_s = sequence.admitted_s or time.monotonic()
            self.running.append(sequence)

    def _next_score(self) -> Chunk | None:
        if not self.scoring:
            return None
        sequence = self.scoring[0]
        if not self._take_pages(sequence, len(sequence.tokens), may_evict=False):
            return None
        return self._chunk(sequence, self._plan.score_chunk)

    def _chunk(self, sequence: Sequence, limit: int) -> Chunk:
        start, target = sequence.num_computed, sequence.prefill_target
        length = min(limit, target - start)
        return Chunk(sequence, start, length, is_last=start + length == target)

    def _reserve(self, decoding: list[Sequence]) -> list[Sequence]:
        """Those of `decoding` that have a page for their next token, preempting for the rest."""
        kept = []
        for sequence in decoding:
            if sequence.row < 0:
                continue  # lost its pages to an older one a moment ago
            while not self._take_pages(sequence, sequence.num_computed + 1, may_evict=True):
                victim = self.running[-1]
                self._preempt(victim)
                if victim in kept:
                    kept.remove(victim)
                if victim is sequence:
                    break
            if sequence.row >= 0:
                kept.append(sequence)
        return kept

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self._preempted.append(sequence)
        self.num_preemptions += 1

    def _take_pages(self, sequence: Sequence, num_tokens: int, *, may_evict: bool) -> bool:
        """Grow to hold `num_tokens`. A user's sequence may evict teacher-forced passes."""
        wanted = min(num_tokens, self._plan.max_len)
        missing = -(-wanted // self._plan.page_size) - len(sequence.pages)
        if missing <= 0:
            return True
        if may_evict and missing > self.pages.num_free:
            for score in self.scoring:
                self._give_back(score)
        taken = self.pages.take(missing)
        if taken is None:
            return False
        sequence.pages += taken
        return True

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
        sequence.parked_hidden = None
        if sequence.prompt_vector is None:
            sequence.vector_sum = None
        if sequence.kind is Kind.SCORE:
            sequence.captured.clear()
        if sequence.row >= 0:
            self._rows.append(sequence.row)
            sequence.row = -1
