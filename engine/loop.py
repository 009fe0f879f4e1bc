"""The one thread that owns device state. Everyone else talks to it through an inbox.

Per turn: take what arrived, ask the scheduler, run it, hand the news out. Once per turn the news
of all sequences leave in one call, so the receiver is woken once, not once per token.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.api import EngineStats
from engine.config import EnginePlan
from engine.errors import EngineStopped
from engine.pace import Pace, Slack
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.text import Tokenizer
from engine.worker import News, Worker

log = logging.getLogger(__name__)

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
        tokenizer: Tokenizer,
        plan: EnginePlan,
        deliver: Deliver,
    ) -> None:
        self._runner, self._plan, self._deliver = runner, plan, deliver
        pace = Pace(plan.prefill_buckets)
        self._scheduler = Scheduler(plan, pace, seats=runner.loras)
        self._worker = Worker(runner, self._scheduler, tokenizer, plan, pace)
        self._inbox: queue.Queue[Sequence | _Cancel | None] = queue.Queue()
        self._num_steps = 0
        self._busy_s = self._learning_s = 0.0
        self._slack = Slack(plan.learning_fraction)
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
            num_waiting=scheduler.queue.num_waiting,
            num_waiting_tokens=scheduler.queue.num_tokens,
            num_pages=self._plan.num_pages,
            num_free_pages=scheduler.holdings.pages.num_free,
            num_idle_pages=scheduler.holdings.pages.num_idle,
            num_session_pages=scheduler.holdings.num_session_pages,
            num_preemptions=scheduler.num_preemptions,
            num_recompiles=self._runner.num_recompiles,
            num_prompt_tokens=self._worker.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_generated_tokens=self._worker.num_generated_tokens,
            num_steps=self._num_steps,
            num_resident_heads=self._runner.heads.num_resident,
            num_resident_loras=self._runner.loras.num_resident,
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
            ended = [(sequence, error) for sequence in (*self._worker.live, *late)]
            # Also when empty: the receiver learns of the end by it.
            self._deliver([*self._worker.take_news(), *ended])

    def _take_inbox(self) -> bool:
        """Accept what arrived; waits when there is nothing to run. False: stop."""
        idle = not (self._scheduler.has_user_work or self._scheduler.capturing)
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
                self._worker.cancel(item.sequence)
            else:
                self._worker.begin(item)

    def _turn(self) -> None:
        started = time.perf_counter()
        scheduler, worker = self._scheduler, self._worker
        users_wait = scheduler.has_user_work
        worker.seat()
        step = scheduler.next(may_learn=self._slack.may_learn)
        worker.vacate(scheduler.take_preempted())
        for sequence in scheduler.take_late():
            worker.refuse(sequence, self._scheduler.queue.too_late(sequence))
        if not step:
            return
        self._num_steps += 1
        worker.run(step)
        learning_from = time.perf_counter()
        if step.capture is not None:
            worker.run_capture(step.capture)
        ended = time.perf_counter()
        self._busy_s += ended - started
        self._learning_s += ended - learning_from
        if users_wait:
            self._slack.spent(ended - started, ended - learning_from)

    def _hand_out(self) -> None:
        news = self._worker.take_news()
        if news:
            self._deliver(news)


def _drained(inbox: "queue.Queue[Sequence | _Cancel | None]") -> "list[Sequence | _Cancel | None]":
    items = []
    while True:
        try:
            items.append(inbox.get_nowait())
        except queue.Empty:
            return items
