"""What the operator may set about the engine, and the sizes derived from it at start-up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from engine.errors import ConfigError

if TYPE_CHECKING:  # the scheduler reads plans and must not load jax
    from engine.model.config import ModelConfig

_DTYPES = ("auto", "float32", "bfloat16")
_PAGE_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Engine settings, as written in a config file. `plan_engine` turns them into sizes."""

    dtype: str = "auto"  # of weights and KV; "auto": float32 on CPU, bfloat16 elsewhere
    max_model_len: int = 0  # tokens of prompt plus answer; 0: what the model was trained for
    max_num_seqs: int = 16  # sequences decoded together
    max_waiting: int = 1024  # jobs queued behind them
    page_size: int = 16  # tokens per KV page
    num_pages: int = 0  # KV pages; 0: as many as max_num_seqs full contexts need, within memory
    kv_memory_fraction: float = 0.5  # of the memory free at start-up that derived pages may take
    prefill_chunk: int = 256  # tokens of a prompt computed between two decode steps
    deterministic: bool = False  # one decode bucket, one prefill shape: outputs equal to the bit
    max_learned_slots: int = 256  # head-edit versions resident on the device
    head_rank: int = 32  # ranks of a head slot
    head_rows: int = 2048  # vocabulary rows of a head slot
    learning_fraction: float = 0.15  # of engine time for learning passes while users wait

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"engine.dtype is {self.dtype!r}; use one of {', '.join(_DTYPES)}")
        if self.page_size not in _PAGE_SIZES:
            raise ConfigError(f"engine.page_size is {self.page_size}; use one of {_PAGE_SIZES}")
        for name, low in (
            ("max_model_len", 0),
            ("max_num_seqs", 1),
            ("max_waiting", 1),
            ("num_pages", 0),
            ("prefill_chunk", 16),
            ("max_learned_slots", 2),
            ("head_rank", 1),
            ("head_rows", 64),
        ):
            value = getattr(self, name)
            if value < low:
                raise ConfigError(f"engine.{name} is {value}; must be >= {low}")
        for name in ("kv_memory_fraction", "learning_fraction"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ConfigError(f"engine.{name} is {value}; must lie in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """Derived sizes. Built once at start-up, never edited."""

    dtype: str
    max_len: int  # tokens of prompt plus answer
    max_num_seqs: int
    max_waiting: int
    page_size: int  # C
    num_pages: int  # P
    pages_per_seq: int  # M
    page_bytes: int  # of one page over all layers, keys and values
    decode_buckets: tuple[int, ...]  # rows, rising
    prefill_buckets: tuple[int, ...]  # tokens, rising; the last is the chunk
    score_chunk: int  # tokens of one slice of a teacher-forced pass
    is_deterministic: bool
    num_head_slots: int  # A, slot 0 is "no edit"
    head_rank: int  # R
    head_rows: int  # J
    head_tokens: int  # E
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
    chunk = max(16, min(config.prefill_chunk, max_len))
    deterministic = config.deterministic
    return EnginePlan(
        dtype=dtype,
        max_len=max_len,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        page_size=config.page_size,
        num_pages=_num_pages(config, pages_per_seq, page_bytes),
        pages_per_seq=pages_per_seq,
        page_bytes=page_bytes,
        decode_buckets=_buckets(1, config.max_num_seqs, 2, only_last=deterministic),
        prefill_buckets=_buckets(16, chunk, 4, only_last=deterministic),
        score_chunk=16,
        is_deterministic=deterministic,
        num_head_slots=config.max_learned_slots,
        head_rank=config.head_rank,
        head_rows=min(config.head_rows, model.vocab_size),
        head_tokens=64,
        learning_fraction=config.learning_fraction,
    )


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
