"""What the LoRAs of a batch add to the linear modules."""

from engine.ops.lora_delta.reference import LoraStack, adapter_of, add_lora_delta

__all__ = ["LoraStack", "adapter_of", "add_lora_delta"]
