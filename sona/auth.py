"""Who is calling: keys, principals, roles. The identity comes from the key, never from a field.

Roles rise. A *user* acts on its own requests, feedback and principal-scope adapters. An
*operator* runs the installation: it also pauses learning (for the whole server), and within its
tenant ends anyone's request and reads or rolls back anyone's adapters. An *admin* may do all that
an operator may; what changes keys and tenants will ask for it.
"""

import contextvars
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ConfigError
from sona.errors import PermissionDenied, Unauthenticated

Role = Literal["user", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)  # rising


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: its name in a tenant, and what it may do."""

    tenant: str
    name: str
    role: Role

    def has_role(self, role: Role) -> bool:
        """Whether it may do what `role` may."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def require(self, role: Role, action: str) -> None:
        """Raises PermissionDenied, naming the action, when the role is lower."""
        if not self.has_role(role):
            raise PermissionDenied(
                f"{action} needs the role {role}; the key of {self.name} has the role {self.role}: "
                f'use a key whose [[auth.key]] entry says role = "{role}"'
            )


LOCAL = Principal(tenant="default", name="default", role="admin")  # without keys, on loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfig:
    """One `[[auth.key]]` entry. The key itself is never stored, only its hash."""

    tenant: str
    principal: str
    role: Role = "user"
    sha256: str  # of the key's UTF-8 bytes, 64 hexadecimal digits

    def __post_init__(self) -> None:
        for name in ("tenant", "principal"):
            if not getattr(self, name).strip():
                raise ConfigError(f"auth.key.{name} is empty; give every key a {name}")
        if self.role not in ROLES:
            raise ConfigError(f"auth.key.role is {self.role!r}; use one of {', '.join(ROLES)}")
        try:
            digest = bytes.fromhex(self.sha256)
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ConfigError(
                f"auth.key.sha256 of {self.principal} is {self.sha256!r}; it must be 64 "
                "hexadecimal digits: printf %s KEY | sha256sum"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may call. Without keys: everyone on this machine, as one principal."""

    key: tuple[KeyConfig, ...] = ()  # [[auth.key]] entries

    def __post_init__(self) -> None:
        digests = [key.sha256.lower() for key in self.key]
        if len(set(digests)) < len(digests):
            raise ConfigError("auth.key: two entries have the same sha256; give each its own key")


def hash_key(key: str) -> str:
    """What `[[auth.key]]` stores for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether a bind address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name that may resolve to anything


def check_bind(host: str, config: AuthConfig) -> None:
    """Raises ConfigError for an open server: a non-loopback bind without keys."""
    if not config.key and not is_loopback(host):
        raise ConfigError(
            f"server.host is {host!r} and there are no keys, so anyone could teach the model; add "
            "an [[auth.key]] entry (or --api-key), or bind 127.0.0.1"
        )


class Authenticator:
    """Turns an `authorization` value into a principal."""

    def __init__(self, keys: Sequence[KeyConfig]) -> None:
        self._keys = tuple(
            (bytes.fromhex(key.sha256), Principal(key.tenant, key.principal, key.role))
            for key in keys
        )

    def identify(self, authorization: str | None) -> Principal:
        """The caller behind a Bearer credential. Raises Unauthenticated."""
        if not self._keys:
            return LOCAL
        if not authorization:
            raise Unauthenticated(
                "no key was sent; send the metadata or header `authorization: Bearer KEY`"
            )
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("the authorization value must be `Bearer KEY`")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for known, principal in self._keys:  # never ends early: time tells nothing
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise Unauthenticated(
                "the key is not known; check it against the [[auth.key]] entries of the server"
            )
        return found


_current: contextvars.ContextVar[Principal] = contextvars.ContextVar("sona_principal")


def current_principal() -> Principal:
    """The caller of the running method. Raises Unauthenticated where nobody was identified."""
    try:
        return _current.get()
    except LookupError:
        raise Unauthenticated("this call was not identified") from None


def set_principal(principal: Principal) -> contextvars.Token[Principal]:
    """Name the caller for the rest of this task. For the borders: gRPC, HTTP, MQTT."""
    return _current.set(principal)
