import numpy as np
import pytest
from reference.head_edits import World, key_metric

from adapters.errors import AdapterError
from adapters.metric import KeyMetric


@pytest.fixture(scope="module")
def hidden():
    return World(dim=80).generic(1500)


@pytest.mark.parametrize("rank", [16, 64, 80], ids=["low", "default", "full"])
def test_equals_the_dense_inverse(hidden, rank):
    metric = KeyMetric.fit(hidden, max_rank=rank)
    want, mean_norm = key_metric(hidden, rank)
    got = metric.apply(np.eye(80, dtype=np.float32))
    # float32 products of 80 terms against float64, relative to the largest entry.
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert metric.mean_norm == pytest.approx(mean_norm, rel=1e-4)


def test_fewer_states_than_dimensions(hidden):
    few = hidden[:30]
    want, _ = key_metric(few)  # 50 of its eigenvalues are zero
    got = KeyMetric.fit(few).apply(np.eye(80, dtype=np.float32))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_never_whitens_beyond_the_mean_energy(hidden):
    # Whatever the spectrum, no direction is amplified more than D / tr C.
    energy = np.linalg.eigvalsh(KeyMetric.fit(hidden).apply(np.eye(80, dtype=np.float32)))
    assert energy.max() <= 80 / np.trace(hidden.T @ hidden / len(hidden)) * (1 + 1e-5)
    assert energy.min() > 0


def test_survives_a_file(hidden, tmp_path):
    metric = KeyMetric.fit(hidden)
    for name, array in metric.to_arrays().items():
        np.save(tmp_path / name, array)
    again = KeyMetric.from_arrays({f.stem: np.load(f) for f in tmp_path.glob("*.npy")})
    states = hidden[:5].astype(np.float32)
    np.testing.assert_array_equal(again.apply(states), metric.apply(states))
    assert (again.floor, again.mean_norm) == (metric.floor, metric.mean_norm)


@pytest.mark.parametrize(
    "states", [np.zeros((0, 4)), np.zeros((3, 4)), np.full((3, 4), np.nan)], ids=["no", "0", "nan"]
)
def test_refuses_states_without_energy(states):
    with pytest.raises(AdapterError, match="generic prompts"):
        KeyMetric.fit(states)


def test_names_a_missing_array(hidden):
    arrays = KeyMetric.fit(hidden).to_arrays()
    del arrays["gain"]
    with pytest.raises(AdapterError, match="gain"):
        KeyMetric.from_arrays(arrays)
