"""SONA: a language-model server that learns from its own traffic. Users import what is here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sona.client import AsyncClient, Client, explain

__all__ = ["AsyncClient", "Client", "explain"]


def __getattr__(name: str) -> Any:
    """Loads gRPC only for who uses a client."""
    if name not in __all__:
        raise AttributeError(f"module 'sona' has no attribute {name!r}")
    import sona.client

    return getattr(sona.client, name)
