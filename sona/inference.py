"""Tokens out of the served model: prompts to jobs, updates to replies, answers to the journal."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from adapters.errors import AdapterNotFound
from adapters.loras import LoraStore
from adapters.store import AdapterStore, SlotKey
from engine.api import Final, Generator, HeadChoice, HeadRef, Job, Update
from engine.text import Tokenizer
from sona.answers import ChosenLora, Growing, reply, spans, spans_of
from sona.auth import Principal
from sona.captures import CaptureRing
from sona.checks import MAX_DIGITS, Limits, check_model, check_prompt_len
from sona.errors import Overloaded, RequestExists, ShuttingDown
from sona.journal import Choice, Journal, RequestRecord
from sona.ports import ModelInfo
from sona.requests import (
    AdapterChoice,
    AdapterMix,
    AdapterPin,
    ChatPrompt,
    Delta,
    EmbedCall,
    EmbedReply,
    GenerateCall,
    GenerateReply,
    LoraPin,
    Prompt,
    ScoreCall,
    ScoreReply,
    Started,
    TextPrompt,
    TokenPrompt,
    Usage,
    new_id,
)
from sona.routing import Routing

log = logging.getLogger(__name__)

_CHARS_AT_ONCE = 4_000  # of a prompt, read on the event loop: a few milliseconds


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
    loras: LoraStore
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
        prompt_ids = await self.tokenize(call.prompt)
        check_prompt_len(len(prompt_ids), self.limits)
        if self.journal.has_request(principal.tenant, call.request_id):
            raise RequestExists(
                f"request_id {call.request_id!r} has been used; choose another, or leave it empty"
            )
        lora = await self._lora(call.adapter, principal)
        job = Job(
            request_id=engine_id(principal.tenant, call.request_id),
            prompt_ids=prompt_ids,
            sampling=call.sampling,
            choose_head=self._head_choice(call.adapter, principal),
            lora=lora.ref,
            constraint=call.constraint,
            capture=call.learn and self.keeps_captures,
            tenant=principal.tenant,
            priority=call.priority,
            salt=(principal.tenant, call.cache_salt),
            session=call.session_id or None,
            deadline_s=call.deadline_s,
        )
        yield Started(request_id=call.request_id, num_prompt_tokens=len(prompt_ids))
        answers = [Growing() for _ in range(call.sampling.n)]
        first_token_s = None
        async with aclosing(self._updates(job, principal)) as updates:
            async for update in updates:
                if update.tokens and first_token_s is None:
                    first_token_s = time.monotonic() - started
                answers[update.index].take(update)
                if update.tokens or update.text:
                    yield Delta(choice_index=update.index, tokens=update.tokens, text=update.text)
        finals = [answer.ended() for answer in answers]
        if call.learn and finals[0].token_ids:  # nothing was said: nothing to correct
            self._remember(call, principal, prompt_ids, finals, lora, arrived)
        whole = reply(call, answers, lora.names, time.monotonic() - started)
        self.observe(whole, first_token_s)
        yield whole

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
        """The prompt's vector under the base model, as gates and patterns compare it."""
        job = await self._side_job(call.prompt, call.model, call.deadline_s, principal)
        embedded = await self.generator.embed(job)
        usage = Usage(
            num_prompt_tokens=len(job.prompt_ids),
            num_cached_prompt_tokens=embedded.num_cached_tokens,
        )
        return EmbedReply(self.routing.generic.unit(embedded.vector), usage)

    async def score(self, call: ScoreCall, principal: Principal) -> ScoreReply:
        """Log-probabilities of the continuation under what answers this caller."""
        job = await self._side_job(call.prompt, call.model, call.deadline_s, principal)
        lora = await self._lora(call.adapter, principal)
        job = replace(job, choose_head=self._head_choice(call.adapter, principal), lora=lora.ref)
        ids = tuple(await asyncio.to_thread(self.tokenizer.encode_continuation, call.continuation))
        scored = await self.generator.score(job, ids)
        usage = Usage(
            num_prompt_tokens=len(job.prompt_ids),
            num_completion_tokens=len(ids),
            num_cached_prompt_tokens=scored.num_cached_tokens,
        )
        return ScoreReply(
            logprobs=scored.tokens,
            usage=usage,
            adapter_versions=spans(lora.names, scored.head, len(ids)),
        )

    async def _side_job(
        self, prompt: Prompt, model: str, deadline_s: float | None, principal: Principal
    ) -> Job:
        """A job that generates nothing."""
        check_model(model, self.limits)
        ids = await self.tokenize(prompt)
        check_prompt_len(len(ids), self.limits)
        return Job(
            request_id=engine_id(principal.tenant, new_id()),
            prompt_ids=ids,
            tenant=principal.tenant,
            salt=(principal.tenant, ""),
            deadline_s=deadline_s,
        )

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids the model would see. A long text is none of the event loop's work."""
        if isinstance(prompt, TokenPrompt) or _num_chars(prompt) <= _CHARS_AT_ONCE:
            return self._prompt_ids(prompt)
        return await asyncio.to_thread(self._prompt_ids, prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Their text."""
        return await asyncio.to_thread(self.tokenizer.decode, token_ids)

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

    def _head_choice(self, adapter: AdapterChoice, principal: Principal) -> HeadChoice | None:
        if isinstance(adapter, AdapterMix):
            return self._head_choice(adapter.head, principal)
        if adapter == "none":
            return None
        if isinstance(adapter, AdapterPin):
            head = self._pinned(adapter, principal)
            return None if head is None else lambda _: head
        return self.routing.choose((principal.tenant, principal.name))

    async def _lora(self, adapter: AdapterChoice, principal: Principal) -> ChosenLora:
        """The LoRAs asked for, as one. A table that memory let go is read from disk."""
        if not isinstance(adapter, AdapterMix):
            return ChosenLora(None, ())
        return await asyncio.to_thread(self._merged, adapter.loras, principal.tenant)

    def _merged(self, pins: tuple[LoraPin, ...], tenant: str) -> ChosenLora:
        base_hash = self.model.base_hash
        refs = [self.loras.ref(tenant, p.name, p.version, base_hash=base_hash) for p in pins]
        weights = [pin.weight for pin in pins]
        ref = self.loras.mix(tenant, list(zip(refs, weights, strict=True)))
        return ChosenLora(ref, tuple((each.name, each.version) for each in refs))

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
        finals: list[Final],
        lora: ChosenLora,
        arrived: float,
    ) -> None:
        """Journal the answers without waiting for the disk, and keep their states for feedback."""
        vector = finals[0].prompt_vector if finals[0].prompt_vector.size else None
        record = RequestRecord(
            tenant=principal.tenant,
            principal=principal.name,
            request_id=call.request_id,
            model=self.model.name,
            base_hash=lora.base_hash(self.model.base_hash),
            created=arrived,
            prompt_ids=prompt_ids,
            prompt_text=self._prompt_text(call.prompt),
            prompt_vector=vector,
            choices=tuple(Choice(text=each.text, token_ids=each.token_ids) for each in finals),
            adapter_versions=spans_of(lora.names, finals),
        )
        try:
            self.journal.record_request(record)
        except (Overloaded, ShuttingDown) as error:  # the answer is made: it is not held back
            log.warning("request %s cannot take feedback: %s", call.request_id, error)
            return
        for index, final in enumerate(finals):
            if final.capture is not None:
                self.captures.put(principal.tenant, call.request_id, index, final.capture)


def _num_chars(prompt: TextPrompt | ChatPrompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(len(message.content) for message in prompt.messages)


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
