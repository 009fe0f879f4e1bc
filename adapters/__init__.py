"""Mathematics of adaptation and the versions it makes: head edits, gates, store.

Pure where it computes: (state, batch) -> (state, report). Imports the engine's public names only.
"""

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
