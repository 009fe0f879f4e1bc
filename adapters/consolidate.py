"""EWC++ on the product of a LoRA's factors, and its merging into what was learned before.

A LoRA's factors have no meaning of their own: (G A, G^-T B) says the same. So the penalty is on
what the LoRA adds to the weights, dW = B^T A, with the diagonal Fisher information F_ij = g_i c_j
of everything learned before (after Kirkpatrick 2017, arXiv:1612.00796, equation 3, and, for dW,
EWC-LoRA, arXiv:2602.17559):

    P = lambda/2 sum_ij F_ij dW_ij^2 = lambda/2 tr[(B D_g B^T) (A D_c A^T)]

Every consolidation merges the LoRA into the learned table below and starts a fresh one, so the
anchor is 0, and the Fisher information one running sum (Schwarz 2018, arXiv:1805.06370, 3.3).
lambda follows a constraint: what is retained may get worse by so much and no more.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adapters.fisher import Fisher
from adapters.lora import Factors, compressed, merge
from engine import LoraTable

_SMALLEST, _LARGEST = 1e-6, 1e6  # of lambda


def penalty(factors: Factors, fisher: Factors) -> Float[Array, ""]:
    """sum_ij F_ij dW_ij^2, a half of it, over all modules and layers.

    `fisher` has c by module as [L, X] first and g as [L, Y] second, as a LoRA has its factors.
    """
    (a, b), (c, g) = factors, fisher
    total = jnp.zeros(())
    for module in a:
        inner = jnp.einsum("LRX,LX,LSX->LRS", a[module], c[module], a[module])
        outer = jnp.einsum("LRY,LY,LSY->LRS", b[module], g[module], b[module])
        total = total + (inner * outer).sum()
    return 0.5 * total


@dataclass(frozen=True, slots=True)
class Retention:
    """The weight of the penalty, as one constraint holds it.

    lambda is multiplied by exp(rate (increase - allowed)) after each look at the retained loss: it
    rises while more is lost than may be, and falls while there is room to learn.
    """

    weight: float = 1.0  # lambda
    allowed: float = 0.01  # nats per token that the retained loss may rise
    rate: float = 5.0

    def after(self, increase: float) -> "Retention":
        """Once the retained loss was measured. Raises ValueError for NaN."""
        if math.isnan(increase):
            raise ValueError("the retained loss is not a number; the step before it diverged")
        step = max(-2.0, min(2.0, self.rate * (increase - self.allowed)))
        return replace(self, weight=min(max(self.weight * math.exp(step), _SMALLEST), _LARGEST))


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What a tenant's model has learned below the head: one table, and what it must not lose."""

    table: LoraTable | None = None  # None: nothing yet
    fisher: Fisher | None = None  # summed over everything consolidated, base traffic included

    def consolidated(
        self, fresh: LoraTable, fisher: Fisher, *, rank: int, decay: float = 0.95
    ) -> tuple["Learned", float]:
        """Merge a trained LoRA in; the next one starts fresh.

        `fisher` is of the new model on the new items. Beyond `rank` the least of the table is
        dropped, in the metric of the traffic that the Fisher information has seen. Returns the
        share that was dropped as well.
        """
        total = fisher if self.fisher is None else self.fisher.plus(fisher, decay=decay)
        parts = [(fresh, 1.0)] if self.table is None else [(self.table, 1.0), (fresh, 1.0)]
        table, lost = compressed(merge(parts), rank, _moments(total))
        return Learned(table, total), lost


def _moments(fisher: Fisher) -> Mapping[str, np.ndarray]:
    return {module: sums / fisher.count for module, sums in fisher.c.items()}
