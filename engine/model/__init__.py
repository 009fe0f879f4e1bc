"""Decoder families: configuration, modules, and files to weights and back."""

from engine.model.config import SUPPORTED, ModelConfig, load_config, parse_config
from engine.model.decoder import Attend, Decoder, causal_attend
from engine.model.weights import LoadedModel, load_checkpoint, save_checkpoint

__all__ = [
    "SUPPORTED",
    "Attend",
    "Decoder",
    "LoadedModel",
    "ModelConfig",
    "causal_attend",
    "load_checkpoint",
    "load_config",
    "parse_config",
    "save_checkpoint",
]
