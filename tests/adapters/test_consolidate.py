"""EWC on the product, merging and shrinking, against what the dense matrices say."""

import jax
import numpy as np
import pytest

from adapters.consolidate import Learned, Retention, penalty
from adapters.errors import CandidateRejected
from adapters.fisher import Fisher
from adapters.lora import compressed
from engine import LoraTable

L, X, Y = 2, 9, 7


def random_table(seed, rank=3):
    rng = np.random.default_rng(seed)
    return LoraTable(
        {m: rng.standard_normal((L, rank, X)).astype(np.float32) for m in ("m", "n")},
        {m: rng.standard_normal((L, rank, Y)).astype(np.float32) for m in ("m", "n")},
    )


def random_fisher(seed):
    rng = np.random.default_rng(seed)
    return Fisher(
        {m: rng.random((L, Y)).astype(np.float32) * 5 for m in ("m", "n")},
        {m: rng.random((L, X)).astype(np.float32) * 5 for m in ("m", "n")},
        5.0,
    )


def dense(table, module, layer):
    """What the module's output gains from its input: [X, Y]."""
    a, b = table.a[module][layer], table.b[module][layer]
    return a.astype(np.float64).T @ b.astype(np.float64)


def as_factors(fisher):
    return fisher.c, fisher.g


def test_the_penalty_is_the_weighted_square_of_the_product():
    table, fisher = random_table(0), random_fisher(1)
    want = 0.0
    for module in ("m", "n"):
        for layer in range(L):
            weights = np.outer(fisher.c[module][layer], fisher.g[module][layer])
            want += 0.5 * (weights * dense(table, module, layer) ** 2).sum()
    assert float(penalty((table.a, table.b), as_factors(fisher))) == pytest.approx(want, rel=1e-5)


def test_factors_that_say_the_same_cost_the_same():
    table, fisher = random_table(0), random_fisher(1)
    turn = np.random.default_rng(2).standard_normal((3, 3))
    same = LoraTable(
        {m: np.einsum("RS,LSX->LRX", turn, a) for m, a in table.a.items()},
        {m: np.einsum("RS,LSY->LRY", np.linalg.inv(turn).T, b) for m, b in table.b.items()},
    )
    for layer in range(L):
        np.testing.assert_allclose(dense(same, "m", layer), dense(table, "m", layer), rtol=1e-4)
    first = float(penalty((table.a, table.b), as_factors(fisher)))
    assert float(penalty((same.a, same.b), as_factors(fisher))) == pytest.approx(first, rel=1e-4)


def test_its_gradient_is_the_closed_form():
    """dP/dB = D_g B (A D_c A^T), dP/dA = (B^T D_g B) A D_c, at factors that are not 0."""
    table, fisher = random_table(3), random_fisher(4)
    of_a, of_b = jax.grad(penalty)((table.a, table.b), as_factors(fisher))
    for layer in range(L):
        a, b = table.a["m"][layer], table.b["m"][layer]
        c, g = fisher.c["m"][layer], fisher.g["m"][layer]
        inner, outer = (a * c) @ a.T, (b * g) @ b.T
        np.testing.assert_allclose(of_b["m"][layer], inner @ (b * g), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(of_a["m"][layer], outer @ (a * c), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_a_smaller_table_is_the_nearest_one_on_traffic(rank):
    table, traffic = random_table(5, rank=5), random_fisher(6).c
    small, lost = compressed(table, rank, traffic)
    assert small.rank == min(rank, 5)
    kept = dropped = 0.0
    for module in ("m", "n"):
        for layer in range(L):
            weight = np.sqrt(traffic[module][layer].astype(np.float64))[:, None]
            whole = weight * dense(table, module, layer)
            left, scales, right = np.linalg.svd(whole, full_matrices=False)
            best = (left[:, :rank] * scales[:rank]) @ right[:rank] / weight
            np.testing.assert_allclose(dense(small, module, layer), best, atol=1e-4)
            kept += (scales[:rank] ** 2).sum()
            dropped += (scales[rank:] ** 2).sum()
    assert lost == pytest.approx(dropped / (kept + dropped), abs=1e-6)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(CandidateRejected, match="rank 0"):
        compressed(random_table(0), 0)


def test_consolidations_add_up_and_forget_slowly():
    first, second, fisher = random_table(7), random_table(8), random_fisher(9)
    one, lost = Learned().consolidated(first, fisher, rank=8)
    assert lost == 0.0
    two, lost = one.consolidated(second, fisher, rank=8, decay=0.5)
    assert lost == pytest.approx(0.0, abs=1e-9)
    assert two.table is not None and two.fisher is not None
    for layer in range(L):
        want = dense(first, "m", layer) + dense(second, "m", layer)
        np.testing.assert_allclose(dense(two.table, "m", layer), want, atol=1e-4)
    np.testing.assert_allclose(two.fisher.g["m"], 1.5 * fisher.g["m"])
    tight, lost = one.consolidated(second, fisher, rank=4)
    assert tight.table is not None
    assert tight.table.rank == 4
    assert 0 < lost < 1


def test_the_penalty_s_weight_follows_what_is_lost():
    held = Retention(weight=1.0, allowed=0.01, rate=5.0)
    assert held.after(0.01).weight == pytest.approx(1.0)
    assert held.after(0.11).weight == pytest.approx(np.exp(0.5))
    assert held.after(-0.09).weight == pytest.approx(np.exp(-0.5))
    assert held.after(1e9).weight == pytest.approx(np.exp(2.0))  # one look moves it only so far
    with pytest.raises(ValueError, match="diverged"):
        held.after(float("nan"))
