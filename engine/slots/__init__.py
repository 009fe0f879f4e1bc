"""Stacked adapters on the device: LoRAs inside the model, edits of its head."""

from engine.slots.head import HeadSlots, check_fits
from engine.slots.lora import LoraSlots, module_sizes

__all__ = ["HeadSlots", "LoraSlots", "check_fits", "module_sizes"]
