"""adapter_config.json of the peft package, read strictly: what is not understood is refused."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import IncompatibleAdapter, InvalidAdapter

CONFIG = "adapter_config.json"
_MAX_KEYS, _MAX_KEY_LEN = 4_096, 256  # of a pattern
# Settings that change the arithmetic in ways a low-rank sum is not, and what they are.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (whole modules beside the LoRA)",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "lora_bias": "lora_bias",
    "fan_in_fan_out": "fan_in_fan_out",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron layers",
    "use_qalora": "QALoRA",
    "target_parameters": "target_parameters (weights that are no linear module's)",
    "arrow_config": "Arrow",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # inits that rewrite the base's weights
_REPEATED_GROUP = re.compile(r"\)[*+?{]")  # can take for ever to match


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What a LoRA's arithmetic needs."""

    rank: int
    alpha: float
    uses_rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...]  # module names; empty where they are given as an expression
    base_name: str  # of the model it was trained on; may be empty

    def scale(self, path: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732, section 3)."""
        want = _by_pattern(path, self.rank_pattern, self.rank)
        if want != rank:
            raise InvalidAdapter(
                f"{CONFIG}: {path} should have rank {want}; its factors have {rank}"
            )
        alpha = _by_pattern(path, self.alpha_pattern, self.alpha)
        return alpha / rank**0.5 if self.uses_rslora else alpha / rank

    def check_base(self, names: Collection[str]) -> None:
        """Refuse a LoRA that says it is of another model. Raises IncompatibleAdapter."""
        own = self.base_name.rstrip("/").rpartition("/")[2]
        if own and own.casefold() not in {name.casefold() for name in names}:
            raise IncompatibleAdapter(
                f"the LoRA was trained on {self.base_name[:200]!r}; this server serves "
                f"{', '.join(sorted(names))}: if these are the same weights, load it with any_base"
            )


def read_config(directory: Path) -> PeftConfig:
    """Read and check the file. Raises InvalidAdapter."""
    table = _table(directory)
    for name, meaning in _UNSUPPORTED.items():
        if table.get(name):
            raise InvalidAdapter(f"{CONFIG}: {meaning} is not supported; {name} must not be set")
    if table.get("bias", "none") != "none":
        raise _fault("bias", table["bias"], "'none'; others are not supported")
    init = str(table.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise InvalidAdapter(
            f"{CONFIG}: init_lora_weights {init!r} belongs to rewritten base weights; save it "
            "with path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )
    targets = table.get("target_modules")
    return PeftConfig(
        rank=_rank(table.get("r")),
        alpha=_number("lora_alpha", table.get("lora_alpha", 8)),
        uses_rslora=bool(table.get("use_rslora")),
        rank_pattern=_pattern("rank_pattern", table.get("rank_pattern")),
        alpha_pattern=_pattern("alpha_pattern", table.get("alpha_pattern")),
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
        base_name=str(table.get("base_model_name_or_path") or ""),
    )


def _table(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise InvalidAdapter(
            f"{path} does not exist; give the directory that peft's save_pretrained wrote"
        )
    try:
        table = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON
        raise InvalidAdapter(f"{path} is not JSON ({error}); copy the file again") from error
    if not isinstance(table, dict) or table.get("peft_type") != "LORA":
        kind = table.get("peft_type") if isinstance(table, dict) else table
        raise InvalidAdapter(f"{path}: peft_type is {str(kind)[:80]!r}; only 'LORA' is served")
    return table


def _rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _fault("r", value, "a whole number from 1")
    return value


def _number(name: str, value: Any) -> float:
    """A number that a float32 holds. JSON as Python reads it also has NaN and Infinity."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < abs(value) < 1e6:  # also NaN
        raise _fault(name, value, "a number, not 0 and below a million")
    return float(value)


def _pattern(name: str, value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_KEYS:
        raise _fault(name, value, f"a table of {_MAX_KEYS} module names at most")
    for key in value:
        try:
            re.compile(key)
        except re.error as error:
            raise _fault(f"{name} key", key, f"a module's name or its end ({error})") from error
        if len(key) > _MAX_KEY_LEN or _REPEATED_GROUP.search(key):
            raise _fault(f"{name} key", key, "a module's name or its end, no repeated groups")
    return {key: _number(f"{name}[{key!r}]", each) for key, each in value.items()}


def _fault(name: str, value: Any, allowed: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CONFIG}: {name} is {str(value)[:80]!r}; use {allowed}")


def _by_pattern(path: str, patterns: Mapping[str, float], default: float) -> float:
    """peft's rule: the first key that the path equals or ends with, as a regular expression."""
    for key, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
