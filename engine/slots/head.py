"""Head edits on the device, stacked by slot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from engine.api import HeadRef, HeadTable
from engine.config import EnginePlan
from engine.errors import ShapeError
from engine.ops.head_delta import HeadStack
from engine.slots.residency import Residency

SlotArrays = dict[str, np.ndarray]  # one slot of a HeadStack, by field


class HeadSlots:
    """Owner of the stacked head edits. Lives on the engine thread."""

    def __init__(self, plan: EnginePlan, *, hidden_size: int, vocab_size: int) -> None:
        self._plan, self._hidden_size, self._vocab_size = plan, hidden_size, vocab_size
        self.stack = _empty_stack(plan, hidden_size, vocab_size)
        # A fresh function object: jit counts programs per function, not per jit.
        self._write = jax.jit(functools.partial(_write_slot), donate_argnums=0)
        self._residency = Residency(plan.num_head_slots)
        self.stack = self._write(self.stack, np.int32(0), self._pad(None))  # compiles the upload

    @property
    def num_resident(self) -> int:
        """Versions on the device."""
        return len(self._residency)

    def num_programs(self) -> int:
        """Compiled variants of the upload; growth after warm-up is a bug."""
        return self._write._cache_size()  # pyright: ignore

    def acquire(self, head: HeadRef) -> int | None:
        """Slot of this version, uploaded when absent. None when every slot is in use.

        Raises ShapeError when the table exceeds a slot; nothing has changed then.
        """
        key = (head.slot_key, head.version)
        slot = self._residency.find(key)
        if slot is None:
            check_fits(head.table, self._plan)
            padded = self._pad(head.table)
            slot = self._residency.vacate()
            if slot is None:
                return None
            self.stack = self._write(self.stack, np.int32(slot), padded)
            self._residency.settle(key, slot)
        self._residency.use(key)
        return slot

    def release(self, head: HeadRef) -> None:
        """One user less. The version stays resident until its slot is needed."""
        self._residency.release((head.slot_key, head.version))

    def _pad(self, table: HeadTable | None) -> SlotArrays:
        """One slot's arrays at full size."""
        sizes = (self._plan.head_rank, self._plan.head_tokens, self._plan.head_rows)
        padded = _empty_slot(*sizes, self._hidden_size, self._vocab_size)
        if table is None:
            return padded
        if table.keys.shape[1:] != (self._hidden_size,):
            raise ShapeError(
                f"head edits have keys of {list(table.keys.shape)}; this model's states have "
                f"{self._hidden_size} numbers"
            )
        rank, tokens, rows = len(table.keys), len(table.token_ids), len(table.row_ids)
        padded["keys"][:rank] = table.keys
        padded["token_ids"][:tokens] = table.token_ids
        padded["token_keys"][:rank, :tokens] = table.token_keys
        padded["const_keys"][:rank] = table.const_keys
        padded["row_ids"][:rows] = table.row_ids
        padded["values"][:rank, :rows] = table.values
        padded["num_rows"][...] = rows
        return padded


def check_fits(table: HeadTable, plan: EnginePlan) -> None:
    """Raise ShapeError when the table exceeds a slot of this plan."""
    found = (len(table.keys), len(table.token_ids), len(table.row_ids))
    sizes = (plan.head_rank, plan.head_tokens, plan.head_rows)
    if any(has > allowed for has, allowed in zip(found, sizes, strict=True)):
        raise ShapeError(
            "head edits of rank {}, {} token keys and {} rows exceed a slot of {}, {} and {}; "
            "raise head_rank, head_tokens or head_rows".format(*found, *sizes)
        )


def _empty_slot(rank: int, tokens: int, rows: int, hidden_size: int, vocab_size: int) -> SlotArrays:
    """The arrays of a slot that shifts nothing, by the names of `HeadStack`."""
    return {
        "keys": np.zeros((rank, hidden_size), np.float32),
        "token_ids": np.full((tokens,), -1, np.int32),
        "token_keys": np.zeros((rank, tokens), np.float32),
        "const_keys": np.zeros((rank,), np.float32),
        "row_ids": np.full((rows,), vocab_size, np.int32),
        "values": np.zeros((rank, rows), np.float32),
        "num_rows": np.zeros((), np.int32),
    }


def _empty_stack(plan: EnginePlan, hidden_size: int, vocab_size: int) -> HeadStack:
    one = _empty_slot(plan.head_rank, plan.head_tokens, plan.head_rows, hidden_size, vocab_size)
    shape = (plan.num_head_slots,)
    return HeadStack(**{n: jnp.array(np.broadcast_to(a, shape + a.shape)) for n, a in one.items()})


def _write_slot(stack: HeadStack, slot: Int[Array, ""], one: dict[str, Array]) -> HeadStack:
    return HeadStack(**{n: whole.at[slot].set(one[n]) for n, whole in stack._asdict().items()})
