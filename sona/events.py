"""What happened in learning, to whoever watches. A slow watcher loses the oldest, counted."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

from sona.ports import Event, EventKind

_MAX_UNREAD = 256  # events per watcher


class EventBus:
    """Fan-out of events. Belongs to one event loop; `emit_threadsafe` may be called anywhere."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watchers: set[tuple[str, asyncio.Queue[Event]]] = set()
        self.num_dropped = 0

    def emit(self, tenant: str | None, event: Event) -> None:
        """Tell the tenant's watchers; None tells everybody's."""
        for of_tenant, queue in self._watchers:
            if tenant in (None, of_tenant):
                if queue.full():
                    queue.get_nowait()
                    self.num_dropped += 1
                queue.put_nowait(event)

    def emit_threadsafe(self, tenant: str, event: Event) -> None:
        """The same, from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.emit, tenant, event)

    async def watch(self, tenant: str, kinds: frozenset[EventKind]) -> AsyncGenerator[Event, None]:
        """The tenant's events from now on; empty `kinds` means all."""
        with self._subscribed(tenant) as queue:
            while True:
                event = await queue.get()
                if not kinds or event.kind in kinds:
                    yield event

    @contextlib.contextmanager
    def _subscribed(self, tenant: str) -> Iterator[asyncio.Queue[Event]]:
        queue: asyncio.Queue[Event] = asyncio.Queue(_MAX_UNREAD)
        self._watchers.add((tenant, queue))
        try:
            yield queue
        finally:
            self._watchers.discard((tenant, queue))
