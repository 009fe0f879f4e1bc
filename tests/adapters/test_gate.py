import numpy as np
import pytest
from reference.head_edits import World
from support.captures import capture_of

from adapters.errors import AdapterError
from adapters.gate import Gate, GateIndex, GenericStats, route


@pytest.fixture(scope="module")
def world():
    return World(dim=32, seed=4)


@pytest.fixture(scope="module")
def generic(world):
    prompts = world.generic(256)
    return GenericStats.build(prompts, world.generic(400), capture_of(prompts[:20], world.head))


def prompts_of(world, topic, count):
    """Prompt vectors of one topic."""
    answers = world.rng.integers(0, world.vocab, count)
    return world.states(np.repeat(topic, count, 0), world.draw(count), answers)


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_units_are_centred_and_of_length_one(world, generic):
    vector = world.generic(1)[0]
    unit = generic.unit(vector)
    np.testing.assert_allclose(np.linalg.norm(unit), 1.0, rtol=1e-6)
    assert cosine(unit, vector - generic.centre) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(generic.units.mean(0) * 256, generic.units.sum(0), rtol=1e-4)
    assert not generic.unit(generic.centre).any()  # no direction: similar to nothing


def test_a_new_gate_lets_in_one_generic_prompt_in_a_hundred(world, generic):
    for _ in range(5):
        gate = Gate.born(generic.unit(prompts_of(world, world.draw(1), 1)[0]), generic)
        fires = sum(gate.fires(unit) for unit in generic.units)
        assert fires == 2  # 1 % of 256, rounded down
        assert gate.num_prompts == 1


def test_a_gate_knows_its_first_prompt(world, generic):
    unit = generic.unit(prompts_of(world, world.draw(1), 1)[0])
    gate = Gate.born(unit, generic)
    assert gate.similarity(unit) == pytest.approx(1.0, abs=1e-6)
    assert gate.fires(unit)


def test_the_centroid_is_the_mean_direction_of_the_prompts(world, generic):
    units = [generic.unit(vector) for vector in prompts_of(world, world.draw(1), 7)]
    gate = Gate.born(units[0], generic)
    for unit in units[1:]:
        gate = gate.with_prompt(unit, generic)
    mean = np.mean(units, axis=0)
    np.testing.assert_allclose(gate.centroid, mean / np.linalg.norm(mean), atol=1e-6)
    assert gate.num_prompts == 7
    # Seven are not enough to know the pattern's spread.
    assert gate.threshold == generic.quantile(gate.centroid)


def test_eight_prompts_raise_the_threshold_towards_themselves(world, generic):
    topic = 3.0 * world.draw(1)  # far from everything generic
    units = [generic.unit(vector) for vector in prompts_of(world, topic, 8)]
    gate = Gate.born(units[0], generic)
    for unit in units[1:]:
        gate = gate.with_prompt(unit, generic)
    left_out = [cosine(unit, sum(other for other in units if other is not unit)) for unit in units]
    own, quantile = np.quantile(left_out, 0.05), generic.quantile(gate.centroid)
    assert own > quantile
    assert quantile < gate.threshold < own
    assert gate.threshold == pytest.approx(quantile + 0.25 * (own - quantile), abs=1e-6)
    assert all(gate.fires(unit) for unit in units)


def test_a_pattern_as_wide_as_everything_keeps_the_generic_threshold(world, generic):
    units = [generic.unit(vector) for vector in world.generic(12)]
    gate = Gate.born(units[0], generic)
    for unit in units[1:]:
        gate = gate.with_prompt(unit, generic)
    assert gate.threshold == generic.quantile(gate.centroid)
    assert sum(gate.fires(unit) for unit in generic.units) <= 2


def test_a_gate_remembers_a_bounded_number_of_prompts(world, generic):
    units = [generic.unit(vector) for vector in prompts_of(world, world.draw(1), 70)]
    gate = Gate.born(units[0], generic)
    for unit in units[1:]:
        gate = gate.with_prompt(unit, generic)
    assert (gate.num_prompts, len(gate.vectors)) == (70, 64)
    np.testing.assert_array_equal(gate.vectors[-1], units[-1])


def test_adding_a_prompt_leaves_the_old_gate_alone(world, generic):
    first, second = (generic.unit(vector) for vector in prompts_of(world, world.draw(1), 2))
    gate = Gate.born(first, generic)
    centroid, threshold = gate.centroid.copy(), gate.threshold
    gate.with_prompt(second, generic)
    np.testing.assert_array_equal(gate.centroid, centroid)
    assert gate.threshold == threshold


def test_a_gate_fires_at_its_threshold_exactly(generic):
    unit = generic.units[0]
    gate = Gate.born(unit, generic)
    at = Gate(centroid=unit, threshold=gate.similarity(unit), num_prompts=1, vectors=gate.vectors)
    above = Gate(
        centroid=unit, threshold=float(np.nextafter(np.float32(at.threshold), np.float32(2))),
        num_prompts=1, vectors=gate.vectors,
    )  # fmt: skip
    assert at.fires(unit)
    assert not above.fires(unit)


def gate_at(direction, threshold):
    unit = np.asarray(direction, np.float32)
    return Gate(centroid=unit, threshold=threshold, num_prompts=1, vectors=unit[None])


def test_route_takes_the_nearest_gate_that_fires():
    request = np.array([0.6, 0.8], np.float32)
    near, nearer = gate_at([1, 0], 0.5), gate_at([0, 1], 0.5)
    assert route(request, GateIndex.of([near, nearer])) == 1
    assert route(request, GateIndex.of([nearer, near])) == 0
    # The nearest does not fire: the next one that does.
    assert route(request, GateIndex.of([near, gate_at([0, 1], 0.81)])) == 0
    assert route(request, GateIndex.of([gate_at([1, 0], 0.61), gate_at([0, 1], 0.81)])) is None
    assert route(request, GateIndex.of([])) is None
    assert route(np.full(2, np.nan, np.float32), GateIndex.of([near, nearer])) is None
    assert route(np.zeros(2, np.float32), GateIndex.of([near, nearer])) is None


def test_route_agrees_with_asking_each_gate(world, generic):
    gates = [
        Gate.born(generic.unit(prompts_of(world, world.draw(1), 1)[0]), generic) for _ in range(30)
    ]
    index = GateIndex.of(gates)
    num_routed = 0
    for vector in world.generic(100):
        unit = generic.unit(vector)
        firing = [number for number, gate in enumerate(gates) if gate.fires(unit)]
        best = max(firing, key=lambda number: gates[number].similarity(unit), default=None)
        assert route(unit, index) == best
        num_routed += best is not None
    assert 0 < num_routed < 100


def test_statistics_survive_a_file(generic, tmp_path):
    np.savez(tmp_path / "generic.npz", **generic.to_arrays())
    with np.load(tmp_path / "generic.npz") as arrays:
        again = GenericStats.from_arrays(dict(arrays))
    for name, array in generic.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], array, err_msg=name)


def test_statistics_that_cannot_be_are_refused(world, generic):
    prompts = world.generic(4)
    with pytest.raises(AdapterError, match="1 generic prompt"):
        GenericStats.build(prompts[:1], prompts, generic.guard)
    with pytest.raises(AdapterError, match="not finite"):
        GenericStats.build(prompts * np.nan, prompts, generic.guard)
    arrays = generic.to_arrays()
    del arrays["guard.top_ids"]
    with pytest.raises(AdapterError, match=r"guard\.top_ids"):
        GenericStats.from_arrays(arrays)
