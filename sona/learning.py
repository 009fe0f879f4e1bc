"""What was learned, and when learning runs: the state of the adapters as callers may see it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import AdapterNotFound, IncompatibleAdapter
from adapters.loras import LoraInfo, LoraStore, check_name
from adapters.peft import Sizes, read_peft
from adapters.store import AdapterStore, Scope, SlotKey, VersionInfo
from sona.auth import Principal
from sona.events import EventBus
from sona.inference import own_slots
from sona.journal import FeedbackRecord, Journal
from sona.loops.instant import InstantLoop
from sona.ports import (
    AdapterHistory,
    AdapterInfo,
    Event,
    EventKind,
    LearningState,
    LearningStatus,
    Revision,
    Rollback,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningService:
    """Implements `sona.ports.Learning`. The store and the learner thread own the state."""

    store: AdapterStore
    loras: LoraStore
    lora_sizes: Sizes  # modules that this server adapts; none when it was started without
    max_lora_rank: int
    base_names: frozenset[str]  # what the served model is called
    base_hash: str
    journal: Journal
    events_bus: EventBus
    loop: InstantLoop
    is_enabled: bool  # False: --no-learn

    async def status(self, principal: Principal) -> LearningStatus:
        """Counts of the installation and of the caller's adapters."""
        counts = await asyncio.to_thread(self.journal.counts)
        slots = await asyncio.to_thread(self._visible, principal)
        return LearningStatus(
            state=self._state(),
            reason=self.loop.why_not_running,
            num_pending=counts.num_pending,
            num_feedback=counts.num_feedback,
            num_adapters=len(slots),
            num_failed_steps=self.loop.teacher.counts.num_failed,
            last_publish=self.loop.teacher.counts.last_publish,
        )

    async def list_adapters(self, principal: Principal) -> tuple[AdapterInfo, ...]:
        """Own and tenant scope; for an operator every principal's of the tenant."""

        def listed() -> tuple[AdapterInfo, ...]:
            return tuple(self._info(slot) for slot in self._visible(principal))

        return await asyncio.to_thread(listed)

    async def list_loras(self, principal: Principal) -> tuple[LoraInfo, ...]:
        """What the tenant has loaded, by name."""
        return tuple(await asyncio.to_thread(self.loras.all_of, principal.tenant))

    async def get_lora(self, name: str, principal: Principal) -> LoraInfo:
        """The one of that name. Raises AdapterNotFound."""
        return await asyncio.to_thread(self.loras.get, principal.tenant, name)

    async def load_lora(
        self, name: str, path: str, principal: Principal, *, any_base: bool
    ) -> LoraInfo:
        """Read, check, store, and only then serve. Requests under way keep what they have."""
        if not self.lora_sizes:
            raise IncompatibleAdapter(
                "this server was started without LoRA slots; start it with --max-loras 8, for "
                "example"
            )

        def load() -> LoraInfo:
            check_name(name)
            table = read_peft(
                Path(path),
                self.lora_sizes,
                max_rank=self.max_lora_rank,
                base_names=() if any_base else self.base_names,
            )
            return self.loras.put(
                principal.tenant, name, table, base_hash=self.base_hash, source=path
            )

        info = await asyncio.to_thread(load)
        self._lora_event(EventKind.ADAPTER_PUBLISHED, info)
        return info

    async def unload_lora(self, name: str, principal: Principal) -> LoraInfo:
        """Forget a LoRA; requests under way keep it."""
        info = await asyncio.to_thread(self.loras.remove, principal.tenant, name)
        self._lora_event(EventKind.ADAPTER_UNLOADED, info)
        return info

    def _lora_event(self, kind: EventKind, info: LoraInfo) -> None:
        event = Event(
            time=time.time(), kind=kind, adapter=info.name, version=info.version, scope="tenant"
        )
        self.events_bus.emit(info.tenant, event)

    async def get_adapter(
        self, name: str, scope: Scope | None, owner: str, principal: Principal
    ) -> AdapterHistory:
        """An adapter with its versions, newest first. Raises AdapterNotFound."""
        holder = replace(principal, name=owner)
        return await asyncio.to_thread(self._history, name, scope, holder)

    async def rollback(
        self, slot: SlotKey, to_version: int | None, reason: str, principal: Principal
    ) -> Rollback:
        """Serve an earlier version's content as a new version; its later feedback is undone."""

        def on_learner() -> tuple[tuple[FeedbackRecord, ...], AdapterInfo]:
            teacher = self.loop.teacher
            if to_version is None:
                undone = teacher.undo(slot, reason)
            else:
                undone = teacher.roll_back(slot, to_version, reason)
            return undone, self._info(slot)  # here, where no lesson comes in between

        undone, info = await asyncio.wrap_future(self.loop.run(on_learner))
        event = Event(
            time=time.time(), kind=EventKind.ADAPTER_ROLLED_BACK, principal=slot.owner,
            adapter=slot.adapter_name, version=info.version, scope=slot.scope, reason=reason,
        )  # fmt: skip
        self.events_bus.emit(slot.tenant, event)
        return Rollback(adapter=info, feedback_ids=tuple(record.feedback_id for record in undone))

    async def pause(self, reason: str, principal: Principal) -> LearningState:
        """Stop learning on the whole server, until resumed or restarted. Idempotent."""
        if self.is_enabled:
            self.loop.pause(reason)
            self._announce(EventKind.LEARNING_PAUSED, reason)
        return self._state()

    async def resume(self, principal: Principal) -> LearningState:
        """Learn what waits, and go on. Idempotent."""
        if self.is_enabled:
            self.loop.resume()
            self._announce(EventKind.LEARNING_RESUMED, "")
        return self._state()

    async def events(
        self, kinds: frozenset[EventKind], principal: Principal
    ) -> AsyncGenerator[Event, None]:
        """The tenant's events from now on; a user sees its own and those of nobody."""
        sees_all = principal.has_role("operator")
        async with aclosing(self.events_bus.watch(principal.tenant, kinds)) as events:
            async for event in events:
                if sees_all or event.principal in ("", principal.name):
                    yield event

    def _state(self) -> LearningState:
        if not self.is_enabled:
            return LearningState.DISABLED
        return LearningState.RUNNING if self.loop.is_running else LearningState.PAUSED

    def _announce(self, kind: EventKind, reason: str) -> None:
        """It concerns the whole server, so everybody hears of it."""
        self.events_bus.emit(None, Event(time=time.time(), kind=kind, principal="", reason=reason))

    def _visible(self, principal: Principal) -> list[SlotKey]:
        slots = self.store.slots(principal.tenant)
        sees_all = principal.has_role("operator")
        return [slot for slot in slots if sees_all or slot.owner in ("", principal.name)]

    def _info(self, slot: SlotKey) -> AdapterInfo:
        history = self.store.history(slot)
        live = history[-1]
        report = live.report
        return AdapterInfo(
            slot=slot,
            version=live.number,
            num_edits=int(report.get("num_edits", 0)),
            num_constraints=int(report.get("num_constraints", 0)),
            num_bytes=self.store.num_bytes(slot, live.number),
            created=history[0].created,
            updated=live.created,
        )

    def _history(self, name: str, scope: Scope | None, holder: Principal) -> AdapterHistory:
        for slot in own_slots(name, holder):
            history = self.store.history(slot)
            if history and scope in (None, slot.scope):
                revisions = tuple(self._revision(info) for info in reversed(history))
                return AdapterHistory(adapter=self._info(slot), revisions=revisions)
        raise AdapterNotFound(
            f"no adapter {name!r} of {holder.name!r}; ListAdapters names those that exist"
        )

    def _revision(self, info: VersionInfo) -> Revision:
        records = self.journal.feedback_by_seq(info.feedback_seqs)
        return Revision(
            info=info,
            feedback_ids=tuple(record.feedback_id for record in records),
            reason=str(info.report.get("reason", "")),
        )
