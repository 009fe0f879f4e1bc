"""Carries out a turn's work on sequences: what follows from each result, until each one ends.

admitted → LoRA slot → chunks of the prompt → head chosen → head slot → given tokens scored
  → first token, the siblings with it → a token a turn → end
"""

import logging
import time
from collections.abc import Callable

import numpy as np

from engine.admission import GENERATED_COST
from engine.answer import Answer, stop_ids, token_of
from engine.api import CaptureResult, EmbedResult, FinishReason, ScoreResult, Update
from engine.config import EnginePlan
from engine.errors import EngineError
from engine.pace import Pace
from engine.runner import Masks, Runner
from engine.scheduler import Chunk, Scheduler, Step
from engine.sequence import Kind, Sequence
from engine.step import Sampled
from engine.text import Tokenizer

log = logging.getLogger(__name__)

_NOT_FINITE = "the model produced logits that are not finite; check the weights and the LoRA"

Result = Update | CaptureResult | ScoreResult | EmbedResult | EngineError
News = list[tuple[Sequence, Result]]


class Worker:
    """Owner of the live sequences and their answers. Lives on the engine thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        plan: EnginePlan,
        pace: Pace,
    ) -> None:
        self._runner, self._scheduler, self._tokenizer = runner, scheduler, tokenizer
        self._plan, self._pace = plan, pace
        self._live: dict[Sequence, Answer | None] = {}  # an answer where one is generated
        self._news: News = []
        self._waits_for_head: Sequence | None = None  # longest, too long: nobody overtakes it
        self.num_prompt_tokens = self.num_generated_tokens = 0

    @property
    def live(self) -> list[Sequence]:
        """Sequences that have begun and not ended."""
        return list(self._live)

    def take_news(self) -> News:
        """What happened since the last call."""
        news, self._news = self._news, []
        return news

    def begin(self, sequence: Sequence) -> None:
        """A job has arrived."""
        self._guarded(sequence, self._begin)

    def cancel(self, sequence: Sequence) -> None:
        """End a job; one that has ended is ignored."""
        self._guarded(sequence, self._cancel)

    def seat(self) -> None:
        """Slots that became free go to those who wait for one, in order of admission."""
        self._waits_for_head = None
        is_lora_due = False  # somebody has waited too long: nobody overtakes it
        for sequence in list(self._scheduler.running):
            if sequence.lacks_lora and not is_lora_due:
                self._guarded(sequence, self._seat_lora)
                is_lora_due = sequence.lacks_lora and self._scheduler.queue.is_impatient(sequence)
            elif sequence.is_prefilled and (sequence.lacks_slot or sequence.is_parked):
                self._guarded(sequence, self._go_on)
                if sequence.lacks_slot and self._scheduler.queue.is_impatient(sequence):
                    self._waits_for_head = self._waits_for_head or sequence

    def vacate(self, preempted: list[Sequence]) -> None:
        """Who lost its pages gives its slots back, or two could wait for what the other has."""
        for sequence in preempted:
            self._release_slots(sequence)

    def refuse(self, sequence: Sequence, error: EngineError) -> None:
        """End a sequence that was never begun."""
        self._end(sequence, error)

    def run(self, step: Step) -> None:
        """Everything but the slice of a teacher-forced pass."""
        if step.copies:
            self._runner.copy_pages(step.copies)
        if step.decodes:
            started = time.perf_counter()
            self._decode(step.decodes)
            self._pace.decoded(time.perf_counter() - started)
        for sequence in step.reads:
            self._guarded(sequence, self._read)
        for chunk in step.chunks:
            if chunk.sequence in self._live:
                self._prefill(chunk)

    def run_capture(self, chunk: Chunk) -> None:
        """A slice of a teacher-forced pass."""
        hidden = self._runner.prefill(chunk.sequence, chunk.start, chunk.length)
        self._guarded(chunk.sequence, lambda _: self._captured(chunk, hidden))

    def _begin(self, sequence: Sequence) -> None:
        self._prepare(sequence)
        self._scheduler.add(sequence)

    def _prepare(self, sequence: Sequence) -> None:
        self._live[sequence] = None
        if sequence.kind is Kind.GENERATE:
            sequence.stop_ids = stop_ids(sequence, self._tokenizer)
            self._live[sequence] = Answer(sequence, self._tokenizer, max_len=self._plan.max_len)

    def _guarded(self, sequence: Sequence, step: Callable[[Sequence], None]) -> None:
        """What goes wrong with one sequence ends that one, and no other."""
        try:
            step(sequence)
        except EngineError as error:
            self._end(sequence, error)
        except Exception as error:
            log.exception("request %s failed inside the engine", sequence.request_id)
            self._end(sequence, EngineError(f"request {sequence.request_id} failed: {error}"))

    def _prefill(self, chunk: Chunk) -> None:
        """A chunk of what is known of a sequence: its prompt, or tokens it was forced to take."""
        sequence, started = chunk.sequence, time.perf_counter()
        hidden = self._runner.prefill(sequence, chunk.start, chunk.length)
        self._pace.prefilled(chunk.length, time.perf_counter() - started)
        self.num_prompt_tokens += max(0, min(sequence.num_prompt - chunk.start, chunk.length))
        self._keep_unread(sequence, chunk, hidden)
        self._scheduler.computed(sequence, hidden)
        if sequence.kind is Kind.GENERATE and sequence.num_generated:
            self._guarded(sequence, lambda _: self._capture_forced(chunk, hidden))
        elif chunk.is_last:
            self._guarded(sequence, lambda _: self._prefilled(sequence, hidden[-1]))

    def _keep_unread(self, sequence: Sequence, chunk: Chunk, hidden: np.ndarray) -> None:
        """Put aside the states before tokens whose log-probability is asked for."""
        first = sequence.next_read
        if first is not None:
            last = len(sequence.tokens) if sequence.kind is Kind.SCORE else sequence.num_prompt
            begin = max(0, first - 1 - chunk.start)
            end = min(chunk.length, last - 1 - chunk.start)
            if begin < end:
                sequence.unread.append(hidden[begin:end])

    def _prefilled(self, sequence: Sequence, hidden: np.ndarray) -> None:
        """The prompt is computed: choose the head once, then go on."""
        choose = sequence.job.choose_head
        if choose is not None and not sequence.has_chosen:
            assert sequence.prompt_vector is not None
            sequence.head = choose(sequence.prompt_vector)
        sequence.has_chosen = True
        if sequence.kind is Kind.EMBED:
            assert sequence.prompt_vector is not None
            self._end(sequence, EmbedResult(sequence.prompt_vector, sequence.num_cached))
            return
        sequence.parked_hidden = hidden
        self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        """Once the head's slot is resident and nothing is left to read: the first token."""
        if sequence.lacks_slot and self._waits_for_head in (None, sequence):
            assert sequence.head is not None
            sequence.slot = self._runner.heads.acquire(sequence.head) or 0
        if sequence.lacks_slot or sequence.is_reading:
            return
        if sequence.kind is Kind.SCORE:
            tokens = tuple(sequence.read)
            self._end(sequence, ScoreResult(tokens, sequence.head, sequence.num_cached))
        elif sequence.parked_hidden is not None:
            self._begin_siblings(sequence)
            self._sample_first(sequence)

    def _begin_siblings(self, leader: Sequence) -> None:
        """The other answers to the prompt go on from here, on the same pages."""
        siblings, leader.siblings = leader.siblings, ()
        for sibling in siblings:
            self._prepare(sibling)
            sibling.has_chosen = True
            if self._scheduler.fork(leader, sibling):
                sibling.parked_hidden = leader.parked_hidden
                sibling.lora_slot = self._acquire_lora(sibling)
                self._guarded(sibling, self._go_on)

    def _sample_first(self, sequence: Sequence) -> None:
        hidden, sequence.parked_hidden = sequence.parked_hidden, None
        assert hidden is not None
        sampled = self._runner.sample_one(sequence, hidden, self._masks([sequence]))
        self._accept(sequence, sampled, 0)

    def _seat_lora(self, sequence: Sequence) -> None:
        sequence.lora_slot = self._acquire_lora(sequence)

    def _acquire_lora(self, sequence: Sequence) -> int:
        lora = sequence.job.lora
        return 0 if lora is None else self._runner.loras.acquire(lora) or 0

    def _read(self, sequence: Sequence) -> None:
        """Log-probabilities of the next few given tokens."""
        hidden = np.concatenate(sequence.unread) if len(sequence.unread) > 1 else sequence.unread[0]
        now, later = np.split(hidden, [self._plan.slice_tokens])
        sequence.unread = [later] if len(later) else []
        at = sequence.next_read
        assert at is not None
        tokens = sequence.tokens[at : at + len(now)]
        read = self._runner.read(sequence, now, tokens)
        if not np.isfinite(read.logprob[: len(tokens)]).all():
            raise EngineError(_NOT_FINITE)
        num_best = sequence.job.sampling.prompt_logprobs or 0
        for row, token_id in enumerate(tokens):
            best = (np.asarray(read.best_ids[row]), np.asarray(read.best_logprobs[row]))
            sequence.read.append(token_of(token_id, float(read.logprob[row]), *best, num_best))
        self._go_on(sequence)

    def _decode(self, sequences: list[Sequence]) -> None:
        hidden, sampled = self._runner.decode(sequences, self._masks(sequences))
        for row, sequence in enumerate(sequences):
            was_known = sequence.is_replaying
            self._scheduler.computed(sequence, hidden[row : row + 1], cost=GENERATED_COST)
            if not was_known:
                self._guarded(sequence, lambda s, row=row: self._accept(s, sampled, row))
            elif sequence.num_uncaptured(sequence.num_computed):
                sequence.captured.append((sampled.captured, row))

    def _masks(self, sequences: list[Sequence]) -> Masks:
        """The tokens that the forms of the answers allow; filled in when the step asks."""
        formed = [(row, s.matcher) for row, s in enumerate(sequences) if s.matcher is not None]
        if not formed:
            return None

        def fill(words: np.ndarray) -> None:
            for row, matcher in formed:
                matcher.fill(words[row])

        return fill

    def _accept(self, sequence: Sequence, sampled: Sampled, row: int) -> None:
        answer = self._live[sequence]
        assert answer is not None
        if not np.isfinite(sampled.logprob[row]):
            raise EngineError(_NOT_FINITE)
        self.num_generated_tokens += 1
        reason = answer.accept(sampled, row)
        if reason is not None:
            self._end(sequence, answer.finish(reason))
            return
        update = answer.news()
        if update is not None:
            self._news.append((sequence, update))

    def _capture_forced(self, chunk: Chunk, hidden: np.ndarray) -> None:
        """Keep the states before tokens that were taken without being sampled."""
        sequence = chunk.sequence
        count = sequence.num_uncaptured(chunk.start + chunk.length)
        for at in range(chunk.length - count, chunk.length, self._plan.slice_tokens):
            rows = hidden[at : at + self._plan.slice_tokens]
            captured = self._runner.capture(rows)
            sequence.captured += [(captured, row) for row in range(len(rows))]

    def _captured(self, chunk: Chunk, hidden: np.ndarray) -> None:
        """Keep the states that predict the continuation; end the pass with its last chunk."""
        sequence = chunk.sequence
        first = max(0, sequence.num_prompt - 1 - chunk.start)
        if first < chunk.length:
            captured = self._runner.capture(hidden[first:])
            sequence.captured += [(captured, row) for row in range(chunk.length - first)]
        self._scheduler.computed(sequence, hidden)
        if chunk.is_last:
            capture = sequence.stacked_capture()
            assert capture is not None and sequence.prompt_vector is not None
            result = CaptureResult(capture=capture, prompt_vector=sequence.prompt_vector)
            self._end(sequence, result)

    def _cancel(self, sequence: Sequence) -> None:
        if sequence not in self._live:
            return
        siblings, sequence.siblings = sequence.siblings, ()
        for sibling in siblings:  # not begun: they end with it
            self._prepare(sibling)
        for each in (sequence, *siblings):
            answer = self._live[each]
            cancelled = EngineError(f"request {each.request_id} was cancelled")
            self._end(each, answer.finish(FinishReason.CANCELLED) if answer else cancelled)

    def _end(self, sequence: Sequence, result: Result) -> None:
        self._scheduler.remove(sequence)
        self._release_slots(sequence)
        self._live.pop(sequence, None)
        self._news.append((sequence, result))

    def _release_slots(self, sequence: Sequence) -> None:
        if sequence.slot and sequence.head is not None:
            self._runner.heads.release(sequence.head)
        if sequence.lora_slot and sequence.job.lora is not None:
            self._runner.loras.release(sequence.job.lora)
        sequence.slot = sequence.lora_slot = 0
