"""The flags of `sona serve`, as data: name, setting, type, help. Imports nothing heavy.

Names are those of vLLM where the meaning is the same.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Flag:
    """`--name` sets the setting at `path`."""

    name: str
    path: str
    kind: type
    help: str


FLAGS: tuple[Flag, ...] = (
    Flag("host", "server.host", str, "Address to listen on; other than loopback needs keys."),
    Flag("port", "server.port", int, "HTTP port; 0: any free one."),
    Flag("grpc-port", "server.grpc_port", int, "gRPC port; 0: any free one."),
    Flag("served-model-name", "server.served_model_name", str, "Name of the model for clients."),
    Flag("data-dir", "data.dir", Path, "Where requests, feedback and adapters are kept."),
    Flag("dtype", "engine.dtype", str, "auto, float32 or bfloat16, of weights and KV."),
    Flag("max-model-len", "engine.max_model_len", int, "Tokens of prompt plus answer."),
    Flag("max-num-seqs", "engine.max_num_seqs", int, "Requests decoded together."),
    Flag("max-num-batched-tokens", "engine.max_num_batched_tokens", int, "Computed in one turn."),
    Flag("num-pages", "engine.num_pages", int, "KV pages; 0: derived from memory."),
    Flag("max-loras", "engine.max_loras", int, "LoRA versions on the device; 0: none."),
    Flag("max-lora-rank", "engine.max_lora_rank", int, "Largest rank of a LoRA, at most 64."),
    Flag("max-learned-slots", "engine.max_learned_slots", int, "Learned versions on the device."),
)
