"""Keys to principals, roles, and which binds are refused."""

import hashlib

import pytest

from engine.errors import ConfigError
from sona import auth
from sona.auth import AuthConfig, Authenticator, KeyConfig, Principal
from sona.errors import PermissionDenied, Unauthenticated


def key(text: str, **fields) -> KeyConfig:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return KeyConfig(**{"tenant": "acme", "principal": "ann", "sha256": digest, **fields})


def test_a_key_names_its_principal():
    known = Authenticator([key("one"), key("two", principal="olga", role="operator")])
    assert known.identify("Bearer one") == Principal("acme", "ann", "user")
    assert known.identify("bearer  two ") == Principal("acme", "olga", "operator")


@pytest.mark.parametrize(
    "authorization", [None, "", "one", "Basic one", "Bearer", "Bearer ", "Bearer three"]
)
def test_anything_else_is_refused(authorization):
    with pytest.raises(Unauthenticated, match=r"Bearer KEY|key is not known"):
        Authenticator([key("one")]).identify(authorization)


def test_without_keys_everyone_is_the_default_admin():
    assert Authenticator([]).identify(None) == Principal("default", "default", "admin")


def test_roles_rise():
    user, operator, admin = (Principal("t", "n", role) for role in ("user", "operator", "admin"))
    operator.require("user", "x")
    admin.require("operator", "x")
    with pytest.raises(PermissionDenied, match="PauseLearning needs the role operator"):
        user.require("operator", "PauseLearning")


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"sha256": "abc"}, "64 hexadecimal"),
        ({"sha256": "g" * 64}, "64 hexadecimal"),
        ({"tenant": " "}, "auth.key.tenant is empty"),
        ({"principal": ""}, "auth.key.principal is empty"),
        ({"role": "root"}, "use one of user, operator, admin"),
    ],
)
def test_a_bad_entry_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        key("one", **fields)


def test_two_entries_cannot_share_a_key():
    with pytest.raises(ConfigError, match="same sha256"):
        AuthConfig(key=(key("one"), key("one", principal="bob")))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host):
    auth.check_bind(host, AuthConfig())
    assert auth.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_bind_needs_a_key(host):
    auth.check_bind(host, AuthConfig(key=(key("one"),)))
    with pytest.raises(ConfigError, match=r"add an \[\[auth.key\]\] entry"):
        auth.check_bind(host, AuthConfig())


def test_nobody_is_identified_by_default():
    with pytest.raises(Unauthenticated):
        auth.current_principal()
