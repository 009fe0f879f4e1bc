"""Safetensors files to a decoder's parameters, and back. The Hugging Face names live here only."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from engine.errors import WeightsError
from engine.model.config import ModelConfig, load_config
from engine.model.decoder import Decoder

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A decoder split for serving: structure that jit treats as static, and its arrays."""

    config: ModelConfig
    graph: nnx.GraphDef
    params: nnx.State
    base_hash: str  # SHA-256 over the weights and the sizes they were read with

    def merge(self) -> Decoder:
        """The decoder as one object. Cheap; shares the arrays."""
        return nnx.merge(self.graph, self.params)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter: its path in the module tree, its name in the file, its layout there."""

    path: tuple[str | int, ...]
    name: str
    is_transposed: bool  # the file holds [out, in], the module [in, out]


def load_checkpoint(directory: Path, *, dtype: str = "float32") -> LoadedModel:
    """Read a Hugging Face directory, sharded or not.

    Raises:
      ConfigError: config.json is missing, unreadable or names another architecture.
      WeightsError: a file or tensor is missing, damaged or has another shape than the config says.
    """
    config = load_config(directory)
    with jax.numpy_dtype_promotion("standard"):  # in flax's initialisers; nothing is computed
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    graph, shapes = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(shapes))
    digest = hashlib.sha256(repr((config, dtype)).encode())
    loaded = []
    with _Files(directory) as files:
        for entry in _entries(config):
            want = flat.pop(entry.path)
            raw = files.read(entry.name)
            digest.update(entry.name.encode())
            digest.update(np.ascontiguousarray(raw).view(np.uint8).data)
            loaded.append((entry.path, want.replace(_fit(entry, raw, want.shape, dtype))))
    assert not flat, f"parameters without a file name: {list(flat)}"
    params = nnx.from_flat_state(loaded)
    return LoadedModel(config=config, graph=graph, params=params, base_hash=digest.hexdigest())


def save_checkpoint(
    directory: Path, config: ModelConfig, params: nnx.State, *, dtype: str = "bfloat16"
) -> None:
    """Write `model.safetensors` and `config.json`. Rounds to `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    flat = dict(nnx.to_flat_state(params))
    tensors = {}
    for entry in _entries(config):
        array = np.asarray(flat[entry.path][...])
        array = array.T if entry.is_transposed else array
        tensors[entry.name] = np.ascontiguousarray(array.astype(kind))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_hugging_face(config, dtype), indent=2) + "\n"
    (directory / "config.json").write_text(text, "utf-8")


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    yield _Entry(("embedding",), "model.embed_tokens.weight", False)
    for index in range(config.num_layers):
        yield from _layer_entries(config, index)
    yield _Entry(("norm", "weight"), "model.norm.weight", False)
    if not config.tied_embeddings:
        yield _Entry(("head", "kernel"), "lm_head.weight", True)


def _layer_entries(config: ModelConfig, index: int) -> Iterator[_Entry]:
    here, prefix = ("layers", index), f"model.layers.{index}."
    norms = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for ours, theirs in norms.items():
        yield _Entry((*here, ours, "weight"), f"{prefix}{theirs}.weight", False)
    for name in _ATTENTION:
        yield _Entry((*here, "attention", name, "kernel"), f"{prefix}self_attn.{name}.weight", True)
        if config.out_bias if name == "o_proj" else config.qkv_bias:
            bias = f"{prefix}self_attn.{name}.bias"
            yield _Entry((*here, "attention", name, "bias"), bias, False)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        yield _Entry(
            (*here, "attention", name, "weight"), f"{prefix}self_attn.{name}.weight", False
        )
    for name in _MLP:
        yield _Entry((*here, "mlp", name, "kernel"), f"{prefix}mlp.{name}.weight", True)
        if config.mlp_bias:
            yield _Entry((*here, "mlp", name, "bias"), f"{prefix}mlp.{name}.bias", False)


def _fit(entry: _Entry, raw: np.ndarray, shape: tuple[int, ...], dtype: str) -> jax.Array:
    array = raw.T if entry.is_transposed else raw
    if array.shape != shape:
        want = shape[::-1] if entry.is_transposed else shape
        raise WeightsError(
            f"tensor {entry.name} has shape {list(raw.shape)}; config.json asks for {list(want)}"
        )
    return jnp.asarray(np.ascontiguousarray(array), jnp.dtype(dtype))


class _Files:
    """The safetensors files of a directory, opened once, read tensor by tensor."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shard_of = self._index()
        self._open = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _index(self) -> dict[str, str] | None:
        """Tensor name to shard file; None for a single file."""
        path = self._directory / _INDEX
        if (self._directory / "model.safetensors").is_file():
            return None
        if not path.is_file():
            raise WeightsError(
                f"{self._directory} has neither model.safetensors nor {_INDEX}; "
                "weights are read from safetensors only"
            )
        try:
            return dict(json.loads(path.read_text("utf-8"))["weight_map"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read: {error!r}") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor as NumPy, in the file's own precision."""
        shard = "model.safetensors" if self._shard_of is None else self._shard_of.get(name)
        if shard is None:
            raise WeightsError(f"{self._directory / _INDEX} does not list tensor {name}")
        file = self._file(shard)
        try:
            kind = file.get_slice(name).get_dtype()
            if kind not in _DTYPES:
                raise WeightsError(f"tensor {name} is {kind}; supported: {', '.join(_DTYPES)}")
            return file.get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(
                f"{self._directory / shard} has no usable {name}: {error}"
            ) from error

    def _file(self, shard: str):  # noqa: ANN202  # safetensors exports no type for it
        if shard not in self._open:
            path = self._directory / shard
            if Path(shard).name != shard or not path.is_file():
                raise WeightsError(f"weights file {path} does not exist")
            try:
                self._open[shard] = safe_open(path, framework="np").__enter__()
            except (SafetensorError, OSError, struct.error) as error:
                raise WeightsError(
                    f"{path} is damaged or truncated ({error}); copy the file again"
                ) from error
        return self._open[shard]


def _hugging_face(config: ModelConfig, dtype: str) -> dict[str, object]:
    """The `config.json` of an unscaled-rope model that we trained ourselves."""
    assert config.rope_scaling is None
    return {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "eos_token_id": list(config.eos_ids),
        "torch_dtype": dtype,
    }
