"""What the store takes and gives back: frozen data, no SQL."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from adapters.errors import AdapterError, CandidateRejected
from adapters.gate import Gate
from engine import HeadRef, HeadTable

Scope = Literal["principal", "tenant"]
VersionKind = Literal["edit", "rollback", "truncate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotKey:
    """Whose head edits for which pattern. `owner` is the principal, "" at tenant scope."""

    tenant: str
    scope: Scope
    owner: str
    pattern_id: int

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope) or (self.scope == "principal") != bool(self.owner):
            raise AdapterError(
                f"scope {self.scope!r} with owner {self.owner!r}; use scope 'principal' with the "
                "principal's name, or scope 'tenant' with owner ''"
            )

    @property
    def adapter_name(self) -> str:
        """The name on the wire and in reports."""
        return f"pattern-{self.pattern_id}"

    def as_tuple(self) -> tuple[str, str, str, str]:
        """The identity that `HeadRef.slot_key` carries."""
        return (self.tenant, self.scope, self.owner, str(self.pattern_id))

    def __str__(self) -> str:
        owner = f", principal {self.owner!r}" if self.owner else ""
        return f"{self.adapter_name} (tenant {self.tenant!r}{owner})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VersionDraft:
    """A version about to be stored. The store numbers it."""

    kind: VersionKind
    parent: int  # the live version it was made from, 0 for the first
    restores: int | None = None  # of a rollback: the version whose content it has
    created: float  # unix seconds
    base_hash: str
    feedback_seqs: tuple[int, ...]  # journal numbers that live in it
    table: HeadTable
    gate: Gate | None  # None: fires on nothing
    solver_state: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    is_gated: bool = False  # promoted through a gate: its arrays are kept for good
    report: Mapping[str, Any] = field(default_factory=dict[str, Any])  # figures, as JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """A version's row: everything but its arrays."""

    slot: SlotKey
    number: int  # 1, 2, 3, ... per slot; 0 means before anything was learned
    parent: int
    restores: int | None
    kind: VersionKind
    created: float  # unix seconds
    base_hash: str
    feedback_seqs: tuple[int, ...]
    is_gated: bool
    report: Mapping[str, Any]
    has_arrays: bool  # False once compacted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Version:
    """A version with what serving needs of it. Immutable; the arrays are read-only."""

    info: VersionInfo
    table: HeadTable
    gate: Gate | None

    @property
    def slot(self) -> SlotKey:
        return self.info.slot

    @property
    def number(self) -> int:
        return self.info.number

    def head_ref(self) -> HeadRef:
        """The version as a job's head."""
        key = self.info.slot
        return HeadRef(key.adapter_name, self.info.number, key.as_tuple(), self.table)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailure:
    """A live version that cannot be served, and why."""

    slot: SlotKey
    number: int
    error: AdapterError


def empty_table(dim: int) -> HeadTable:
    """The table of version 0: no edits."""
    return HeadTable(
        keys=np.zeros((0, dim), np.float32),
        token_ids=np.zeros(0, np.int32),
        token_keys=np.zeros((0, 0), np.float32),
        const_keys=np.zeros(0, np.float32),
        row_ids=np.zeros(0, np.int32),
        values=np.zeros((0, 0), np.float32),
    )


def check_draft(draft: VersionDraft) -> None:
    """Raise CandidateRejected unless shapes and types agree and every number is finite."""
    _check_table(draft.table)
    if draft.gate is not None:
        dim = draft.table.keys.shape[1]
        _check_floats("gate centroid", draft.gate.centroid, (dim,))
        _check_floats("gate vectors", draft.gate.vectors, (len(draft.gate.vectors), dim))
        if not math.isfinite(draft.gate.threshold):
            raise CandidateRejected(
                f"gate threshold is {draft.gate.threshold}; use a cosine, or no gate at all"
            )
    try:
        json.dumps(draft.report, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CandidateRejected(
            f"the report is not JSON ({error}); leave out figures that do not exist"
        ) from error


def _check_table(table: HeadTable) -> None:
    if table.keys.ndim != 2:
        raise CandidateRejected(f"keys has shape {table.keys.shape}; use (rank, model dimension)")
    rank, dim = table.keys.shape
    _check_floats("keys", table.keys, (rank, dim))
    _check_floats("const_keys", table.const_keys, (rank,))
    for name, ids in (("token_ids", table.token_ids), ("row_ids", table.row_ids)):
        if ids.ndim != 1 or ids.dtype != np.int32 or len(np.unique(ids)) < len(ids):
            raise CandidateRejected(
                f"{name} is {ids.dtype} {ids.shape}; use one row of distinct int32"
            )
    _check_floats("token_keys", table.token_keys, (rank, len(table.token_ids)))
    _check_floats("values", table.values, (rank, len(table.row_ids)))


def _check_floats(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise CandidateRejected(
            f"{name} is {array.dtype} {array.shape}; the other arrays call for float32 {shape}"
        )
    if not np.isfinite(array).all():
        raise CandidateRejected(f"{name} holds NaN or infinity; solve it again from the journal")
