"""Mathematics of adaptation and the versions it makes: head edits, gates, store.

Pure where it computes: (state, batch) -> (state, report). Imports the engine's public names only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.align import Alignment, align
    from adapters.batch import Batch
    from adapters.errors import (
        AdapterError,
        AdapterNotFound,
        CandidateRejected,
        IncompatibleAdapter,
        SnapshotCorrupt,
        StaleCandidate,
        StoreUnwritable,
    )
    from adapters.gate import Gate, GateIndex, GenericStats, route
    from adapters.head import SolveReport, add, learn, remove, replay, settle
    from adapters.head_config import HeadConfig
    from adapters.metric import KeyMetric
    from adapters.served import Disturbance, apply_table, disturbance, served_logprobs
    from adapters.solve import compile_buckets, num_compiled
    from adapters.state import HeadState
    from adapters.table import TableLimits, TableReport, export

_HOMES = {
    "adapters.align": ("Alignment", "align"),
    "adapters.batch": ("Batch",),
    "adapters.errors": (
        "AdapterError",
        "AdapterNotFound",
        "CandidateRejected",
        "IncompatibleAdapter",
        "SnapshotCorrupt",
        "StaleCandidate",
        "StoreUnwritable",
    ),
    "adapters.gate": ("Gate", "GateIndex", "GenericStats", "route"),
    "adapters.head": ("SolveReport", "add", "learn", "remove", "replay", "settle"),
    "adapters.head_config": ("HeadConfig",),
    "adapters.metric": ("KeyMetric",),
    "adapters.served": ("Disturbance", "apply_table", "disturbance", "served_logprobs"),
    "adapters.solve": ("compile_buckets", "num_compiled"),
    "adapters.state": ("HeadState",),
    "adapters.table": ("TableLimits", "TableReport", "export"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "AdapterNotFound",
    "Alignment",
    "Batch",
    "CandidateRejected",
    "Disturbance",
    "Gate",
    "GateIndex",
    "GenericStats",
    "HeadConfig",
    "HeadState",
    "IncompatibleAdapter",
    "KeyMetric",
    "SnapshotCorrupt",
    "SolveReport",
    "StaleCandidate",
    "StoreUnwritable",
    "TableLimits",
    "TableReport",
    "add",
    "align",
    "apply_table",
    "compile_buckets",
    "disturbance",
    "export",
    "learn",
    "num_compiled",
    "remove",
    "replay",
    "route",
    "served_logprobs",
    "settle",
]


def __getattr__(name: str) -> Any:
    """Load a name's module on first use: the store is read without JAX."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
