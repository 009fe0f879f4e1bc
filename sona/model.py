"""A checkpoint to a warm engine: the slow part of starting up."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jax

from adapters.solve import compile_buckets
from adapters.threads import use_one_blas_thread
from engine.client import build_runner
from engine.config import EngineConfig, EnginePlan, plan_engine
from engine.errors import ConfigError
from engine.head_rows import HeadRows
from engine.model import LoadedModel, load_checkpoint, load_config
from engine.runner import Runner
from engine.text import Tokenizer
from sona.ports import ModelInfo

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""


@dataclass(frozen=True, slots=True, eq=False)
class Warm:
    """A model that can answer at once."""

    model: LoadedModel
    tokenizer: Tokenizer
    plan: EnginePlan
    runner: Runner
    info: ModelInfo
    head_rows: HeadRows
    names: frozenset[str]  # by which a LoRA may call it


def shipped_model() -> Path:
    """The directory of the model that comes with the package."""
    return Path(str(resources.files("sona").joinpath("models/nano/checkpoint")))


def warm_up(
    model: str, served_name: str, config: EngineConfig, *, learns: bool, progress: Progress
) -> Warm:
    """Load a checkpoint and compile everything that serving and learning will run. Blocking.

    Raises ConfigError, WeightsError, TokenizerError.
    """
    directory = Path(model) if model else shipped_model()
    if not directory.is_dir():
        raise ConfigError(
            f"model {model!r} is not a directory; give one with config.json, tokenizer.json and "
            "safetensors weights"
        )
    use_compile_cache()
    platform = jax.default_backend()
    plan = plan_engine(config, load_config(directory), platform=platform)
    progress("load weights", 0, 1)
    loaded = load_checkpoint(directory, dtype=plan.dtype)
    progress("load weights", 1, 1)
    tokenizer = Tokenizer.load(
        directory, vocab_size=loaded.config.vocab_size, eos_ids=loaded.config.eos_ids
    )
    runner = build_runner(loaded, plan, progress)
    progress("compile learning", 0, 1)
    use_one_blas_thread()
    head_rows = HeadRows(loaded)
    if learns:
        compile_buckets()
    progress("compile learning", 1, 1)
    name = served_name or ("sona-nano" if not model else directory.resolve().name)
    names = _names(name, directory.resolve())
    return Warm(loaded, tokenizer, plan, runner, _info(name, loaded, plan), head_rows, names)


def _names(name: str, directory: Path) -> frozenset[str]:
    """Its name here, its directory's, the hub's in a hub cache, and what its config says."""
    names = {name, directory.name}
    names |= {
        p.name.rpartition("--")[2] for p in directory.parents if p.name.startswith("models--")
    }
    said = json.loads((directory / "config.json").read_text("utf-8")).get("_name_or_path")
    names.add(str(said or "").rstrip("/").rpartition("/")[2])
    return frozenset(names - {""})


def use_compile_cache() -> None:
    """Keep compiled programs between starts, in a directory only this user can write."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "sona" / "xla"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # no home to write to: every start compiles
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _info(name: str, loaded: LoadedModel, plan: EnginePlan) -> ModelInfo:
    config = loaded.config
    return ModelInfo(
        name=name,
        architecture=config.architecture,
        max_model_len=plan.max_len,
        vocab_size=config.vocab_size,
        num_parameters=sum(int(leaf.size) for leaf in jax.tree.leaves(loaded.params)),
        dtype=plan.dtype,
        base_hash=loaded.base_hash,
    )
