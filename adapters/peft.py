"""LoRA directories of the peft package to tables. What cannot be served is refused by name.

adapter_config.json            r, lora_alpha, target_modules, rank and alpha patterns, …
adapter_model.safetensors      base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
"""

import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from adapters.errors import IncompatibleAdapter, InvalidAdapter
from adapters.peft_config import CONFIG, PeftConfig, read_config
from engine import LoraTable

Sizes = Mapping[str, tuple[int, int, int]]
"""Modules of the served model: name -> (layers, size in, size out)."""

_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:model\.)?layers\.(?P<layer>\d{1,6})\.(?:self_attn|mlp)\."
    r"(?P<module>\w+)|lm_head)\.lora_(?P<side>[AB])\.weight"
)
_DTYPES = ("F32", "F16", "BF16")
_HEADER_BYTES = 1 << 20  # of a file with many names
_READ_RANKS = 256  # a file with more is not even read
_LARGEST = 1e6  # entry of a factor: no trained LoRA has such, and their products stay finite


def read_peft(
    directory: Path, sizes: Sizes, *, max_rank: int, base_names: Collection[str] = ()
) -> LoraTable:
    """Read a directory that `PeftModel.save_pretrained` wrote.

    `base_names`: what the served model is called; a LoRA that names another is refused. Without
    any, its shapes alone have to fit.

    Raises:
      InvalidAdapter: a file is missing, half-written or holds NaN, or a part is not supported.
      IncompatibleAdapter: it was made for another model, or is too large for this server.
    """
    try:
        return _read(directory, sizes, max_rank, base_names)
    except OSError as error:  # a name that no file can have, a directory that may not be read
        raise InvalidAdapter(f"the directory cannot be read ({error.strerror})") from error


def _read(directory: Path, sizes: Sizes, max_rank: int, base_names: Collection[str]) -> LoraTable:
    config = read_config(directory)
    if base_names:
        config.check_base(base_names)
    largest = sum(layers * (size_in + size_out) for layers, size_in, size_out in sizes.values())
    pairs = _pairs(_tensors(directory, 4 * _READ_RANKS * largest + _HEADER_BYTES), sizes)
    ranks = {len(sides["A"]) for sides in pairs.values()}
    if max(ranks) > max_rank:
        raise IncompatibleAdapter(
            f"the LoRA has rank {max(ranks)}; this server's slots hold {max_rank}: raise "
            "engine.max_lora_rank (up to 64), or train a smaller one"
        )
    for target in config.targets:
        if not any(path == target or path.endswith(f".{target}") for path, _, _ in pairs):
            raise InvalidAdapter(
                f"{_WEIGHTS} has no factors of {target[:80]}, which {CONFIG} names as a target; "
                "copy both files again"
            )
    return _table(pairs, sizes, config, max(ranks))


def _tensors(directory: Path, most_bytes: int) -> dict[str, np.ndarray]:
    path = directory / _WEIGHTS
    if not path.is_file():
        hint = "; a .bin file needs torch to be read: save it again with safe_serialization"
        raise InvalidAdapter(
            f"{path} does not exist{hint if list(directory.glob('*.bin')) else ''}"
        )
    num_bytes = path.stat().st_size
    if num_bytes > most_bytes:
        raise IncompatibleAdapter(
            f"{path} has {num_bytes} bytes; the largest LoRA of this model has some {most_bytes}"
        )
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            odd = next((name for name in names if kinds[name] not in _DTYPES), None)
            if odd is not None:
                raise InvalidAdapter(
                    f"{_WEIGHTS}: {odd} is of type {kinds[odd]}; use one of {', '.join(_DTYPES)}"
                )
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
        if not np.abs(array).max(initial=0.0) <= _LARGEST:  # also NaN
            raise InvalidAdapter(
                f"{_WEIGHTS}: {name} holds NaN, infinity, or values beyond {_LARGEST:g}; train it "
                "again"
            )
        path = found["path"] if found["path"].startswith("model.") else f"model.{found['path']}"
        sides = pairs.setdefault((path if found["layer"] else module, module, layer), {})
        if found["side"] in sides:
            raise InvalidAdapter(f"{_WEIGHTS}: {name} is there twice, by two names; keep one")
        sides[found["side"]] = array
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
    is_pair = len(a) == len(b) == 2 and a[0] == b[1] > 0
    if not is_pair or (a[1], b[0]) != (size_in, size_out):
        raise IncompatibleAdapter(
            f"{path} has factors of {list(a)} and {list(b)}; this model's module takes "
            f"[r, {size_in}] and [{size_out}, r]: the LoRA is of another model"
        )


def _table(
    pairs: Mapping[tuple[str, str, int], Mapping[str, np.ndarray]],
    sizes: Sizes,
    config: PeftConfig,
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
        b[module][layer, :own] = sides["B"].T * np.float32(config.scale(path, own))
    return LoraTable(a, b)
