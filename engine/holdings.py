"""Which pages a sequence holds: taken, found in the prefix cache, copied on write, given back."""

import time
from collections.abc import Callable

from engine.config import EnginePlan
from engine.kv.pages import PageTable
from engine.kv.prefix import PrefixCache
from engine.sequence import Kind, Sequence


class Holdings:
    """Owner of every page. Changes `pages`, `node` and progress of the sequences given to it."""

    def __init__(self, plan: EnginePlan, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self.pages = PageTable(plan.num_pages)
        self._prefix = PrefixCache(
            self.pages,
            page_size=plan.page_size,
            session_pages=plan.session_pages,
            session_idle_s=plan.session_idle_s,
            clock=clock,
        )

    @property
    def num_session_pages(self) -> int:
        """Pages that sessions keep warm."""
        return self._prefix.num_session_pages

    def match(self, sequence: Sequence) -> None:
        """Begin behind the longest cached prefix. The sequence holds nothing yet."""
        plan, job = self._plan, sequence.job
        limit = sequence.match_limit if plan.caches_prefixes else 0
        if plan.is_deterministic:
            limit = min(limit, sequence.num_prompt)
        space = (job.salt, None if job.lora is None else job.lora.identity)
        node, pages = self._prefix.match(space, sequence.tokens, limit)
        if plan.is_deterministic:  # whole chunks alone: the rest is computed in the same ones
            for _ in range(len(pages) % (plan.prefill_chunk // plan.page_size)):
                self.pages.release([pages.pop()])
                assert node.parent is not None
                node = node.parent
        sequence.node, sequence.pages, sequence.vector_sum = node, pages, node.vector_sum
        sequence.num_computed = len(pages) * plan.page_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Hold pages for `num_tokens`; False, and nothing taken, when there are not enough."""
        wanted = min(num_tokens, self._plan.max_len)
        missing = -(-wanted // self._plan.page_size) - len(sequence.pages)
        if missing > 0:
            if not self._prefix.make_room(missing):
                return False
            taken = self.pages.take(missing)
            assert taken is not None, "room was made"
            sequence.pages += taken
        return True

    def own(self, sequence: Sequence) -> tuple[int, int] | None:
        """Make the page of the next token the sequence's alone, as it is about to be written.

        Returns the page to copy and where to, (-1, -1) when there is nothing to copy, None when
        no page is free for it.
        """
        at = sequence.num_computed // self._plan.page_size
        page = sequence.pages[at]
        if not self.pages.is_shared(page):
            return -1, -1
        taken = self.pages.take(1) if self._prefix.make_room(1) else None
        if taken is None:
            return None
        sequence.pages[at] = taken[0]
        self.pages.release([page])
        return page, taken[0]

    def share(self, leader: Sequence, sibling: Sequence) -> None:
        """Let another answer go on behind the leader's prompt, on the same pages."""
        sibling.pages = leader.pages[: -(-leader.num_prompt // self._plan.page_size)]
        self.pages.share(sibling.pages)
        sibling.node, sibling.vector_sum = leader.node, leader.vector_sum
        sibling.num_computed = leader.num_computed

    def fill(self, sequence: Sequence, end: int) -> None:
        """The page that ends before token `end` is full: the prefix cache may keep it."""
        plan, node = self._plan, sequence.node
        at = end // plan.page_size - 1
        if not plan.caches_prefixes or node is None or node.depth != at:
            return
        if plan.is_deterministic and (end > sequence.num_prompt or sequence.kind is Kind.CAPTURE):
            return  # computed in other shapes: a prompt's chunks would give other bits
        digit = tuple(sequence.tokens[end - plan.page_size : end])
        sequence.node = self._prefix.add(node, digit, sequence.pages[at], sequence.vector_sum)

    def keep_warm(self, sequence: Sequence) -> None:
        """The next turn of the sequence's session begins behind this one."""
        session = sequence.job.session
        if session is not None and sequence.node is not None and not sequence.index:
            self._prefix.keep((sequence.job.salt, session), sequence.node)

    def give_back(self, sequence: Sequence) -> None:
        """Hold nothing; what is computed of the sequence is forgotten, but for cached pages."""
        self.pages.release(sequence.pages)
        if sequence.node is not None:
            self._prefix.left(sequence.node)
        sequence.pages, sequence.node, sequence.vector_sum = [], None, None
        sequence.num_computed = 0
        sequence.parked_hidden = None
        sequence.unread.clear()
        if sequence.kind is Kind.CAPTURE:
            sequence.captured.clear()
            sequence.prompt_vector = None
