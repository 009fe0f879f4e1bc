"""Which version answers whom: nearest firing gate, own before shared, swapped whole."""

import numpy as np

from adapters.gate import Gate, GenericStats
from adapters.metric import KeyMetric
from adapters.store import SlotKey, Version, VersionInfo, empty_table
from engine.api import Capture
from sona.routing import Routing

D = 8


def generic():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((50, D)).astype(np.float32)
    none = np.zeros((0, D), np.float32)
    nothing = Capture(none, none.astype(np.int32), none, none[:, 0])
    return GenericStats(np.zeros(D, np.float32), states, KeyMetric.fit(states), nothing)


def axis(i, j=None):
    unit = np.zeros(D, np.float32)
    unit[i] = 1.0
    if j is not None:
        unit[j] = 1.0
    return unit / np.linalg.norm(unit)


def version(pattern_id, centroid, *, owner="ann", tenant="t", number=1, threshold=0.6):
    slot = SlotKey(
        tenant=tenant, scope="principal" if owner else "tenant", owner=owner, pattern_id=pattern_id
    )
    info = VersionInfo(
        slot=slot, number=number, parent=number - 1, restores=None, kind="edit", created=0.0,
        base_hash="b", feedback_seqs=(), is_gated=False, report={}, has_arrays=True,
    )  # fmt: skip
    gate = None
    if centroid is not None:
        gate = Gate(centroid=centroid, threshold=threshold, num_prompts=1, vectors=centroid[None])
    return Version(info=info, table=empty_table(D), gate=gate)


def answering(routing, vector, caller=("t", "ann")):
    live = routing.match(caller, vector)
    return None if live is None else (live.slot.pattern_id, live.slot.owner, live.info.number)


def test_the_nearest_gate_that_fires_answers():
    routing = Routing(generic())
    assert answering(routing, axis(0)) is None
    routing.publish(version(1, axis(0)))
    routing.publish(version(2, axis(0, 1)))
    assert answering(routing, axis(0)) == (1, "ann", 1)
    assert answering(routing, axis(0, 1)) == (2, "ann", 1)
    assert answering(routing, axis(1)) == (2, "ann", 1)
    assert answering(routing, axis(5)) is None


def test_others_are_not_answered_by_it():
    routing = Routing(generic())
    routing.publish(version(1, axis(0)))
    assert answering(routing, axis(0), ("t", "bob")) is None
    assert answering(routing, axis(0), ("u", "ann")) is None


def test_own_comes_before_the_tenants_of_the_same_pattern():
    routing = Routing(generic())
    routing.publish(version(1, axis(0), owner="", number=7))
    assert answering(routing, axis(0)) == (1, "", 7)
    assert answering(routing, axis(0), ("t", "bob")) == (1, "", 7)
    routing.publish(version(1, axis(0), number=2))
    assert answering(routing, axis(0)) == (1, "ann", 2)
    assert answering(routing, axis(0), ("t", "bob")) == (1, "", 7)


def test_a_new_version_replaces_the_old_and_one_without_gate_removes_it():
    routing = Routing(generic())
    choose = routing.choose(("t", "ann"))
    routing.publish(version(1, axis(0)))
    head = choose(axis(0))
    assert head is not None and head.version == 1
    routing.publish(version(1, axis(0), number=2))
    head = choose(axis(0))
    assert head is not None and head.version == 2
    routing.publish(version(1, None, number=3))
    assert choose(axis(0)) is None
    assert routing.all_live() == []
