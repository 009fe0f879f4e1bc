"""What the LoRAs of a batch add to the linear modules."""

from engine.ops.lora_delta.reference import BLOCK_RANKS, LoraStack, adapter_of, add_lora_delta

__all__ = ["BLOCK_RANKS", "LoraStack", "adapter_of", "add_lora_delta"]
