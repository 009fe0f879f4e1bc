"""Which version sits in which slot, and who is using it. Integers only.

Slot 0 is "none". A slot in use is never given to another; among idle ones the least recently used
goes. A new version of the same adapter is another resident: requests keep what they started with.
"""

from collections import OrderedDict
from collections.abc import Hashable


class Residency:
    """Owner of the slot numbers 1 … num_slots - 1."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, 0, -1))
        self._slots: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first
        self._users: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, key: Hashable) -> int | None:
        """The slot of a resident version."""
        return self._slots.get(key)

    @property
    def num_available(self) -> int:
        """Slots that nobody uses."""
        return len(self._free) + len(self._slots) - len(self._users)

    def vacate(self) -> int | None:
        """A slot nobody uses, its resident forgotten; None when every slot is in use."""
        if self._free:
            return self._free.pop()
        for key in self._slots:
            if key not in self._users:
                return self._slots.pop(key)
        return None

    def settle(self, key: Hashable, slot: int) -> None:
        """The version has been written to a vacated slot."""
        self._slots[key] = slot

    def use(self, key: Hashable) -> None:
        """One user more of a resident version."""
        self._slots.move_to_end(key)
        self._users[key] = self._users.get(key, 0) + 1

    def release(self, key: Hashable) -> None:
        """One user less. The version stays resident until its slot is needed."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
