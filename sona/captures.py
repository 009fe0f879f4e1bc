"""States captured while answering, kept for feedback that may come: a ring with a byte budget.

The oldest answers go first. Feedback on an answer whose states are gone is learned all the same,
from a teacher-forced pass.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from engine.api import Capture

Key = tuple[str, str, int]  # tenant, request_id, choice_index


@dataclass(frozen=True, slots=True)
class _Kept:
    capture: Capture
    until_s: float


class CaptureRing:
    """Owner of captured states in host memory. Safe from any thread."""

    def __init__(
        self, max_bytes: int, max_age_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._max_age_s, self._clock = max_bytes, max_age_s, clock
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays held."""
        return self._num_bytes

    def put(self, tenant: str, request_id: str, choice_index: int, capture: Capture) -> None:
        """Keep an answer's states, at the cost of the oldest ones."""
        if capture.num_bytes > self._max_bytes:
            return
        with self._lock:
            key = (tenant, request_id, choice_index)
            self._drop(key)
            self._kept[key] = _Kept(capture, self._clock() + self._max_age_s)
            self._num_bytes += capture.num_bytes
            while self._num_bytes > self._max_bytes or self._is_expired(next(iter(self._kept))):
                self._drop(next(iter(self._kept)))

    def get(self, tenant: str, request_id: str, choice_index: int) -> Capture | None:
        """An answer's states, or None when they are gone."""
        key = (tenant, request_id, choice_index)
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return None
            if self._is_expired(key):
                self._drop(key)
                return None
            return kept.capture

    def _is_expired(self, key: Key) -> bool:
        return self._kept[key].until_s <= self._clock()

    def _drop(self, key: Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._num_bytes -= kept.capture.num_bytes
