"""LoRAs on the device: one stack of low-rank factors per linear module."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from engine.api import LoraRef, LoraTable
from engine.config import EnginePlan
from engine.errors import ShapeError
from engine.model import ModelConfig
from engine.ops.lora_delta import BLOCK_RANKS, LoraStack
from engine.slots.residency import Residency

Sides = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""A slot's first and second factors by module, [L, R, size] each."""


class LoraSlots:
    """Owner of the stacked LoRAs. Lives on the engine thread."""

    def __init__(self, plan: EnginePlan, model: ModelConfig) -> None:
        self._plan, self.sizes = plan, dict(module_sizes(model, on_head=plan.lora_on_head))
        # Whole blocks: a block that began in the last one would be read twice.
        blocks = -(-plan.lora_rank // BLOCK_RANKS)
        self._rank = plan.lora_rank if blocks == 1 else blocks * BLOCK_RANKS
        if plan.num_lora_slots == 1:
            self.sizes = {}
        self.stack = self._empty_stack()
        self.none = LoraStack({}, {}, jnp.zeros((1,), jnp.int32))  # of a batch without a LoRA
        # A fresh function object: jit counts programs per function, not per jit.
        self._write = jax.jit(functools.partial(_write_slot), donate_argnums=0)
        self._residency = Residency(plan.num_lora_slots)
        if self.sizes:
            self._upload(0, self._padded(None), 0)  # compiles it

    @property
    def num_resident(self) -> int:
        """Versions on the device."""
        return len(self._residency)

    def num_programs(self) -> int:
        """Compiled variants of the upload; growth after warm-up is a bug."""
        return self._write._cache_size()  # pyright: ignore

    @property
    def num_available(self) -> int:
        """Slots that nobody uses."""
        return self._residency.num_available

    def find(self, lora: LoraRef) -> int | None:
        """The slot of a resident version."""
        return self._residency.find(lora.identity)

    def acquire(self, lora: LoraRef) -> int | None:
        """Slot of this version, uploaded when absent. None when every slot is in use.

        Raises ShapeError when the table does not fit a slot; nothing has changed then.
        """
        slot = self._residency.find(lora.identity)
        if slot is None:
            check_fits(lora.table, self.sizes, self._plan)
            padded = self._padded(lora.table)
            slot = self._residency.vacate()
            if slot is None:
                return None
            self._upload(slot, padded, lora.table.rank)
            self._residency.settle(lora.identity, slot)
        self._residency.use(lora.identity)
        return slot

    def release(self, lora: LoraRef) -> None:
        """One user less. The version stays resident until its slot is needed."""
        self._residency.release(lora.identity)

    def _upload(self, slot: int, one: Sides, rank: int) -> None:
        self.stack = self._write(self.stack, np.int32(slot), *one, np.int32(rank))

    def _padded(self, table: LoraTable | None) -> Sides:
        """One slot's factors at full rank, in the model's precision."""
        dtype = jnp.dtype(self._plan.dtype)
        sides: Sides = ({}, {})
        for side, (padded, name) in enumerate(zip(sides, ("a", "b"), strict=True)):
            given = {} if table is None else getattr(table, name)
            for module, (layers, *size) in self.sizes.items():
                padded[module] = np.zeros((layers, self._rank, size[side]), dtype)
                if module in given:
                    padded[module][:, : given[module].shape[1]] = given[module]
        return sides

    def _empty_stack(self) -> LoraStack:
        slots, rank, dtype = self._plan.num_lora_slots, self._rank, self._plan.dtype
        sides: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
        for side, stacked in enumerate(sides):
            for module, (layers, *size) in self.sizes.items():
                stacked[module] = jnp.zeros((layers, slots, rank, size[side]), jnp.dtype(dtype))
        return LoraStack(*sides, jnp.zeros((slots,), jnp.int32))


def module_sizes(
    model: ModelConfig, *, on_head: bool
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Every linear module that a LoRA may adapt: name, (layers, size in, size out)."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, mlp, layers = model.hidden_size, model.mlp_size, model.num_layers
    yield "q_proj", (layers, hidden, queries)
    yield "k_proj", (layers, hidden, keys)
    yield "v_proj", (layers, hidden, keys)
    yield "o_proj", (layers, queries, hidden)
    yield "gate_proj", (layers, hidden, mlp)
    yield "up_proj", (layers, hidden, mlp)
    yield "down_proj", (layers, mlp, hidden)
    if on_head:
        yield "lm_head", (1, hidden, model.vocab_size)


def check_fits(table: LoraTable, sizes: dict[str, tuple[int, int, int]], plan: EnginePlan) -> None:
    """Raise ShapeError when the table exceeds a slot, or adapts what has no slot."""
    if not sizes:
        raise ShapeError("this server was started without LoRA slots; set engine.max_loras")
    if table.rank > plan.lora_rank:
        raise ShapeError(
            f"the LoRA has rank {table.rank}; a slot holds {plan.lora_rank}: raise "
            "engine.max_lora_rank"
        )
    for module in table.a:
        if module not in sizes:
            hint = "; set engine.lora_on_head" if module == "lm_head" else ""
            raise ShapeError(
                f"the LoRA adapts {module}; this server has slots for {', '.join(sizes)}{hint}"
            )
        layers, size_in, size_out = sizes[module]
        rank = table.a[module].shape[1]
        want = ((layers, rank, size_in), (layers, rank, size_out))
        found = (table.a[module].shape, table.b[module].shape)
        if found != want:
            raise ShapeError(
                f"the LoRA's {module} has factors of {found[0]} and {found[1]}; this model "
                f"takes {want[0]} and {want[1]}"
            )


def _write_slot(
    stack: LoraStack,
    slot: Int[Array, ""],
    a: dict[str, Array],
    b: dict[str, Array],
    rank: Int[Array, ""],
) -> LoraStack:
    def put(whole: dict[str, Array], one: dict[str, Array]) -> dict[str, Array]:
        return {name: array.at[:, slot].set(one[name]) for name, array in whole.items()}

    return LoraStack(put(dict(stack.a), a), put(dict(stack.b), b), stack.rank.at[slot].set(rank))
