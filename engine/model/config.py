"""A decoder's architecture, read from a Hugging Face `config.json`.

Three families share one skeleton (pre-norm, rotary positions, grouped heads, gated MLP) and
differ in flags: Llama (Touvron 2023; Llama 3 adds rope scaling), Qwen2 (biases on q, k, v),
Qwen3 (a norm on every query and key head, no biases).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Frequency rescaling of Llama 3.1 (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and flags of one decoder. Frozen; every array shape follows from it."""

    architecture: str
    vocab_size: int
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_size: int  # F
    max_len: int  # tokens of context the weights were trained for
    rms_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "mlp_size", "max_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} is {getattr(self, name)}; must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: {self.num_heads} attention heads do not divide into "
                f"{self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim is {self.head_dim}; rotary needs it even")


def load_config(directory: Path) -> ModelConfig:
    """Read `config.json`. Raises ConfigError naming the file and what it lacks."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; a model directory needs config.json")
    try:
        table = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds {type(table).__name__}; want a JSON object")
    return parse_config(table, generation_eos=_generation_eos(directory))


def parse_config(table: Mapping[str, Any], *, generation_eos: tuple[int, ...] = ()) -> ModelConfig:
    """Turn the fields of a `config.json` into a ModelConfig."""
    architecture = (table.get("architectures") or ["none named"])[0]
    if architecture not in SUPPORTED:
        raise ConfigError(
            f"config.json names architecture {architecture!r}; supported: {', '.join(SUPPORTED)}"
        )
    _refuse_unsupported(table)
    hidden, heads = _integer(table, "hidden_size"), _integer(table, "num_attention_heads")
    is_llama, is_qwen2 = architecture.startswith("Llama"), architecture.startswith("Qwen2")
    bias = bool(table.get("attention_bias", False))
    theta, scaling = _rope(table)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(table, "vocab_size"),
        hidden_size=hidden,
        num_layers=_integer(table, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=int(table.get("num_key_value_heads") or heads),
        head_dim=int(table.get("head_dim") or hidden // heads),
        mlp_size=_integer(table, "intermediate_size"),
        max_len=int(table.get("max_position_embeddings", 2048)),
        rms_eps=float(table.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=is_qwen2 or bias,
        out_bias=bias and not is_qwen2,
        mlp_bias=is_llama and bool(table.get("mlp_bias", False)),
        qk_norm=architecture.startswith("Qwen3"),
        tied_embeddings=bool(table.get("tie_word_embeddings", False)),
        eos_ids=generation_eos or _ids(table.get("eos_token_id")),
    )


def _refuse_unsupported(table: Mapping[str, Any]) -> None:
    if table.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act is {table['hidden_act']!r}; supported: 'silu'")
    if table.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window is true; sliding windows are not built")
    if table.get("quantization_config"):
        raise ConfigError("config.json: quantization_config is set; want bf16 or f32 weights")


def _integer(table: Mapping[str, Any], name: str) -> int:
    value = table.get(name)
    if type(value) is not int:
        raise ConfigError(f"config.json: {name} is {value!r}; want an integer")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(item) for item in value)


def _generation_eos(directory: Path) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        return _ids(json.loads(path.read_text("utf-8")).get("eos_token_id"))
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _rope(table: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Theta and scaling, from the older `rope_scaling` or the newer `rope_parameters`."""
    nested = table.get("rope_parameters") or {}
    scaling = table.get("rope_scaling") or nested
    theta = float(nested.get("rope_theta") or table.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"config.json: rope type is {kind!r}; supported: 'default', 'llama3'")
    numbers = {
        name: scaling.get(name)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    }
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"config.json: rope scaling {name} is {value!r}; want a number > 0")
    return theta, Llama3Rope(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_len=int(scaling["original_max_position_embeddings"]),
    )
