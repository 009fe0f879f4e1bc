"""LoRA directories of the peft package to tables. What cannot be served is refused by name.

adapter_config.json            r, lora_alpha, target_modules, rank and alpha patterns, …
adapter_model.safetensors      base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from adapters.errors import IncompatibleAdapter, InvalidAdapter
from engine import LoraTable

Sizes = Mapping[str, tuple[int, int, int]]
"""Modules of the served model: name -> (layers, size in, size out)."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:model\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\."
    r"(?P<module>\w+)|lm_head)\.lora_(?P<side>[AB])\.weight"
)
# Settings of peft that change the arithmetic in ways a low-rank sum is not, and what they are.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (whole modules beside the LoRA)",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "lora_bias": "lora_bias",
    "fan_in_fan_out": "fan_in_fan_out",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron layers",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # inits that rewrite the base's weights


def read_peft(directory: Path, sizes: Sizes, *, max_rank: int) -> LoraTable:
    """Read a directory that `PeftModel.save_pretrained` wrote.

    Raises:
      InvalidAdapter: a file is missing, half-written or holds NaN, or a part is not supported.
      IncompatibleAdapter: it was made for another model, or is too large for this server.
    """
    config = _config(directory)
    _refuse_unsupported(config)
    pairs = _pairs(_tensors(directory), sizes)
    ranks = {len(sides["A"]) for sides in pairs.values()}
    if max(ranks) > max_rank:
        raise IncompatibleAdapter(
            f"the LoRA has rank {max(ranks)}; this server's slots hold {max_rank}: raise "
            "engine.max_lora_rank (up to 64), or train a smaller one"
        )
    return _table(pairs, sizes, config, max(ranks))


def _config(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    if not path.is_file():
        raise InvalidAdapter(
            f"{path} does not exist; give the directory that peft's save_pretrained wrote"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidAdapter(f"{path} is not JSON ({error}); copy the file again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise InvalidAdapter(f"{path}: peft_type is {kind!r}; only 'LORA' is served")
    return config


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name, meaning in _UNSUPPORTED.items():
        if config.get(name):
            raise InvalidAdapter(f"{_CONFIG}: {meaning} is not supported; {name} must not be set")
    if config.get("bias", "none") != "none":
        raise InvalidAdapter(f"{_CONFIG}: bias is {config['bias']!r}; only 'none' is supported")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise InvalidAdapter(
            f"{_CONFIG}: init_lora_weights {init!r} belongs to rewritten base weights; save it "
            "with path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    path = directory / _WEIGHTS
    if not path.is_file():
        hint = "; a .bin file needs torch to be read: save it again with safe_serialization"
        raise InvalidAdapter(
            f"{path} does not exist{hint if list(directory.glob('*.bin')) else ''}"
        )
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (SafetensorError, OSError, struct.error) as error:
        raise InvalidAdapter(
            f"{path} is damaged or half-written ({error}); copy the file again"
        ) from error
    if not tensors:
        raise InvalidAdapter(f"{path} holds no tensors; copy the file again")
    return tensors


def _pairs(
    tensors: Mapping[str, np.ndarray], sizes: Sizes
) -> dict[tuple[str, str, int], dict[str, np.ndarray]]:
    """Factors by (path in the model, module, layer)."""
    pairs: dict[tuple[str, str, int], dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise InvalidAdapter(
                f"{_WEIGHTS}: {name} is not a LoRA factor of a linear module; other weights are "
                "not served (save with save_embedding_layers=False)"
            )
        module, layer = found["module"] or "lm_head", int(found["layer"] or 0)
        if module not in sizes:
            hint = "; set engine.lora_on_head to allow it" if module == "lm_head" else ""
            raise IncompatibleAdapter(
                f"the LoRA adapts {module}; this server adapts {', '.join(sizes)}{hint}"
            )
        if not np.isfinite(array).all():
            raise InvalidAdapter(f"{_WEIGHTS}: {name} holds NaN or infinity; train it again")
        pairs.setdefault((found["path"], module, layer), {})[found["side"]] = array
    for (path, module, layer), sides in pairs.items():
        _check_pair(path, sides, sizes[module], layer)
    return pairs


def _check_pair(
    path: str, sides: Mapping[str, np.ndarray], size: tuple[int, int, int], layer: int
) -> None:
    layers, size_in, size_out = size
    if set(sides) != {"A", "B"}:
        raise InvalidAdapter(f"{_WEIGHTS}: {path} has only lora_{''.join(sides)}; both are needed")
    if layer >= layers:
        raise IncompatibleAdapter(
            f"the LoRA adapts layer {layer}; this model has layers 0 to {layers - 1}"
        )
    a, b = sides["A"].shape, sides["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (a[1], b[0]) != (size_in, size_out):
        raise IncompatibleAdapter(
            f"{path} has factors of {list(a)} and {list(b)}; this model's module takes "
            f"[r, {size_in}] and [{size_out}, r]: the LoRA is of another model"
        )


def _table(
    pairs: Mapping[tuple[str, str, int], Mapping[str, np.ndarray]],
    sizes: Sizes,
    config: Mapping[str, Any],
    rank: int,
) -> LoraTable:
    """Factors stacked by layer, with their scale in b. Ranks below `rank` are filled with zeros."""
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    for (path, module, layer), sides in pairs.items():
        layers, size_in, size_out = sizes[module]
        if module not in a:
            a[module] = np.zeros((layers, rank, size_in), np.float32)
            b[module] = np.zeros((layers, rank, size_out), np.float32)
        own = len(sides["A"])
        a[module][layer, :own] = sides["A"]
        b[module][layer, :own] = sides["B"].T * np.float32(_scale(path, own, config))
    return LoraTable(a, b)


def _scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732, section 3)."""
    alpha = _by_pattern(path, config.get("alpha_pattern") or {}, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InvalidAdapter(f"{_CONFIG}: lora_alpha is {alpha!r}; want a number")
    want = _by_pattern(path, config.get("rank_pattern") or {}, config.get("r"))
    if want != rank:
        raise InvalidAdapter(f"{_CONFIG}: {path} should have rank {want}; its factors have {rank}")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """peft's rule: the first key that the path equals or ends with, as a regular expression."""
    for key, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
