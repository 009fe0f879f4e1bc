"""The dense decoder in NumPy float64, one token and one head at a time. No cache, no batch."""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def rotate(x, position, theta, scaling=None):
    """Half-split rotary embedding of one head's vector, pair (i, i + half) at a time."""
    half = len(x) // 2
    out = np.zeros(len(x))
    for i in range(half):
        angle = position * frequency(i, len(x), theta, scaling)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def frequency(pair, head_dim, theta, scaling):
    """Angle per position of one channel pair; Llama 3.1 stretches the long wavelengths."""
    base = theta ** (-2.0 * pair / head_dim)
    if scaling is None:
        return base
    wavelength = 2 * np.pi / base
    longest = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    shortest = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    if wavelength < shortest:
        return base
    if wavelength > longest:
        return base / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * base / scaling["factor"] + smooth * base


def attend_one(query_NH, keys_SKH, values_SKH, scale):
    """One token over contiguous keys. Textbook softmax, head by head."""
    num_heads, num_kv_heads = query_NH.shape[0], keys_SKH.shape[1]
    out_NH = np.zeros(query_NH.shape, np.float64)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        keys = keys_SKH[:, kv_head].astype(np.float64)
        logits_S = keys @ query_NH[head].astype(np.float64) * scale
        weights_S = np.exp(logits_S - logits_S.max())
        out_NH[head] = weights_S / weights_S.sum() @ values_SKH[:, kv_head].astype(np.float64)
    return out_NH


def hidden_states(tensors, config, tokens):
    """Final hidden states [T, D] of one sequence, from Hugging Face tensor names."""
    get = {name: array.astype(np.float64) for name, array in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]
    rows = [get["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config["num_hidden_layers"]):
        rows = _layer(get, f"model.layers.{layer}.", rows, config, heads, kv_heads, head_dim, eps)
    return np.stack([rms_norm(row, get["model.norm.weight"], eps) for row in rows])


def _layer(get, prefix, rows, config, heads, kv_heads, head_dim, eps):
    def linear(name, x):
        bias = get.get(f"{prefix}{name}.bias", 0.0)
        return get[f"{prefix}{name}.weight"] @ x + bias

    def head_norm(name, x):
        weight = get.get(f"{prefix}self_attn.{name}.weight")
        return x if weight is None else np.stack([rms_norm(row, weight, eps) for row in x])

    keys, values, out = [], [], []
    theta, scaling = config["rope_theta"], config.get("rope_scaling")
    for position, row in enumerate(rows):
        x = rms_norm(row, get[f"{prefix}input_layernorm.weight"], eps)
        query = head_norm("q_norm", linear("self_attn.q_proj", x).reshape(heads, head_dim))
        key = head_norm("k_norm", linear("self_attn.k_proj", x).reshape(kv_heads, head_dim))
        query = np.stack([rotate(head, position, theta, scaling) for head in query])
        keys.append(np.stack([rotate(head, position, theta, scaling) for head in key]))
        values.append(linear("self_attn.v_proj", x).reshape(kv_heads, head_dim))
        mixed = attend_one(query, np.stack(keys), np.stack(values), head_dim**-0.5)
        row = row + linear("self_attn.o_proj", mixed.reshape(-1))
        x = rms_norm(row, get[f"{prefix}post_attention_layernorm.weight"], eps)
        gate = linear("mlp.gate_proj", x)
        out.append(
            row + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", x))
        )
    return out


def logits(tensors, hidden_TD):
    """Base logits [T, V]; the embedding serves as head when there is no other."""
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return hidden_TD @ head.astype(np.float64).T
