"""What `sona doctor` finds, and what it says to do."""

import json
import socket

import pytest
from click.testing import CliRunner

from engine.errors import ConfigError
from sona.cli import findings, main
from sona.config import DataConfig, ServerConfig, SonaConfig
from sona.datadir import DataDir


def only(found):
    (finding,) = found
    return finding


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_this_machine_blocks_nothing():
    found = [*findings.machine(), *findings.names(), *findings.libraries(), *findings.devices()]
    assert {finding.topic for finding in found} == {
        "python", "cpu", "memory", "names", "sqlite", "grpc", "jax", "kernels",
    }  # fmt: skip
    assert [finding for finding in found if finding.level == "blocks"] == []


def test_a_package_of_another_distribution_is_named(monkeypatch):
    monkeypatch.setattr(
        findings.importlib.metadata,
        "packages_distributions",
        lambda: {"adapters": ["sona", "adapters"], "engine": ["sona"]},
    )
    finding = only(findings.names())
    assert finding.level == "blocks"
    assert "the package adapters" in finding.text
    assert "pip uninstall adapters" in finding.advice


def test_a_package_that_lies_elsewhere_is_named(monkeypatch):
    monkeypatch.setattr(findings, "_home", lambda name: "/b" if name == "engine" else "/a")
    finding = only(findings.names())
    assert (finding.level, finding.text) == ("blocks", "the package engine lies in /b")


def test_a_taken_port_is_named_with_its_flag(taken_port):
    config = SonaConfig(server=ServerConfig(port=0, grpc_port=taken_port))
    finding = only(findings.ports(config))
    assert finding.level == "blocks"
    assert str(taken_port) in finding.text
    assert "--grpc-port" in finding.advice


def test_a_data_directory_in_use_blocks(tmp_path):
    config = SonaConfig(data=DataConfig(dir=tmp_path))
    with DataDir(tmp_path):
        assert only(findings.data_dir(config)).level == "blocks"
    assert only(findings.data_dir(config)).level == "ok"


def test_a_data_directory_that_is_missing_is_not_made(tmp_path):
    path = tmp_path / "a" / "b"
    assert only(findings.data_dir(SonaConfig(data=DataConfig(dir=path)))).level == "ok"
    assert not path.exists()
    (tmp_path / "file").touch()
    below = SonaConfig(data=DataConfig(dir=tmp_path / "file" / "x"))
    assert only(findings.data_dir(below)).level == "blocks"


def test_a_missing_checkpoint_blocks(tmp_path):
    finding = only(findings.model(SonaConfig(model=str(tmp_path))))
    assert finding.level == "blocks"
    assert str(tmp_path) in finding.text


@pytest.mark.parametrize("level,status", [("note", 0), ("blocks", 1)])
def test_the_exit_status_says_whether_something_blocks(monkeypatch, level, status):
    finding = findings.Finding(level=level, topic="t", text="x", advice="do y")
    monkeypatch.setattr("sona.cli.doctor.examine", lambda source: iter([finding]))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == status
    assert "-> do y" in result.output
    as_json = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(as_json.output)["level"] == level


def test_a_wrong_configuration_is_a_finding(monkeypatch):
    def load(source):
        raise ConfigError("unknown setting prot; did you mean port?")

    monkeypatch.setattr("sona.config.load", load)
    monkeypatch.setattr(findings, "devices", lambda: iter(()))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "did you mean port?" in result.output
