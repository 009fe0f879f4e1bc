"""JAX inference: arrays, pages, batches. Knows no wire format and no learning.

Importing this package is light: only `engine.api` and `engine.errors`, which need NumPy alone.
"""

from engine.api import (
    NUM_CAPTURED_LOGITS,
    Capture,
    EngineStats,
    Final,
    FinishReason,
    Generator,
    HeadChoice,
    HeadRef,
    HeadTable,
    Job,
    SamplingParams,
    ScoreResult,
    Timing,
    Token,
    TokenLogprob,
    Update,
)
from engine.errors import (
    ConfigError,
    DuplicateJob,
    EngineError,
    EngineStopped,
    InvalidJob,
    OutOfPages,
    QueueFull,
    ShapeError,
    TokenizerError,
    WeightsError,
)

__all__ = [
    "NUM_CAPTURED_LOGITS",
    "Capture",
    "ConfigError",
    "DuplicateJob",
    "EngineError",
    "EngineStats",
    "EngineStopped",
    "Final",
    "FinishReason",
    "Generator",
    "HeadChoice",
    "HeadRef",
    "HeadTable",
    "InvalidJob",
    "Job",
    "OutOfPages",
    "QueueFull",
    "SamplingParams",
    "ScoreResult",
    "ShapeError",
    "Timing",
    "Token",
    "TokenLogprob",
    "TokenizerError",
    "Update",
    "WeightsError",
]
