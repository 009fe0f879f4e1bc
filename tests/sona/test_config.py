"""Where a setting comes from, and every way in which it can be wrong."""

import re
from pathlib import Path

import pytest

from engine.errors import ConfigError
from sona import config, settings
from sona.config import SonaConfig
from sona.flags import FLAGS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def load(tmp_path, text="", *, flags=None, environ=None):
    path = tmp_path / "sona.toml"
    path.write_text(text, "utf-8")
    return config.load(path, flags=flags, environ=environ or {})


def test_nothing_set_is_all_defaults():
    loaded = config.load(environ={"HOME": "/root", "SONA_ADDRESS": "a:1", "SONA_API_KEY": "k"})
    assert loaded.config == SonaConfig()
    assert loaded.origins == {}


def test_flag_beats_environment_beats_file_beats_default(tmp_path):
    text = "[server]\nport = 1\ngrpc_port = 2\ndrain_s = 3\n"
    environ = {"SONA_SERVER_PORT": "11", "SONA_SERVER_GRPC_PORT": "12"}
    loaded = load(tmp_path, text, flags={"server.port": 111}, environ=environ)
    server = loaded.config.server
    assert (server.port, server.grpc_port, server.drain_s) == (111, 12, 3.0)
    assert server.host == "127.0.0.1"
    assert loaded.origins == {
        "server.port": "flag",
        "server.grpc_port": "environment SONA_SERVER_GRPC_PORT",
        "server.drain_s": f"file {tmp_path / 'sona.toml'}",
    }


def test_keys_of_file_and_flag_are_joined(tmp_path):
    entry = '[[auth.key]]\ntenant = "t"\nprincipal = "p"\nsha256 = "{}"\n'
    flag = {"tenant": "default", "principal": "default", "role": "admin", "sha256": "b" * 64}
    loaded = load(tmp_path, entry.format("a" * 64), flags={"auth.key": [flag]})
    found = [(key.tenant, key.role, key.sha256[0]) for key in loaded.config.auth.key]
    assert found == [("t", "user", "a"), ("default", "admin", "b")]


@pytest.mark.parametrize(
    "text,message",
    [
        ("modell = 'x'", "unknown setting modell; did you mean model?"),
        ("[server]\nprot = 1", "unknown setting server.prot; did you mean port?"),
        ("[zzz]\na = 1", "unknown setting zzz; known: model, server"),
        ("[server]\nport = '80'", "server.port is '80'; use a whole number"),
        ("[server]\nport = true", "server.port is True; use a whole number"),
        ("[server]\nport = 1.5", "server.port is 1.5; use a whole number"),
        ("[server]\nport = 70000", "server.port is 70000; use 0 to 65535"),
        ("server = 3", "server is 3; it is a section"),
        ("[server]\nport = 9\ngrpc_port = 9", "both 9"),
        ("[server]\nhost = '0.0.0.0'", "anyone could teach the model"),
        ("[engine]\npage_size = 7", "engine.page_size is 7"),
        ("[learning]\nenabled = 1", "learning.enabled is 1; use true or false"),
        ("[data]\nretention_s = 0", "data.retention_s is 0.0"),
        ("[data]\nretention_s = nan", "data.retention_s is nan"),
        ("[auth]\nkey = 'abc'", "auth.key is 'abc'; write it as [[auth.key]] tables"),
        ("[[auth.key]]\ntenant='t'\nprincipal='p'\nsha256='x'\nrole='boss'", "use one of 'user'"),
        ("[[auth.key]]\ntenant='t'\nprincipal='p'", "auth.key needs sha256"),
        ("[server", "as TOML"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_allowed(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("SONA_SERVER_PROT", "1", "did you mean SONA_SERVER_PORT?"),
        ("SONA_SERVER_PORT", "eighty", "SONA_SERVER_PORT is 'eighty'; use a whole number"),
        ("SONA_LEARNING_ENABLED", "maybe", "use true or false"),
        ("SONA_ENGINE_KV_MEMORY_FRACTION", "x", "use a number"),
    ],
)
def test_a_wrong_environment_is_named(name, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load(environ={name: value})


def test_the_environment_is_read_by_type():
    environ = {
        "SONA_MODEL": "models/x",
        "SONA_LEARNING_ENABLED": "No",
        "SONA_DATA_DIR": "/data",
        "SONA_ENGINE_KV_MEMORY_FRACTION": "0.25",
    }
    found = config.load(environ=environ).config
    assert (found.model, found.learning.enabled) == ("models/x", False)
    assert (found.data.dir, found.engine.kv_memory_fraction) == (Path("/data"), 0.25)


def test_service_links_of_kubernetes_are_left_alone():
    environ = {
        "SONA_PORT": "tcp://10.0.0.1:8000",
        "SONA_SERVICE_HOST": "10.0.0.1",
        "SONA_PORT_8000_TCP_ADDR": "10.0.0.1",
        "SONA_GRPC_SERVICE_PORT": "50051",
    }
    assert config.load(environ=environ).config == SonaConfig()


def test_presets_load_but_for_the_one_that_needs_keys():
    shipped = config.presets()
    assert set(shipped) >= {"small-cpu", "deterministic", "team"}
    for name in set(shipped) - {"team"}:
        assert config.load(name, environ={}).origins
    with pytest.raises(ConfigError, match="there are no keys"):
        config.load("team", environ={})


def test_a_file_that_is_not_there_names_the_presets(tmp_path):
    with pytest.raises(ConfigError, match="small-cpu"):
        config.load(tmp_path / "nothing.toml", environ={})


def test_every_flag_sets_a_setting_of_its_type():
    hints = dict(settings.leaves(SonaConfig))
    for flag in FLAGS:
        assert hints[flag.path] is flag.kind, flag.name


def test_every_setting_is_documented_with_its_default():
    text = DOCS.read_text("utf-8")
    for path, value in settings.values(SonaConfig()):
        if path == "auth.key":
            assert "[[auth.key]]" in text
            continue
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert f"| `{path}` | `{shown}` |" in text, f"docs/config.md: {path} = {shown}"
