"""The Learning port over three adapters that never change."""

import asyncio
from collections.abc import AsyncGenerator

from adapters.errors import AdapterNotFound
from adapters.loras import LoraInfo
from adapters.store import SlotKey, VersionInfo
from sona.auth import Principal
from sona.journal import FeedbackState
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


class ToyLearning:
    """Three adapters: pattern-1 of ann, pattern-2 of bob, pattern-3 of the tenant."""

    def __init__(self) -> None:
        self.state = LearningState.RUNNING
        self.reason = ""
        self.rolled_back: list[tuple[SlotKey, int | None, str, Principal]] = []
        self.watchers = 0
        self.loras: dict[str, LoraInfo] = {}
        self.unwatched = asyncio.Event()  # set: a watcher has left
        self.infos = (
            adapter_info(3, ""), adapter_info(1, "ann"), adapter_info(2, "bob"),
        )  # fmt: skip

    async def status(self, principal: Principal) -> LearningStatus:
        return LearningStatus(
            state=self.state,
            reason=self.reason,
            num_pending=2,
            num_feedback={FeedbackState.LEARNED: 5, FeedbackState.ACCEPTED: 2},
            num_adapters=3,
            num_failed_steps=0,
            last_publish=1_700_000_000.0,
        )

    async def list_adapters(self, principal: Principal) -> tuple[AdapterInfo, ...]:
        return self.infos

    async def list_loras(self, principal: Principal) -> tuple[LoraInfo, ...]:
        return tuple(self.loras.values())

    async def get_lora(self, name: str, principal: Principal) -> LoraInfo:
        if name not in self.loras:
            raise AdapterNotFound(f"no LoRA {name!r}")
        return self.loras[name]

    async def load_lora(
        self, name: str, path: str, principal: Principal, *, any_base: bool
    ) -> LoraInfo:
        version = self.loras[name].version + 1 if name in self.loras else 1
        self.loras[name] = LoraInfo(
            tenant=principal.tenant, name=name, version=version, base_hash="abc", rank=4,
            num_bytes=400, source=path, created=1_700_000_000.0,
        )  # fmt: skip
        return self.loras[name]

    async def unload_lora(self, name: str, principal: Principal) -> LoraInfo:
        if name not in self.loras:
            raise AdapterNotFound(f"no LoRA {name!r}")
        return self.loras.pop(name)

    async def get_adapter(
        self, name: str, scope: str | None, owner: str, principal: Principal
    ) -> AdapterHistory:
        for info in sorted(self.infos, key=lambda each: each.slot.scope):
            is_meant = info.slot.adapter_name == name and info.slot.owner in (owner, "")
            if is_meant and scope in (None, info.slot.scope):
                return AdapterHistory(adapter=info, revisions=_revisions(info))
        raise AdapterNotFound(f"no adapter {name!r}")

    async def rollback(
        self, slot: SlotKey, to_version: int | None, reason: str, principal: Principal
    ) -> Rollback:
        self.rolled_back.append((slot, to_version, reason, principal))
        info = next(info for info in self.infos if info.slot == slot)
        return Rollback(adapter=info, feedback_ids=("f1", "f2"))

    async def pause(self, reason: str, principal: Principal) -> LearningState:
        self.state, self.reason = LearningState.PAUSED, reason
        return self.state

    async def resume(self, principal: Principal) -> LearningState:
        self.state, self.reason = LearningState.RUNNING, ""
        return self.state

    async def events(
        self, kinds: frozenset[EventKind], principal: Principal
    ) -> AsyncGenerator[Event, None]:
        self.watchers += 1
        try:
            for kind in sorted(kinds):
                yield Event(
                    time=1.5, kind=kind, principal="ann", feedback_id="f1", adapter="pattern-1",
                    version=4, scope="principal", reason="because",
                )  # fmt: skip
            await asyncio.Event().wait()  # then nothing more happens
        finally:
            self.watchers -= 1
            self.unwatched.set()


def adapter_info(pattern_id: int, owner: str) -> AdapterInfo:
    scope = "principal" if owner else "tenant"
    return AdapterInfo(
        slot=SlotKey(tenant="acme", scope=scope, owner=owner, pattern_id=pattern_id),
        version=4, num_edits=5, num_constraints=6, num_bytes=7, created=1.0, updated=2.0,
    )  # fmt: skip


def _revisions(info: AdapterInfo) -> tuple[Revision, ...]:
    def revision(number: int, kind, restores: int | None) -> Revision:
        return Revision(
            info=VersionInfo(
                slot=info.slot, number=number, parent=number - 1, restores=restores, kind=kind,
                created=float(number), base_hash="abc", feedback_seqs=(1,), is_gated=False,
                report={}, has_arrays=number > 1,
            ),
            feedback_ids=("f1",),
            reason="why",
        )  # fmt: skip

    return (revision(2, "rollback", 0), revision(1, "edit", None))
