"""Checkpoints to logits, against a float64 decoder that goes token by token."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from reference import decoder as reference
from support.checkpoints import FAMILIES, make_checkpoint

from engine.errors import ConfigError, WeightsError
from engine.head_rows import HeadRows
from engine.model import causal_attend, load_checkpoint, load_config, save_checkpoint


def our_logits(directory, tokens):
    model = load_checkpoint(directory).merge()
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    hidden = model(jnp.asarray([tokens], jnp.int32), positions, causal_attend)
    return np.asarray(model.logits(hidden))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_the_reference(tmp_path, family):
    config, tensors = make_checkpoint(tmp_path, family)
    tokens = np.random.default_rng(1).integers(0, 300, 70).tolist()  # beyond llama3's 64
    want = reference.logits(tensors, reference.hidden_states(tensors, config, tokens))
    # float32 through two layers, logits up to about 30.
    np.testing.assert_allclose(our_logits(tmp_path, tokens), want, atol=1e-4)


def test_shards_and_bfloat16_files_read_the_same(tmp_path):
    make_checkpoint(tmp_path / "one", "qwen3", dtype="bfloat16")
    make_checkpoint(tmp_path / "three", "qwen3", dtype="bfloat16", shards=3)
    one, three = (our_logits(tmp_path / name, [1, 2, 3]) for name in ("one", "three"))
    np.testing.assert_array_equal(one, three)


def test_saved_checkpoint_reads_back(tmp_path):
    make_checkpoint(tmp_path / "a", "qwen3")
    loaded = load_checkpoint(tmp_path / "a")
    save_checkpoint(tmp_path / "b", loaded.config, loaded.params, dtype="float32")
    again = load_checkpoint(tmp_path / "b")
    assert again.config == loaded.config
    assert again.base_hash == loaded.base_hash
    np.testing.assert_array_equal(
        our_logits(tmp_path / "a", [5, 6]), our_logits(tmp_path / "b", [5, 6])
    )


def test_base_hash_names_the_weights(tmp_path):
    make_checkpoint(tmp_path / "a", "llama", seed=0)
    make_checkpoint(tmp_path / "b", "llama", seed=1)
    assert load_checkpoint(tmp_path / "a").base_hash != load_checkpoint(tmp_path / "b").base_hash


def test_missing_weights_are_named(tmp_path):
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [4, 200, -1000], ids=["header", "inside-header", "inside-data"])
def test_truncated_weights_are_named(tmp_path, keep):
    make_checkpoint(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        load_checkpoint(tmp_path)


def test_missing_shard_and_missing_tensor_are_named(tmp_path):
    make_checkpoint(tmp_path, "llama", shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    saved = shard.read_bytes()
    shard.unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00002\.safetensors does not exist"):
        load_checkpoint(tmp_path)
    shard.write_bytes(saved)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(table))
    with pytest.raises(WeightsError, match=r"does not list tensor model\.norm\.weight"):
        load_checkpoint(tmp_path)


def test_a_shape_that_contradicts_the_config_is_named(tmp_path):
    config, _ = make_checkpoint(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(
        WeightsError, match=r"mlp\.gate_proj\.weight has shape \[80, 48\].*\[96, 48\]"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'; supported: LlamaFor"),
        ({"architectures": None}, "'none named'; supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "sliding windows are not built"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_size": "48"}, "hidden_size is '48'; want an integer"),
        ({"num_key_value_heads": 4}, "6 attention heads do not divide into 4"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling factor is None"),
    ],
)
def test_unserveable_configs_say_what_is_wrong(tmp_path, change, message):
    config, _ = make_checkpoint(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)


def test_missing_and_broken_config_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # an untied head, and a tied one
@pytest.mark.parametrize("count", [0, 1, 16, 17, 1500])
@pytest.mark.parametrize("backend", ["cpu", "another"])  # read in place, or gathered
def test_rows_of_the_head_are_those_of_the_file(tmp_path, monkeypatch, family, count, backend):
    monkeypatch.setattr("engine.head_rows.jax.default_backend", lambda: backend)
    config, tensors = make_checkpoint(tmp_path, family)
    weights = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    ids = np.random.default_rng(count).integers(0, len(weights), count)
    rows = HeadRows(load_checkpoint(tmp_path))(ids)
    assert rows.shape == (count, config["hidden_size"])
    np.testing.assert_array_equal(rows, np.asarray(weights, np.float32)[ids])
