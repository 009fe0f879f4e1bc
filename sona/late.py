"""Collaborators that exist before they are ready, so that ports can be bound first."""

from typing import Any

from sona.errors import NotReady


class Late:
    """Stands in for an object until `become`; every use before that raises NotReady."""

    def __init__(self) -> None:
        self._real: Any = None

    def become(self, real: object) -> None:
        """From now on, be `real`."""
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            raise NotReady("the server is still loading the model; retry in a few seconds")
        return getattr(self._real, name)
