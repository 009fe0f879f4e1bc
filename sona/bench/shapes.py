"""Models of a real model's shape with random weights, for measurements that need no knowledge."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from engine.model import Decoder, LoadedModel, ModelConfig
from engine.text import Tokenizer

QWEN25_05B = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=151_936, hidden_size=896, num_layers=24,
    num_heads=14, num_kv_heads=2, head_dim=64, mlp_size=4864, max_len=32_768, rms_eps=1e-6,
    rope_theta=1e6, rope_scaling=None, qkv_bias=True, out_bias=False, mlp_bias=False,
    qk_norm=False, tied_embeddings=True, eos_ids=(151_645,),
)  # fmt: skip
_LONGEST = 12  # bytes of a made-up token


def random_model(config: ModelConfig, *, seed: int = 0, dtype: str = "float32") -> LoadedModel:
    """Normal weights of a trained model's size: activations stay finite, logits are flat."""
    rng, kind = np.random.default_rng(seed), jnp.dtype(dtype)
    with jax.numpy_dtype_promotion("standard"):  # in flax's initialisers; nothing is computed
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(abstract)
    leaves = [
        (path, leaf.replace(jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02, kind)))
        for path, leaf in nnx.to_flat_state(shapes)
    ]
    return LoadedModel(config, graph, nnx.from_flat_state(leaves), base_hash="random")


def random_tokenizer(vocab_size: int, eos_id: int) -> Tokenizer:
    """A byte-level BPE with as many made-up tokens as the vocabulary has rows."""
    rng = random.Random(0)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(words), []
    while len(words) < eos_id:
        pair = rng.choice(words), rng.choice(words)
        joined = "".join(pair)
        if len(joined) <= _LONGEST and joined not in known:
            known.add(joined)
            words.append(joined)
            merges.append(pair)
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    assert inner.token_to_id("<|end|>") == eos_id < vocab_size
    return Tokenizer(inner, inner, None, frozenset({eos_id}), None)
