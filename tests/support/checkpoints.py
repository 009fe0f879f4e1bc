"""Small random checkpoints in Hugging Face layout, sharpened so that greedy choices are clear."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_checkpoint(
    directory: Path, family: str, *, seed: int = 0, shards: int = 1, dtype="float32"
):
    """Write a checkpoint; returns (config table, tensors in float32)."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**SHAPE, "tie_word_embeddings": False, **FAMILIES[family]}
    tensors = random_tensors(config, seed)
    if dtype == "bfloat16":
        tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    write_tensors(directory, tensors, shards)
    write_tokenizer(directory)
    return config, {k: v.astype(np.float32) for k, v in tensors.items()}


def random_tensors(config, seed):
    rng = np.random.default_rng(seed)
    d, h = config["hidden_size"], config["head_dim"]
    q, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    f, v = config["intermediate_size"], config["vocab_size"]

    def draw(rows, columns, gain=1.0):
        return (rng.standard_normal((rows, columns)) * gain * columns**-0.5).astype(np.float32)

    def norm(size):
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(v, d, 3.0), "model.norm.weight": norm(d)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        tensors[p + "input_layernorm.weight"] = norm(d)
        tensors[p + "post_attention_layernorm.weight"] = norm(d)
        for name, rows, columns in (("q", q, d), ("k", k, d), ("v", k, d), ("o", d, q)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = draw(rows, columns, 1.5)
            if config["model_type"] == "qwen2" and name != "o":
                bias = 0.3 * rng.standard_normal(rows)
                tensors[f"{p}self_attn.{name}_proj.bias"] = bias.astype(np.float32)
        if config["model_type"] == "qwen3":
            tensors[p + "self_attn.q_norm.weight"] = norm(h)
            tensors[p + "self_attn.k_norm.weight"] = norm(h)
        for name, rows, columns in (("gate", f, d), ("up", f, d), ("down", d, f)):
            tensors[f"{p}mlp.{name}_proj.weight"] = draw(rows, columns, 1.5)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(v, d, 3.0)
    return tensors


def write_tensors(directory: Path, tensors, shards: int):
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path):
    """One token per byte (ids 0 to 255), then the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    table = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(table))
