"""The server itself: what it is, and ending a request."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.api import Generator
from sona.auth import Principal
from sona.inference import engine_id
from sona.ports import ServerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlService:
    """Implements `sona.ports.Control`."""

    info: ServerInfo
    generator: Generator
    running: Mapping[str, str]  # engine id to principal, kept by the inference service

    def server_info(self) -> ServerInfo:
        """Constant after start-up."""
        return self.info

    async def abort(self, request_id: str, principal: Principal) -> bool:
        """End a running or waiting request of the caller, or of its tenant for an operator."""
        name = engine_id(principal.tenant, request_id)
        owner = self.running.get(name)
        if owner is None or (owner != principal.name and not principal.has_role("operator")):
            return False
        return self.generator.abort(name)
