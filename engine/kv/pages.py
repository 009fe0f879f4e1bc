"""Free list and reference counts of KV pages. Integers only; the arrays are in `kv.pool`.

Pages are handed out lowest-recently-freed first. A page that the prefix cache alone holds is
idle: it is given up when somebody needs it. At every moment

    free pages + idle pages + pages in use = all pages

Follows Kwon 2023 (arXiv:2309.06180, section 4.2).
"""

from collections import deque
from collections.abc import Iterable


class PageTable:
    """Owner of page indices 0 … num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._references = [0] * num_pages
        self._is_cached = [False] * num_pages
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Pages that the prefix cache holds and nobody else."""
        return self._num_idle

    @property
    def num_used(self) -> int:
        """Pages held by a sequence, counted from the references themselves."""
        pairs = zip(self._references, self._is_cached, strict=True)
        return sum(count > is_cached for count, is_cached in pairs)

    def is_shared(self, page: int) -> bool:
        """Whether more than one holder reads the page: then nobody may write to it."""
        return self._references[page] > 1

    def is_idle(self, page: int) -> bool:
        """Whether the prefix cache alone holds the page."""
        return self._is_cached[page] and self._references[page] == 1

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None and nothing taken."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._num_idle -= self.is_idle(page)
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each page; the last one frees it."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} released more often than taken"
            self._references[page] -= 1
            self._num_idle += self.is_idle(page)
            if not self._references[page]:
                self._free.append(page)

    def cache(self, page: int) -> None:
        """The prefix cache becomes a holder of a page that a sequence holds."""
        assert not self._is_cached[page], f"page {page} is cached already"
        self.share([page])
        self._is_cached[page] = True

    def uncache(self, page: int) -> None:
        """The prefix cache lets go of a page."""
        assert self._is_cached[page], f"page {page} is not cached"
        self._num_idle -= self.is_idle(page)
        self._is_cached[page] = False
        self.release([page])
