"""The page table against a plain model, with its conservation law after every act."""

import random

import pytest

from engine.kv.pages import PageTable


def test_random_acts_keep_the_law():
    rng, table = random.Random(0), PageTable(20)
    holders: list[list[int]] = []
    for _ in range(4000):
        act = rng.random()
        if act < 0.45:
            count = rng.randint(0, 6)
            pages = table.take(count)
            free = 20 - len({page for held in holders for page in held})
            assert (pages is None) == (count > free)
            if pages is not None:
                assert not set(pages) & {page for held in holders for page in held}
                holders.append(pages)
        elif act < 0.6 and holders:
            shared = list(rng.choice(holders))
            table.share(shared)
            holders.append(shared)
        elif holders:
            table.release(holders.pop(rng.randrange(len(holders))))
        held = {page for pages in holders for page in pages}
        assert table.num_used == len(held)
        assert table.num_free + table.num_used == 20


def test_releasing_twice_and_sharing_a_free_page_are_caught():
    table = PageTable(2)
    pages = table.take(1)
    assert pages is not None
    table.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        table.release(pages)
    with pytest.raises(AssertionError, match="is free"):
        table.share(pages)
