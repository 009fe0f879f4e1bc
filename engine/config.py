"""What the operator may set about the engine, and the sizes derived from it at start-up."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from engine.errors import ConfigError

if TYPE_CHECKING:  # the scheduler reads plans and must not load jax
    from engine.model.config import ModelConfig

_DTYPES = ("auto", "float32", "bfloat16")
_PAGE_SIZES = (8, 16, 32, 64)
MAX_LORA_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Engine settings, as written in a config file. `plan_engine` turns them into sizes."""

    dtype: str = "auto"  # of weights and KV; "auto": float32 on CPU, bfloat16 elsewhere
    max_model_len: int = 0  # tokens of prompt plus answer; 0: what the model was trained for
    max_num_seqs: int = 16  # sequences decoded together
    max_waiting: int = 1024  # jobs queued behind them
    max_waiting_tokens: int = 1_048_576  # of their prompts
    max_num_batched_tokens: int = 0  # computed in one turn; 0: a full chunk beside all sequences
    priority_patience_s: float = 10.0  # then a job's age may overrule its tenant's priorities
    page_size: int = 16  # tokens per KV page
    num_pages: int = 0  # KV pages; 0: as many as max_num_seqs full contexts need, within memory
    kv_memory_fraction: float = 0.5  # of the memory free at start-up that derived pages may take
    prefill_chunk: int = 256  # tokens of a prompt computed between two decode steps
    deterministic: bool = False  # one decode bucket, one prefill shape: outputs equal to the bit
    enable_prefix_caching: bool = True  # do not compute again what a prompt shares with another
    session_fraction: float = 0.25  # of the pages that sessions may keep warm
    session_idle_s: float = 600.0  # that a session stays warm after its last turn
    max_loras: int = 0  # LoRA versions resident on the device; 0 compiles nothing for them
    max_lora_rank: int = 16  # of one LoRA, or of several merged; at most 64
    lora_on_head: bool = False  # LoRAs may adapt lm_head too, at a vocabulary's cost per slot
    max_learned_slots: int = 256  # head-edit versions resident on the device
    head_rank: int = 32  # ranks of a head slot
    head_rows: int = 2048  # vocabulary rows of a head slot
    learning_fraction: float = 0.15  # of engine time for learning passes while users wait

    def __post_init__(self) -> None:
        for name, is_allowed, allowed in (*self._choices(), *self._ranges()):
            if not is_allowed:
                value = getattr(self, name)
                raise ConfigError(f"engine.{name} is {value!r}; must be {allowed}")

    def _choices(self) -> tuple[tuple[str, bool, str], ...]:
        fits = not self.prefill_chunk % self.page_size
        sizes = f"one of {', '.join(map(str, _PAGE_SIZES))}"
        return (
            ("dtype", self.dtype in _DTYPES, f"one of {', '.join(_DTYPES)}"),
            ("page_size", self.page_size in _PAGE_SIZES, sizes),
            ("prefill_chunk", fits, f"a multiple of engine.page_size, {self.page_size}"),
        )

    def _ranges(self) -> Iterator[tuple[str, bool, str]]:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            within = f"in [{low}, {high}]" if math.isfinite(high) else f">= {low}"
            yield name, math.isfinite(value) and low <= value <= high, within
        for name in ("kv_memory_fraction", "learning_fraction"):
            yield name, 0.0 < getattr(self, name) <= 1.0, "in (0, 1]"


_RANGES = (
    ("max_model_len", 0, math.inf),
    ("max_num_seqs", 1, math.inf),
    ("max_waiting", 1, math.inf),
    ("max_waiting_tokens", 1, math.inf),
    ("max_num_batched_tokens", 0, math.inf),
    ("priority_patience_s", 0, math.inf),
    ("num_pages", 0, math.inf),
    ("prefill_chunk", 16, math.inf),
    ("session_fraction", 0, 1),
    ("session_idle_s", 0, math.inf),
    ("max_loras", 0, math.inf),
    ("max_lora_rank", 1, MAX_LORA_RANK),
    ("max_learned_slots", 2, math.inf),
    ("head_rank", 1, math.inf),
    ("head_rows", 64, math.inf),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """Derived sizes. Built once at start-up, never edited."""

    dtype: str
    max_len: int  # tokens of prompt plus answer
    max_num_seqs: int
    max_waiting: int
    max_waiting_tokens: int
    priority_patience_s: float
    step_tokens: int  # computed in one turn
    page_size: int  # C
    num_pages: int  # P
    pages_per_seq: int  # M
    page_bytes: int  # of one page over all layers, keys and values
    caches_prefixes: bool
    session_pages: int  # that sessions may keep warm
    session_idle_s: float
    decode_buckets: tuple[int, ...]  # rows, rising
    prefill_buckets: tuple[int, ...]  # tokens, rising; the last is the chunk
    prefill_chunk: int
    slice_tokens: int  # of a teacher-forced pass, or of given tokens to be scored, in one turn
    is_deterministic: bool
    splits_step: bool  # forward, then sample: for an accelerator, beside which the host has time
    num_head_slots: int  # A, slot 0 is "no edit"
    head_rank: int  # R
    head_rows: int  # J
    head_tokens: int  # E
    num_lora_slots: int  # slot 0 is "no LoRA"; 1 when none are built
    lora_rank: int
    lora_on_head: bool
    learning_fraction: float


def plan_engine(config: EngineConfig, model: "ModelConfig", *, platform: str) -> EnginePlan:
    """Turn settings into sizes, given the memory that is free now.

    Raises:
      ConfigError: the pool cannot hold one full context, or a setting exceeds the model.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    max_len = config.max_model_len or model.max_len
    if max_len > model.max_len:
        raise ConfigError(
            f"engine.max_model_len is {max_len}; the model was trained for {model.max_len} tokens"
        )
    pages_per_seq = -(-max_len // config.page_size)
    values = 2 * model.num_layers * config.page_size * model.num_kv_heads * model.head_dim
    page_bytes = values * (4 if dtype == "float32" else 2)
    chunk = min(config.prefill_chunk, pages_per_seq * config.page_size)
    deterministic = config.deterministic
    num_pages = _num_pages(config, pages_per_seq, page_bytes)
    return EnginePlan(
        dtype=dtype,
        max_len=max_len,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        priority_patience_s=config.priority_patience_s,
        step_tokens=_step_tokens(config, chunk),
        page_size=config.page_size,
        num_pages=num_pages,
        pages_per_seq=pages_per_seq,
        page_bytes=page_bytes,
        caches_prefixes=config.enable_prefix_caching,
        session_pages=int(num_pages * config.session_fraction),
        session_idle_s=config.session_idle_s,
        decode_buckets=_buckets(1, config.max_num_seqs, 2, only_last=deterministic),
        prefill_buckets=_buckets(16, chunk, 4, only_last=deterministic),
        prefill_chunk=chunk,
        slice_tokens=16,
        is_deterministic=deterministic,
        splits_step=platform != "cpu",
        num_head_slots=config.max_learned_slots,
        head_rank=config.head_rank,
        head_rows=min(config.head_rows, model.vocab_size),
        head_tokens=64,
        num_lora_slots=1 + config.max_loras,
        lora_rank=config.max_lora_rank,
        lora_on_head=config.lora_on_head,
        learning_fraction=config.learning_fraction,
    )


def _step_tokens(config: EngineConfig, chunk: int) -> int:
    least = chunk + config.max_num_seqs
    wanted = config.max_num_batched_tokens or least
    if wanted < least:
        raise ConfigError(
            f"engine.max_num_batched_tokens is {wanted}; a prompt's chunk of {chunk} tokens beside "
            f"{config.max_num_seqs} sequences needs {least}: raise it, or lower "
            "engine.prefill_chunk or engine.max_num_seqs"
        )
    return wanted


def _buckets(low: int, high: int, factor: int, *, only_last: bool) -> tuple[int, ...]:
    """Sizes up to `high`; a larger factor means fewer programs to compile and more padding."""
    sizes = []
    while low < high and not only_last:
        sizes.append(low)
        low *= factor
    return (*sizes, high)


def _num_pages(config: EngineConfig, pages_per_seq: int, page_bytes: int) -> int:
    wanted = config.num_pages or config.max_num_seqs * pages_per_seq
    if not config.num_pages:
        free_bytes = psutil.virtual_memory().available
        wanted = min(wanted, int(free_bytes * config.kv_memory_fraction) // page_bytes)
    if wanted < pages_per_seq:
        raise ConfigError(
            f"{wanted} KV pages of {page_bytes} bytes cannot hold one context of "
            f"{pages_per_seq * config.page_size} tokens ({pages_per_seq} pages); raise "
            "engine.num_pages, lower engine.max_model_len, or free memory"
        )
    return wanted
