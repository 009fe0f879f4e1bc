"""The paged KV cache: who owns which page, and the arrays behind them."""

from engine.kv.pages import PageTable
from engine.kv.pool import KVPool, new_pool

__all__ = ["KVPool", "PageTable", "new_pool"]
