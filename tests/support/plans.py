"""Small engine plans."""

from dataclasses import replace

from engine.config import EngineConfig, EnginePlan, plan_engine
from engine.model import ModelConfig

_MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=64, hidden_size=8, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=4, mlp_size=16, max_len=256, rms_eps=1e-6, rope_theta=1e4,
    rope_scaling=None, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False,
    tied_embeddings=True, eos_ids=(1,),
)  # fmt: skip


def plan_of(model: ModelConfig, **settings) -> EnginePlan:
    """The plan of these settings for a model, on a CPU."""
    return plan_engine(EngineConfig(**settings), model, platform="cpu")


def small_plan(**changes) -> EnginePlan:
    """Eight sequences of 256 tokens, without a model; any field of the plan may be set."""
    return replace(plan_of(_MODEL, max_num_seqs=8, prefill_chunk=64), **changes)
