"""Attention of new tokens over a paged KV pool, and the write that precedes it."""

from engine.ops.paged_attention.reference import append, paged_attention

__all__ = ["append", "paged_attention"]
