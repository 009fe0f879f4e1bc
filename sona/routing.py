"""Which learned version answers a request: the nearest pattern whose gate lets the prompt in.

What is live is a snapshot per caller, swapped whole. The engine thread reads it once per request,
between prefill and the first token; whoever publishes builds the next snapshot beside it.
"""

import threading
from dataclasses import dataclass

import numpy as np

from adapters.gate import Gate, GateIndex, GenericStats, route
from adapters.store import SlotKey, Version, VersionInfo
from engine.api import HeadChoice, HeadRef

Caller = tuple[str, str]  # tenant, principal


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """A version in force, ready to be served and to be extended."""

    info: VersionInfo
    gate: Gate
    head: HeadRef

    @property
    def slot(self) -> SlotKey:
        """Whose pattern it is."""
        return self.info.slot


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """What one caller's prompts are compared with."""

    index: GateIndex
    live: tuple[Live, ...]


class Routing:
    """Owner of what is live. `publish` and `choose` may run on different threads."""

    def __init__(self, generic: GenericStats) -> None:
        self.generic = generic
        self._live: dict[str, dict[SlotKey, Live]] = {}  # by tenant
        self._snapshots: dict[Caller, _Snapshot] = {}
        self._lock = threading.Lock()

    def publish(self, version: Version) -> None:
        """Make a stored version the one that answers. A version without a gate answers nothing."""
        slot = version.slot
        with self._lock:
            of_tenant = self._live.setdefault(slot.tenant, {})
            if version.gate is None:
                of_tenant.pop(slot, None)
            else:
                of_tenant[slot] = Live(version.info, version.gate, version.head_ref())
            for caller in [c for c in self._snapshots if c[0] == slot.tenant]:
                if not slot.owner or caller[1] == slot.owner:
                    self._snapshots[caller] = self._build(caller)

    def match(self, caller: Caller, prompt_vector: np.ndarray) -> Live | None:
        """The pattern that answers a prompt with this mean hidden state [D]; None: the base."""
        snapshot = self._snapshots.get(caller)
        if snapshot is None:
            with self._lock:
                snapshot = self._snapshots.setdefault(caller, self._build(caller))
        nearest = route(self.generic.unit(prompt_vector), snapshot.index)
        return None if nearest is None else snapshot.live[nearest]

    def choose(self, caller: Caller) -> HeadChoice:
        """The engine's question, bound to a caller."""

        def chosen(prompt_vector: np.ndarray) -> HeadRef | None:
            live = self.match(caller, prompt_vector)
            return None if live is None else live.head

        return chosen

    def live(self, slot: SlotKey) -> Live | None:
        """What is in force in a slot."""
        return self._live.get(slot.tenant, {}).get(slot)

    def all_live(self) -> list[Live]:
        """What is in force, of everybody."""
        return [live for of_tenant in self._live.values() for live in of_tenant.values()]

    def _build(self, caller: Caller) -> _Snapshot:
        """The caller's own patterns, and the tenant's where the caller has none of its own."""
        tenant, principal = caller
        of_tenant = self._live.get(tenant, {})
        own = {s.pattern_id: live for s, live in of_tenant.items() if s.owner == principal}
        shared = {s.pattern_id: live for s, live in of_tenant.items() if not s.owner}
        live = tuple({**shared, **own}.values())
        return _Snapshot(GateIndex.of([item.gate for item in live]), live)
