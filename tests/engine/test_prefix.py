"""The prefix cache against a plain model, and the rules by which pages stay and go."""

import random

import numpy as np
import pytest

from engine.kv.pages import PageTable
from engine.kv.prefix import PrefixCache

SIZE = 4


class Bench:
    """A small pool with its cache, a clock that is set by hand, and jobs that fill pages."""

    def __init__(self, num_pages=20, session_pages=0):
        self.now = 0.0
        self.pages = PageTable(num_pages)
        self.cache = PrefixCache(
            self.pages,
            page_size=SIZE,
            session_pages=session_pages,
            session_idle_s=60.0,
            clock=lambda: self.now,
        )

    def run(self, tokens, *, space="a", session=None):
        """A job over whole pages: match, take, fill, leave. Returns how many pages were found."""
        held = self.begin(tokens, space=space)
        if held is None:
            return None
        node, pages, found = held
        if session is not None:
            self.cache.keep(session, node)
        self.pages.release(pages)
        self.cache.left(node)
        self.check()
        return found

    def begin(self, tokens, *, space="a"):
        node, pages = self.cache.match(space, tokens, len(tokens))
        found = len(pages)
        missing = len(tokens) // SIZE - found
        if not self.cache.make_room(missing):
            self.pages.release(pages)
            return None
        taken = self.pages.take(missing)
        assert taken is not None
        pages = pages + taken
        for at in range(found, len(pages)):
            digit = tuple(tokens[at * SIZE : (at + 1) * SIZE])
            node = self.cache.add(node, digit, pages[at], np.array([at], np.float32))
        return node, pages, found

    def check(self):
        table = self.pages
        assert table.num_free + table.num_idle + table.num_used == table.num_pages


def text(*pages):
    """Tokens of whole pages, one number each."""
    return [10 * page + i for page in pages for i in range(SIZE)]


def test_equal_beginnings_share_pages_and_spaces_do_not():
    bench = Bench()
    assert bench.run(text(1, 2, 3)) == 0
    assert bench.run(text(1, 2, 3)) == 3
    assert bench.run(text(1, 2, 4)) == 2
    assert bench.run(text(2, 3)) == 0  # the same pages elsewhere are other keys and values
    assert bench.run(text(1, 2, 3), space="b") == 0
    assert bench.pages.num_free == 20 - 4 - 2 - 3
    assert bench.pages.num_used == 0


def test_a_match_ends_at_the_limit_and_within_whole_pages():
    bench = Bench()
    bench.run(text(1, 2, 3))
    for limit, want in ((0, 0), (3, 0), (4, 1), (11, 2), (12, 3), (50, 3)):
        _, pages = bench.cache.match("a", text(1, 2, 3, 4), limit)
        assert len(pages) == want
        bench.pages.release(pages)


def test_the_sum_of_the_last_matched_page_comes_back():
    bench = Bench()
    bench.run(text(1, 2))
    node, pages = bench.cache.match("a", text(1, 2, 3), 100)
    np.testing.assert_array_equal(node.vector_sum, [1.0])
    bench.pages.release(pages)
    root, pages = bench.cache.match("a", text(9), 100)
    assert (root.vector_sum, pages) == (None, [])


def test_leaves_go_first_and_the_least_recently_used_of_them():
    bench = Bench(num_pages=4)
    bench.run(text(1, 2))
    bench.run(text(1, 3))
    bench.run(text(1, 2))  # used again
    assert bench.cache.make_room(2)  # one is free, 3 goes
    assert bench.run(text(1, 2)) == 2
    assert bench.cache.make_room(3)  # 2 goes before 1
    assert bench.run(text(1)) == 1


def test_pages_of_a_running_job_stay():
    bench = Bench(num_pages=4)
    held = bench.begin(text(1, 2))
    assert bench.cache.make_room(2)
    assert not bench.cache.make_room(3)
    bench.run(text(1, 3))
    assert not bench.cache.make_room(3)
    assert held is not None
    _, pages, _ = held
    assert bench.pages.num_used == 2
    assert bench.run(text(1, 2)) == 2
    bench.pages.release(pages)
    bench.check()


def test_what_cannot_be_had_costs_nothing():
    bench = Bench(num_pages=4)
    bench.run(text(1, 2, 3))
    assert not bench.cache.make_room(5)
    assert bench.run(text(1, 2, 3)) == 3


def test_a_session_outlives_newer_prefixes_until_it_has_been_idle():
    bench = Bench(num_pages=6, session_pages=3)
    bench.run(text(1, 2), session="s")
    bench.run(text(3, 4))
    assert bench.cache.make_room(4)  # 3 and 4 go, though they are newer
    assert bench.run(text(1, 2)) == 2
    bench.run(text(3, 4))
    bench.now = 61.0
    bench.cache.match("a", [], 0)  # the session's time is up
    assert bench.cache.make_room(4)
    assert bench.run(text(3, 4)) == 2
    assert bench.run(text(1, 2)) == 0


def test_a_session_moves_on_with_its_turns_and_keeps_to_the_budget():
    bench = Bench(num_pages=12, session_pages=4)
    bench.run(text(1, 2), session="s")
    bench.run(text(1, 2, 3), session="s")
    bench.run(text(5, 6), session="t")  # five pages are too many: the older session yields
    bench.run(text(7))
    assert bench.cache.make_room(12 - 2)
    assert bench.run(text(5, 6)) == 2
    assert bench.run(text(1, 2, 3)) == 0


def test_sessions_are_the_last_resort_and_no_deadlock():
    bench = Bench(num_pages=3, session_pages=3)
    bench.run(text(1, 2, 3), session="s")
    assert bench.run(text(4, 5, 6)) == 0
    assert bench.run(text(1, 2, 3)) == 0


def test_a_session_larger_than_the_budget_is_not_kept():
    bench = Bench(num_pages=6, session_pages=1)
    bench.run(text(1, 2), session="s")
    bench.run(text(3))
    assert bench.cache.make_room(5)
    assert bench.run(text(3)) == 1


def test_the_same_pages_filled_twice_at_once_are_cached_once():
    bench = Bench()
    one, two = bench.begin(text(1, 2)), bench.begin(text(1, 9))
    assert one is not None and two is not None
    assert (one[2], two[2]) == (0, 1)
    node, pages = bench.cache.match("a", [], 0)
    own = bench.pages.take(1)
    assert own is not None
    first = bench.cache.add(node, tuple(text(1)), own[0], None)
    assert first.page == one[1][0] != own[0]
    for taken in (one[1], two[1], own, pages):
        bench.pages.release(taken)
    bench.check()
    assert bench.pages.num_used == 0


def test_two_that_begin_a_space_at_once_share_it_afterwards():
    bench = Bench()
    held = [bench.cache.match("new", [1] * 8, 8) for _ in range(2)]
    for (root, _), letter in zip(held, (1, 2), strict=True):
        page = bench.pages.take(1)
        assert page is not None
        node = bench.cache.add(root, (letter,) * SIZE, page[0], None)
        bench.pages.release(page)
        bench.cache.left(node)
    assert [bench.run([letter] * SIZE, space="new") for letter in (1, 2)] == [1, 1]


def test_a_page_given_up_below_a_running_twin_does_not_lock_its_parent():
    bench = Bench(num_pages=4)
    bench.run([1] * SIZE)
    twins = []
    for _ in range(2):  # both find the first page and compute the second themselves
        node, found = bench.cache.match("a", [1] * SIZE, SIZE)
        own = bench.pages.take(1)
        assert own is not None
        twins.append((node, found + own))
    ends = [bench.cache.add(node, (2,) * SIZE, pages[-1], None) for node, pages in twins]
    bench.pages.release(twins[0][1])
    bench.cache.left(ends[0])
    assert bench.cache.make_room(2)  # the cached second page goes; its twin's owner runs on
    bench.pages.release(twins[1][1])
    bench.cache.left(ends[1])
    assert bench.cache.make_room(4)
    bench.check()


def test_what_leaves_nothing_cached_leaves_nothing():
    bench = Bench()
    for index in range(100):
        node, pages = bench.cache.match(f"salt {index}", [1, 2], 2)  # less than a page
        assert not pages
        bench.cache.left(node)
    for _ in range(100):
        bench.run([3] * 8)
    assert len(bench.cache._roots) == 1
    assert len(bench.cache._idle) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_random_jobs_keep_the_law_and_find_what_a_dictionary_would(seed):
    rng, bench = random.Random(seed), Bench(num_pages=24, session_pages=6)
    running = []
    for turn in range(3000):
        bench.now += rng.random() * 5
        tokens = text(*(rng.randint(1, 3) for _ in range(rng.randint(1, 5))))
        space = rng.choice("ab")
        if rng.random() < 0.5 and len(running) < 4:
            held = bench.begin(tokens, space=space)
            if held is not None:
                node, pages, found = held
                assert len(set(pages)) == len(pages)
                running.append((tokens, node, pages))
                again, same = bench.cache.match(space, tokens, len(tokens))
                assert again is node or found < len(pages)
                bench.pages.release(same)
        elif running:
            _, node, pages = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.3:
                bench.cache.keep(turn % 5, node)
            bench.pages.release(pages)
            bench.cache.left(node)
        bench.check()
    for _, node, pages in running:
        bench.pages.release(pages)
        bench.cache.left(node)
    assert bench.pages.num_used == 0
    assert bench.cache.make_room(24)
    assert bench.pages.num_free == 24
