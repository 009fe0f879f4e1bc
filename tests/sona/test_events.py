"""Fan-out of events: by tenant, by kind, bounded per watcher."""

import asyncio
from contextlib import aclosing

from sona.events import EventBus
from sona.ports import Event, EventKind


def event(number, kind=EventKind.FEEDBACK_ACCEPTED):
    return Event(time=float(number), kind=kind)


async def watching(bus, tenant, kinds=frozenset()):
    """A watcher that has subscribed: it waits for its first event."""
    stream = bus.watch(tenant, kinds)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    return stream, first


async def test_watchers_see_their_tenant_and_their_kinds():
    bus = EventBus()
    everything, first = await watching(bus, "t")
    learned, wanted = await watching(bus, "t", frozenset({EventKind.FEEDBACK_LEARNED}))
    foreign, nothing = await watching(bus, "u")
    bus.emit("t", event(1))
    bus.emit("t", event(2, EventKind.FEEDBACK_LEARNED))
    assert (await first).time == 1.0
    assert (await anext(everything)).time == 2.0
    assert (await wanted).time == 2.0
    assert not nothing.done()
    nothing.cancel()
    for stream in (everything, learned):
        await stream.aclose()
    await asyncio.gather(nothing, return_exceptions=True)
    await foreign.aclose()


async def test_what_concerns_all_is_told_to_all():
    bus = EventBus()
    watchers = [asyncio.ensure_future(anext(bus.watch(name, frozenset()))) for name in "ab"]
    await asyncio.sleep(0)  # lets them subscribe
    bus.emit(None, Event(time=0.0, kind=EventKind.LEARNING_PAUSED, principal="", reason="why"))
    assert [event.reason for event in await asyncio.gather(*watchers)] == ["why", "why"]


async def test_a_slow_watcher_loses_the_oldest_counted():
    bus = EventBus()
    stream, first = await watching(bus, "t")
    bus.emit("t", event(0))
    assert (await first).time == 0.0
    for number in range(1, 301):
        bus.emit("t", event(number))
    assert bus.num_dropped == 300 - 256
    async with aclosing(stream):
        assert (await anext(stream)).time == 45.0


async def test_nobody_is_kept_after_leaving():
    bus = EventBus()
    stream, first = await watching(bus, "t")
    bus.emit("t", event(1))
    await first
    await stream.aclose()
    bus.emit("t", event(2))
    assert bus.num_dropped == 0
    assert not bus._watchers


async def test_other_threads_may_emit():
    bus = EventBus()
    _, first = await watching(bus, "t")
    await asyncio.to_thread(bus.emit_threadsafe, "t", event(3))
    assert (await asyncio.wait_for(first, 5)).time == 3.0
