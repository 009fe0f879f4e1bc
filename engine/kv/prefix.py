"""Which pages hold which tokens already: a radix tree whose digits are whole pages.

    space (salt, version below the head)
      └─ 16 tokens → page 7 ─┬─ 16 tokens → page 9
                             └─ 16 tokens → page 3 ─ …

A cached page is full, so nobody writes to it again. A node also keeps the running sum of final
hidden states up to its page's end: a prompt's mean state is the same with a hit as without one.
Pages that no sequence holds leave by least recent use, leaves first. The end of a session's last
turn is kept longer: until the session has been idle for a while, or its pages are the last resort.

Follows Zheng 2024 (arXiv:2312.07104, section 3) with pages for tokens.
"""

import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.kv.pages import PageTable

Space = Hashable
"""What tokens are read under: equal tokens in two spaces share nothing."""
_Digit = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One full page of tokens after those of its parent. A space's root has page -1."""

    space: Space
    parent: "Node | None"
    digit: _Digit  # the page's tokens; of a root: ()
    page: int
    depth: int  # pages from the root to here
    vector_sum: np.ndarray | None  # [D] float32, over all tokens up to the page's end
    children: "dict[_Digit, Node]" = field(default_factory=dict)
    used: int = 0  # turn of the last use
    is_listed: bool = False  # among those that may go
    num_sessions: int = 0  # that keep it


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    node: Node
    expires_s: float


class PrefixCache:
    """Owner of the tree. The engine thread alone calls it.

    Raises nothing: a miss is an empty hit, a full pool is `make_room` being False.
    """

    def __init__(
        self,
        pages: PageTable,
        *,
        page_size: int,
        session_pages: int,
        session_idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages, self._page_size = pages, page_size
        self._session_pages, self._session_idle_s = session_pages, session_idle_s
        self._clock = clock
        self._roots: dict[Space, Node] = {}
        self._turns = itertools.count(1)
        self._idle: list[tuple[int, int, Node]] = []  # heap by last use, one entry a node
        self._entries = itertools.count()
        self._sessions: OrderedDict[Hashable, _Session] = OrderedDict()  # least recent first
        self.num_session_pages = 0

    def root(self, space: Space) -> Node:
        """Where the tokens of a space begin; kept once something is cached there."""
        return self._roots.get(space) or Node(space, None, (), -1, 0, None)

    def match(self, space: Space, tokens: Sequence[int], limit: int) -> tuple[Node, list[int]]:
        """The longest cached run of whole pages within tokens[:limit].

        Returns its last node (the root when nothing is cached) and its pages, which the caller
        now holds too and gives back with `PageTable.release`.
        """
        self._expire()
        node, size, pages = self.root(space), self._page_size, []
        for start in range(0, limit - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            node = child
            pages.append(node.page)
        self._pages.share(pages)
        return node, pages

    def add(self, parent: Node, digit: _Digit, page: int, vector_sum: np.ndarray | None) -> Node:
        """A page has been filled after `parent`. Where equal tokens are cached, those stay."""
        assert len(digit) == self._page_size, f"{len(digit)} tokens are not a full page"
        if not parent.depth:
            parent = self._roots.setdefault(parent.space, parent)
        child = parent.children.get(digit)
        if child is None:
            child = Node(parent.space, parent, digit, page, parent.depth + 1, vector_sum)
            parent.children[digit] = child
            self._pages.cache(page)
        return child

    def left(self, node: Node) -> None:
        """A sequence that read or wrote the path down to `node` has released its pages."""
        turn = next(self._turns)
        step: Node | None = node
        while step is not None:
            step.used = turn
            step = step.parent
        self._offer(node)

    def keep(self, session: Hashable, node: Node) -> None:
        """The session's last turn ends at `node`: keep it warm, instead of the turn before."""
        self._forget(session)
        if not 0 < node.depth <= self._session_pages:
            return
        node.num_sessions += 1
        self.num_session_pages += node.depth
        self._sessions[session] = _Session(node, self._clock() + self._session_idle_s)
        while self.num_session_pages > self._session_pages:
            self._forget(next(iter(self._sessions)))

    def make_room(self, count: int) -> bool:
        """Free `count` pages. False when there are not enough; then some may have been freed.

        An idle page above one in use stays: somebody computed it twice and goes on below it.
        """
        short = count - self._pages.num_free
        if short > self._pages.num_idle:
            return False
        while short > 0:
            node = self._next_idle()
            if node is None:
                return False
            self._drop(node)
            short -= 1
        return True

    def _next_idle(self) -> Node | None:
        """The least recently used leaf that nobody holds; sessions yield last."""
        while True:
            while self._idle:
                used, _, node = heapq.heappop(self._idle)
                node.is_listed = False
                if used == node.used and self._may_go(node):
                    return node
                self._offer(node)  # used since it was listed, or no more
            if not self._sessions:
                return None
            self._forget(next(iter(self._sessions)))

    def _may_go(self, node: Node) -> bool:
        is_leaf = node.page >= 0 and not node.children and not node.num_sessions
        return is_leaf and self._pages.is_idle(node.page)

    def _offer(self, node: Node) -> None:
        """List a node as one that may go; asked again when its turn has come."""
        while node.page < 0 and node.parent is not None:  # given up while somebody stood here
            node = node.parent
        if self._may_go(node) and not node.is_listed:
            node.is_listed = True
            heapq.heappush(self._idle, (node.used, next(self._entries), node))

    def _drop(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.digit]
        self._pages.uncache(node.page)
        node.page = -1  # a sequence may still stand here; what it adds below is never found
        if not parent.children and self._roots.get(parent.space) is parent:
            del self._roots[parent.space]
        self._offer(parent)

    def _expire(self) -> None:
        now = self._clock()
        while self._sessions and next(iter(self._sessions.values())).expires_s <= now:
            self._forget(next(iter(self._sessions)))

    def _forget(self, name: Hashable) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            session.node.num_sessions -= 1
            self.num_session_pages -= session.node.depth
            self._offer(session.node)
