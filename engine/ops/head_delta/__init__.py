"""The shift that head edits add to base logits."""

from engine.ops.head_delta.reference import HeadStack, add_head_delta

__all__ = ["HeadStack", "add_head_delta"]
