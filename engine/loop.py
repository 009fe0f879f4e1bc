"""The one thread that owns device state. Everyone else talks to it through a bounded inbox.

Per turn: take what arrived, ask the scheduler, run it, hand the news out. Once per turn the news
of all sequences leave in one call, so the receiver is woken once, not once per token.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.api import EngineStats, FinishReason, ScoreResult, Update
from engine.config import EnginePlan
from engine.errors import EngineError, EngineStopped
from engine.runner import Runner
from engine.scheduler import Chunk, Decode, Scheduler
from engine.sequence import Answer, Kind, Sequence
from engine.step import Sampled
from engine.text import Tokenizer

log = logging.getLogger(__name__)

Result = Update | ScoreResult | np.ndarray | EngineError
News = list[tuple[Sequence, Result]]
Deliver = Callable[[News], None]
_IDLE_WAIT_S = 1.0  # between looks at the stop flag when nothing arrives


@dataclass(frozen=True, slots=True)
class _Cancel:
    sequence: Sequence


class EngineLoop:
    """Runs sequences until stopped. `deliver` is called on the engine thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        plan: EnginePlan,
        deliver: Deliver,
    ) -> None:
        self._runner, self._scheduler, self._tokenizer = runner, scheduler, tokenizer
        self._plan, self._deliver = plan, deliver
        self._inbox: queue.Queue[Sequence | _Cancel | None] = queue.Queue()
        self._live: dict[Sequence, Answer | None] = {}  # an answer where one is generated
        self._news: News = []
        self._num_prompt_tokens = self._num_generated_tokens = self._num_steps = 0
        self._busy_s = self._learning_s = 0.0
        self._learning_credit_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.is_stopped = False

    def start(self) -> None:
        """Begin serving."""
        self._thread.start()

    def stop(self) -> None:
        """End; jobs still running are answered with EngineStopped. Returns when the thread did."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, sequence: Sequence) -> None:
        """Hand a job over. The caller bounds how many are under way."""
        self._inbox.put(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a job; its pages are free before the next step. One that has ended is ignored."""
        self._inbox.put(_Cancel(sequence))

    def stats(self) -> EngineStats:
        """Counters as of the last turn."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_pages=self._plan.num_pages,
            num_free_pages=scheduler.pages.num_free,
            num_preemptions=scheduler.num_preemptions,
            num_recompiles=self._runner.num_recompiles,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_steps=self._num_steps,
            num_resident_heads=self._runner.slots.num_resident,
            busy_s=self._busy_s,
            learning_s=self._learning_s,
        )

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._turn()
                self._hand_out()
        except Exception:
            log.exception("the engine thread failed; nothing more will be served")
        finally:
            self.is_stopped = True  # what is submitted from now on is refused by the caller
            error = EngineStopped("the engine has stopped; restart the server")
            late = [item for item in _drained(self._inbox) if isinstance(item, Sequence)]
            self._news += [(sequence, error) for sequence in (*self._live, *late)]
            self._deliver(self._news)  # also when empty: the receiver learns of the end by it

    def _take_inbox(self) -> bool:
        """Accept what arrived; waits when there is nothing to run. False: stop."""
        idle = not (self._scheduler.has_user_work or self._scheduler.scoring)
        while True:
            try:
                item = self._inbox.get(block=idle, timeout=_IDLE_WAIT_S)
            except queue.Empty:
                if idle:
                    continue
                return True
            if item is None:
                return False
            idle = False
            if isinstance(item, _Cancel):
                self._guarded(item.sequence, self._cancel)
            else:
                self._guarded(item, self._begin)

    def _begin(self, sequence: Sequence) -> None:
        self._live[sequence] = None
        if sequence.kind is Kind.GENERATE:
            self._live[sequence] = Answer(sequence, self._tokenizer, max_len=self._plan.max_len)
        self._scheduler.add(sequence)

    def _guarded(self, sequence: Sequence, step: Callable[[Sequence], None]) -> None:
        """What goes wrong with one sequence ends that one, and no other."""
        try:
            step(sequence)
        except EngineError as error:
            self._end(sequence, error)
        except Exception as error:
            log.exception("request %s failed inside the engine", sequence.request_id)
            self._end(sequence, EngineError(f"request {sequence.request_id} failed: {error}"))

    def _turn(self) -> None:
        started = time.perf_counter()
        self._unpark()
        users_wait = self._scheduler.has_user_work
        work = self._scheduler.next(may_learn=self._learning_credit_s > 0)
        for sequence in self._scheduler.take_preempted():
            self._release_slot(sequence)  # or two waiters could hold what the other needs
        if work is None:
            return
        is_learning = isinstance(work, Chunk) and work.sequence.kind is Kind.SCORE
        if isinstance(work, Decode):
            self._decode(work.sequences)
        else:
            self._prefill(work)
        self._num_steps += 1
        self._account(time.perf_counter() - started, is_learning=is_learning, idle=not users_wait)

    def _account(self, spent_s: float, *, is_learning: bool, idle: bool) -> None:
        """Book engine time. Learning earns its share of what users spend, at most one slice."""
        self._busy_s += spent_s
        if is_learning:
            self._learning_s += spent_s
        if idle:
            return
        share = self._plan.learning_fraction
        earned = -spent_s if is_learning else spent_s * share / (1 - share + 1e-9)
        self._learning_credit_s = min(self._learning_credit_s + earned, 0.05)

    def _prefill(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        hidden, total = self._runner.prefill(sequence, chunk.start, chunk.length)
        sequence.num_computed += chunk.length
        if sequence.kind is Kind.SCORE:
            self._guarded(sequence, lambda _: self._score(chunk, hidden))
            return
        if sequence.prompt_vector is None:
            sequence.add_vector(total)
            self._num_prompt_tokens += chunk.length
        if chunk.is_last:
            self._guarded(sequence, lambda _: self._prefilled(sequence, hidden[-1]))

    def _prefilled(self, sequence: Sequence, hidden: np.ndarray) -> None:
        """The prompt is computed: choose the head once, then sample the first token."""
        self._runner.set_pages(sequence)
        if sequence.prompt_vector is None:
            assert sequence.vector_sum is not None
            sequence.prompt_vector = (sequence.vector_sum / sequence.num_prompt).astype(np.float32)
            choose = sequence.job.choose_head
            sequence.head = choose(sequence.prompt_vector) if choose is not None else None
        if sequence.kind is Kind.EMBED:
            self._end(sequence, sequence.prompt_vector)
            return
        if not sequence.num_generated:  # else it was preempted and goes on where it was
            sequence.parked_hidden = hidden
        self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        """As soon as the head's slot is resident: sample the first token from the parked state."""
        if sequence.lacks_slot:
            assert sequence.head is not None
            slot = self._runner.slots.acquire(sequence.head)
            if slot is None:
                return
            sequence.slot = slot
        if sequence.parked_hidden is not None:
            hidden, sequence.parked_hidden = sequence.parked_hidden, None
            self._accept(sequence, self._runner.sample_one(sequence, hidden), 0)

    def _unpark(self) -> None:
        parked = [s for s in self._scheduler.running if s.is_prefilled and s.lacks_slot]
        for sequence in parked:
            self._guarded(sequence, self._go_on)

    def _decode(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._runner.set_pages(sequence)
        sampled = self._runner.decode(sequences)
        for row, sequence in enumerate(sequences):
            was_replay = sequence.is_replaying
            sequence.num_computed += 1
            if not was_replay:
                self._guarded(sequence, lambda s, row=row: self._accept(s, sampled, row))

    def _accept(self, sequence: Sequence, sampled: Sampled, row: int) -> None:
        answer = self._live[sequence]
        assert answer is not None
        if not np.isfinite(sampled.logprob[row]):
            raise EngineError("the model produced logits that are not finite; check the weights")
        self._num_generated_tokens += 1
        reason = answer.accept(sampled, row)
        if reason is not None:
            self._end(sequence, answer.finish(reason))
            return
        update = answer.news()
        if update is not None:
            self._news.append((sequence, update))

    def _score(self, chunk: Chunk, hidden: np.ndarray) -> None:
        """Keep the states that predict the continuation; end the pass with its last chunk."""
        sequence = chunk.sequence
        num_prompt = sequence.num_prompt
        in_prompt = max(0, min(num_prompt - chunk.start, chunk.length))
        if in_prompt:
            sequence.add_vector(hidden[:in_prompt].astype(np.float64).sum(axis=0))
        first = max(0, num_prompt - 1 - chunk.start)
        if first < chunk.length:
            captured = self._runner.capture(hidden[first:])
            sequence.captured += [(captured, row) for row in range(chunk.length - first)]
        if chunk.is_last:
            capture = sequence.stacked_capture()
            assert capture is not None and sequence.vector_sum is not None
            vector = (sequence.vector_sum / num_prompt).astype(np.float32)
            self._end(sequence, ScoreResult(capture=capture, prompt_vector=vector))

    def _cancel(self, sequence: Sequence) -> None:
        if sequence not in self._live:
            return
        answer = self._live[sequence]
        if answer is not None:
            self._end(sequence, answer.finish(FinishReason.CANCELLED))
        else:
            self._end(sequence, EngineError(f"request {sequence.request_id} was cancelled"))

    def _end(self, sequence: Sequence, result: Result) -> None:
        self._scheduler.remove(sequence)
        self._release_slot(sequence)
        self._live.pop(sequence, None)
        self._news.append((sequence, result))

    def _release_slot(self, sequence: Sequence) -> None:
        if sequence.slot and sequence.head is not None:
            self._runner.slots.release(sequence.head)
            sequence.slot = 0

    def _hand_out(self) -> None:
        if self._news:
            news, self._news = self._news, []
            self._deliver(news)


def _drained(inbox: "queue.Queue[Sequence | _Cancel | None]") -> "list[Sequence | _Cancel | None]":
    items = []
    while True:
        try:
            items.append(inbox.get_nowait())
        except queue.Empty:
            return items
