"""Tokens out of the served model: prompts to jobs, updates to replies, answers to the journal."""

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from adapters.errors import AdapterNotFound
from adapters.store import AdapterStore, SlotKey
from engine.api import Final, Generator, HeadChoice, HeadRef, Job, Token, Update
from engine.text import Tokenizer
from sona.auth import Principal
from sona.captures import CaptureRing
from sona.checks import MAX_DIGITS, Limits, check_model, check_prompt_len
from sona.errors import Overloaded, RequestExists, ShuttingDown
from sona.journal import AdapterSpan, Choice, Journal, RequestRecord
from sona.ports import ModelInfo
from sona.requests import (
    AdapterPin,
    Answer,
    CallTiming,
    ChatPrompt,
    Delta,
    EmbedCall,
    EmbedReply,
    GenerateCall,
    GenerateReply,
    Prompt,
    Started,
    TextPrompt,
    TokenPrompt,
    Usage,
    new_id,
)
from sona.routing import Routing

log = logging.getLogger(__name__)


def engine_id(tenant: str, request_id: str) -> str:
    """A request's name inside the engine, where all tenants meet. No two pairs share one."""
    return f"{len(tenant)}/{tenant}/{request_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceService:
    """Implements `sona.ports.Inference`. Holds no state of a request."""

    generator: Generator
    tokenizer: Tokenizer
    routing: Routing
    store: AdapterStore
    journal: Journal
    captures: CaptureRing
    model: ModelInfo
    limits: Limits
    keeps_captures: bool  # False: the server does not learn
    running: dict[str, str]  # engine id to principal, of requests under way
    observe: Callable[[GenerateReply, float | None], None]  # reply, seconds to the first token

    async def generate(
        self, call: GenerateCall, principal: Principal
    ) -> AsyncGenerator[Started | Delta | GenerateReply, None]:
        """One Started, Deltas, and at last one GenerateReply. Closing the generator aborts."""
        arrived = time.time()
        started = time.monotonic()
        check_model(call.model, self.limits)
        prompt_ids = self._prompt_ids(call.prompt)
        check_prompt_len(len(prompt_ids), self.limits)
        if self.journal.has_request(principal.tenant, call.request_id):
            raise RequestExists(
                f"request_id {call.request_id!r} has been used; choose another, or leave it empty"
            )
        job = Job(
            request_id=engine_id(principal.tenant, call.request_id),
            prompt_ids=prompt_ids,
            sampling=call.sampling,
            choose_head=self._head_choice(call, principal),
            capture=call.learn and self.keeps_captures,
        )
        yield Started(request_id=call.request_id, num_prompt_tokens=len(prompt_ids))
        tokens: list[Token] = []
        first_token_s = None
        async with aclosing(self._updates(job, principal)) as updates:
            async for update in updates:
                if update.tokens and first_token_s is None:
                    first_token_s = time.monotonic() - started
                tokens += update.tokens
                if update.tokens or update.text:
                    yield Delta(tokens=update.tokens, text=update.text)
                if update.final is None:
                    continue
                if call.learn and update.final.token_ids:  # nothing was said: nothing to correct
                    self._remember(call, principal, prompt_ids, update.final, arrived)
                total_s = time.monotonic() - started
                logprobs = tuple(tokens) if call.sampling.logprobs is not None else ()
                reply = _reply(call.request_id, update.final, logprobs, total_s)
                self.observe(reply, first_token_s)
                yield reply

    async def _updates(self, job: Job, principal: Principal) -> AsyncGenerator[Update, None]:
        """The engine's updates, with the request listed as running meanwhile."""
        if job.request_id in self.running:  # the other one's entry must outlive this refusal
            raise RequestExists("a request with this request_id is running; choose another")
        async with aclosing(self.generator.generate(job)) as updates:
            self.running[job.request_id] = principal.name
            try:
                async for update in updates:
                    yield update
            finally:
                self.running.pop(job.request_id, None)

    async def embed(self, call: EmbedCall, principal: Principal) -> EmbedReply:
        """The prompt's mean final hidden state under the base model."""
        check_model(call.model, self.limits)
        ids = self._prompt_ids(call.prompt)
        check_prompt_len(len(ids), self.limits)
        vector = await self.generator.embed(engine_id(principal.tenant, new_id()), ids)
        return EmbedReply(vector, len(ids))

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids the model would see."""
        return self._prompt_ids(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Their text."""
        return self.tokenizer.decode(token_ids)

    def models(self) -> tuple[ModelInfo, ...]:
        """What is served."""
        return (self.model,)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, ChatPrompt):
            return tuple(self.tokenizer.chat_ids([m.as_dict() for m in prompt.messages]))
        if isinstance(prompt, TextPrompt):
            return tuple(self.tokenizer.encode(prompt.text))
        return prompt.ids

    def _prompt_text(self, prompt: Prompt) -> str:
        """What is kept for people to read: text as it came, messages as JSON."""
        match prompt:
            case TextPrompt(text):
                return text
            case ChatPrompt(messages):
                return json.dumps([m.as_dict() for m in messages], ensure_ascii=False)
            case TokenPrompt(ids):
                return self.tokenizer.decode(ids)

    def _head_choice(self, call: GenerateCall, principal: Principal) -> HeadChoice | None:
        if call.adapter == "none":
            return None
        if isinstance(call.adapter, AdapterPin):
            head = self._pinned(call.adapter, principal)
            return None if head is None else lambda _: head
        return self.routing.choose((principal.tenant, principal.name))

    def _pinned(self, pin: AdapterPin, principal: Principal) -> HeadRef | None:
        """A version by name, the caller's own before the tenant's. None is the base model."""
        for slot in own_slots(pin.name, principal):
            info = self.store.history(slot)
            if not info:
                continue
            number = info[-1].number if pin.version is None else pin.version
            if number == 0:
                return None
            return self.store.get(slot, number, base_hash=self.model.base_hash).head_ref()
        raise AdapterNotFound(
            f"no adapter {pin.name!r} belongs to you or your tenant; ListAdapters names those "
            'that do, "none" is the base model'
        )

    def _remember(
        self,
        call: GenerateCall,
        principal: Principal,
        prompt_ids: tuple[int, ...],
        final: Final,
        arrived: float,
    ) -> None:
        """Journal the answer without waiting for the disk, and keep its states for feedback."""
        vector = final.prompt_vector if final.prompt_vector.size else None
        record = RequestRecord(
            tenant=principal.tenant,
            principal=principal.name,
            request_id=call.request_id,
            model=self.model.name,
            base_hash=self.model.base_hash,
            created=arrived,
            prompt_ids=prompt_ids,
            prompt_text=self._prompt_text(call.prompt),
            prompt_vector=vector,
            choices=(Choice(text=final.text, token_ids=final.token_ids),),
            adapter_versions=_spans(final),
        )
        try:
            self.journal.record_request(record)
        except (Overloaded, ShuttingDown) as error:  # the answer is made: it is not held back
            log.warning("request %s cannot take feedback: %s", call.request_id, error)
            return
        if final.capture is not None:
            self.captures.put(principal.tenant, call.request_id, final.capture)


def own_slots(name: str, principal: Principal) -> tuple[SlotKey, ...]:
    """Where an adapter of this name may lie for a caller: its own slot, then the tenant's."""
    head, _, number = name.rpartition("-")
    is_number = number.isascii() and number.isdigit() and len(number) <= MAX_DIGITS
    if head != "pattern" or not is_number:
        return ()
    where = {"tenant": principal.tenant, "pattern_id": int(number)}
    return (
        SlotKey(scope="principal", owner=principal.name, **where),
        SlotKey(scope="tenant", owner="", **where),
    )


def _spans(final: Final) -> tuple[AdapterSpan, ...]:
    if final.head is None or not final.num_completion_tokens:
        return ()
    return (AdapterSpan(final.head.name, final.head.version, 0, final.num_completion_tokens),)


def _reply(
    request_id: str, final: Final, logprobs: tuple[Token, ...], total_s: float
) -> GenerateReply:
    answer = Answer(
        text=final.text,
        token_ids=final.token_ids,
        logprobs=logprobs,
        finish_reason=final.finish_reason,
        stop_match=final.stop_match,
    )
    timing = final.timing
    return GenerateReply(
        request_id=request_id,
        answers=(answer,),
        usage=Usage(
            num_prompt_tokens=final.num_prompt_tokens,
            num_completion_tokens=final.num_completion_tokens,
        ),
        timing=CallTiming(
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            decode_s=timing.decode_s,
            total_s=total_s,
        ),
        adapter_versions=_spans(final),
        pattern_ids=() if final.head is None else (int(final.head.slot_key[3]),),
    )
