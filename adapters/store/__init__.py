"""adapters.db: what was learned, version by version."""

from adapters.store.records import (
    LoadFailure,
    Scope,
    SlotKey,
    Version,
    VersionDraft,
    VersionInfo,
    VersionKind,
    empty_table,
)
from adapters.store.store import AdapterStore

__all__ = [
    "AdapterStore",
    "LoadFailure",
    "Scope",
    "SlotKey",
    "Version",
    "VersionDraft",
    "VersionInfo",
    "VersionKind",
    "empty_table",
]
