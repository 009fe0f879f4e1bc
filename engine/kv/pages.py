"""Free list and reference counts of KV pages. Integers only; the arrays are in `kv.pool`.

Pages are handed out lowest-recently-freed first. At every moment

    free pages + pages with at least one reference = all pages

Follows Kwon 2023 (arXiv:2309.06180, section 4.2).
"""

from collections import deque


class PageTable:
    """Owner of page indices 0 … num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one reference, counted from the references themselves."""
        return sum(count > 0 for count in self._references)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None and nothing taken."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder less for each page; the last one frees it."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} released more often than taken"
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
