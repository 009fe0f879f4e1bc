"""Random LoRAs for the small checkpoints."""

import numpy as np

from engine.api import LoraTable

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_lora(config, *, seed, rank=4, modules=MODULES, gain=0.15) -> LoraTable:
    """A LoRA that changes what the model says; `config` is a checkpoint's config.json."""
    rng = np.random.default_rng(seed)
    head, layers = config["head_dim"], config["num_hidden_layers"]
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys),
        "o_proj": (queries, hidden), "gate_proj": (hidden, mlp), "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }  # fmt: skip

    def draw(size):
        return (rng.standard_normal((layers, rank, size)) * gain).astype(np.float32)

    return LoraTable(
        {module: draw(sizes[module][0]) for module in modules},
        {module: draw(sizes[module][1]) for module in modules},
    )
