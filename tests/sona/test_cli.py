"""The commands: what they import, send, print, and how they end."""

import asyncio
import json
import subprocess
import sys
import types
from typing import Any

import pytest
from click.testing import CliRunner
from support.serving import serving
from support.toy_domain import ToyDomain

import sona
from engine.api import Constraint
from engine.errors import ConfigError
from sona.auth import AuthConfig, KeyConfig, hash_key
from sona.cli import main
from sona.cli.serve import Progress, ready_lines
from sona.config import DataConfig, ServerConfig, SonaConfig
from sona.journal import Correction
from sona.requests import ChatMessage, ChatPrompt, TextPrompt


@pytest.fixture
async def served():
    toy = ToyDomain()
    async with serving(toy) as server:
        toy.address = server.address
        yield toy


@pytest.fixture
async def run(served):
    """Runs a client command against the toy server."""

    async def invoke(*args, status=0):
        arguments = [*args, "--address", served.address]
        result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
        assert result.exit_code == status, result.output
        return result

    return invoke


def local(*args, status=0, env=None):
    """Runs a command that needs no server."""
    result = CliRunner().invoke(main, args, env=env)
    assert result.exit_code == status, result.output
    return result


def test_help_imports_nothing_heavy():
    code = (
        "import sys, sona.cli\n"
        "heavy = {'jax', 'grpc', 'numpy', 'rich', 'uvicorn', 'engine.config'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_is_there_and_helps():
    assert set(main.commands) == {
        "serve", "demo", "generate", "score", "embed", "feedback", "doctor", "bench", "models",
        "config", "learning", "adapters",
    }  # fmt: skip
    groups: Any = main.commands
    assert {name: set(groups[name].commands) for name in ("learning", "adapters")} == {
        "learning": {"status", "pause", "resume"},
        "adapters": {"list", "show", "load", "unload", "rollback"},
    }
    for name in main.commands:
        assert "Usage:" in local(name, "--help").output


async def test_generate_prints_the_answer_and_then_the_request(run):
    result = await run("generate", "bc", "--max-tokens", "3", "--request-id", "r1")
    assert result.stdout == "def\n"
    assert "pattern-7@3" in result.stderr
    assert "request_id: r1" in result.stderr


async def test_generate_without_streaming_and_without_learning(run, served):
    result = await run("generate", "bc", "--max-tokens", "3", "--no-stream", "--no-learn")
    assert result.stdout == "def\n"
    assert "request_id" not in result.stderr
    assert served.inference.calls[0][0].learn is False


async def test_generate_as_json_has_every_field(run):
    result = await run("generate", "bc", "--max-tokens", "1", "--temperature", "0", "--json")
    reply = json.loads(result.stdout)
    assert reply["choices"][0]["text"] == "d"
    assert reply["usage"]["cached_prompt_tokens"] == 0
    assert reply["adapter_versions"][0]["name"] == "pattern-7"


async def test_generate_sends_what_was_asked(run, served):
    await run(
        "generate", "b", "--system", "a", "--temperature", "0", "--top-p", "0.5", "--stop", "x",
        "--stop", "y", "--adapter", "none", "--max-tokens", "1",
    )  # fmt: skip
    ((call, _),) = served.inference.calls
    assert [turn.role for turn in call.prompt.messages] == ["system", "user"]
    assert (call.sampling.temperature, call.sampling.top_p) == (0.0, 0.5)
    assert (call.sampling.stop, call.adapter) == (("x", "y"), "none")


async def test_generate_sends_every_setting_by_its_name(run, served, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "string"}')
    await run(
        "generate", "b", "--n", "2", "--min-p", "0.1", "--repetition-penalty", "1.1",
        "--presence-penalty", "-1", "--frequency-penalty", "0.5", "--logit-bias", "3=-4.5",
        "--logit-bias", "4=1", "--seed", "0", "--min-tokens", "1", "--max-tokens", "2",
        "--ignore-eos", "--stop-token-ids", "5", "--logprobs", "0", "--prompt-logprobs", "2",
        "--json-schema", f"@{tmp_path / 'schema.json'}", "--priority", "-3",
        "--session-id", "talk", "--cache-salt", "mine", "--top-k", "7",
    )  # fmt: skip
    ((call, _),) = served.inference.calls
    sampling = call.sampling
    assert (sampling.n, sampling.min_p, sampling.top_k) == (2, pytest.approx(0.1), 7)
    assert sampling.repetition_penalty == pytest.approx(1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.0, 0.5)
    assert (sampling.logit_bias, sampling.seed) == ({3: -4.5, 4: 1.0}, 0)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (1, 2, True)
    assert (sampling.stop_token_ids, sampling.logprobs, sampling.prompt_logprobs) == ((5,), 0, 2)
    assert call.constraint == Constraint("json_schema", '{"type": "string"}')
    assert (call.priority, call.session_id, call.cache_salt) == (-3, "talk", "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--regex", "a", "--choice", "b"), "--regex and --choice are given; an answer has one"),
        (("--logit-bias", "x=1"), "'x=1' is not ID=NUMBER"),
        (("--top-k", "9999999999"), "is not in the range"),
        (("--seed", "9" * 30), "is not in the range"),
        (("--timeout", "0"), "is not in the range"),
        (("--grammar", "@/no/such/file"), "'/no/such/file' cannot be read"),
        (("--raw", "--system", "s"), "--raw has no place for --system"),
    ],
)
async def test_generate_says_what_cannot_be_asked(run, served, options, message):
    result = await run("generate", "b", *options, status=2)
    assert message in result.stderr
    assert served.inference.calls == []


async def test_several_answers_are_printed_one_by_one(run):
    result = await run("generate", "bc", "--max-tokens", "3", "--n", "2")
    assert result.stdout == "[0] def\n[1] def\n"


async def test_score_and_embed_print_what_came(run):
    result = await run("score", "--raw", "ab", "cd")
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["'c'", "'d'", "all"]
    assert sum(float(line.split()[0]) for line in lines[:-1]) == float(lines[-1].split()[0])
    vector = json.loads((await run("embed", "--raw", "ab")).stdout)
    assert vector
    assert json.loads((await run("embed", "--raw", "ab", "--json")).stdout) == {"embedding": vector}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "choose --quick, or --arms"),
        (("--quick", "--arms", "routed"), "choose --quick, or --arms"),
        (("--arms", "nosuch"), "there is no arm 'nosuch'; choose from sequential"),
        (("--arms", "routed", "--tasks", "13"), "is not in the range"),
    ],
)
def test_bench_learn_says_what_it_can_do(options, message):
    assert message in local("bench", "learn", *options, status=2).stderr


async def test_generate_sends_a_users_message_or_raw_text(run, served):
    await run("generate", "b", "--max-tokens", "1")
    await run("generate", "b", "--max-tokens", "1", "--raw")
    first, second = (call.prompt for call, _ in served.inference.calls)
    assert first == ChatPrompt((ChatMessage("user", "b"),))
    assert second == TextPrompt("b")


async def test_a_refusal_is_one_line_and_status_1(run):
    result = await run("generate", "bc", "--top-p", "0", status=1)
    assert "INVALID_ARGUMENT: sampling.top_p is 0.0" in result.stderr
    assert "Traceback" not in result.stderr


def test_nobody_listening_says_how_to_start():
    result = local("learning", "status", "--address", "127.0.0.1:1", status=1)
    assert "no server answers at 127.0.0.1:1; start one with: sona serve" in result.stderr


async def test_feedback_tells_what_became_of_it(run, served):
    result = await run("feedback", "r1", "--correction", "z", "--feedback-id", "f9")
    assert result.stdout == "ACCEPTED  feedback_id: f9\n"
    assert served.feedback.records["f9"].signal == Correction("z")
    result = await run("feedback", "r1", "--fail", "--feedback-id", "f9")
    assert result.stdout.startswith("DUPLICATE  feedback_id: f9 (submitted before; it is ACCEPTED")


@pytest.mark.parametrize("signals", [[], ["--pass", "--score", "1"]], ids=str)
def test_feedback_wants_one_signal(signals):
    result = local("feedback", "r1", *signals, status=2)
    assert "give exactly one of" in result.stderr


async def test_feedback_preview_stores_nothing(run, served):
    result = await run("feedback", "r1", "--pass", "--preview")
    assert result.stdout.splitlines() == [
        "would be learned in a new pattern",
        "  token 1: 'c' -> the end, now 0 likely",
    ]
    assert served.feedback.records == {}


async def test_adapters_are_listed_shown_and_rolled_back(run, served):
    lines = (await run("adapters", "list")).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["pattern-1@4", "ann"], ["pattern-2@4", "bob"], ["pattern-3@4", "tenant"],
    ]  # fmt: skip
    names = [
        json.loads(line)["name"]
        for line in (await run("adapters", "list", "--json")).stdout.splitlines()
    ]
    assert names == ["pattern-1", "pattern-2", "pattern-3"]
    shown = (await run("adapters", "show", "pattern-3")).stdout
    assert "restores 0, 1 feedback in force  why" in shown
    assert "(compacted)" in shown
    done = await run("adapters", "rollback", "pattern-3", "--to-version", "0", "--scope", "tenant")
    assert "no longer in force: f1" in done.stdout
    ((slot, to_version, _, _),) = served.learning.rolled_back
    assert (slot.scope, to_version) == ("tenant", 0)


async def test_learning_is_paused_with_a_reason(run):
    assert (
        "learning: paused (audit)" in (await run("learning", "pause", "--reason", "audit")).stdout
    )
    seen = json.loads((await run("learning", "status", "--json")).stdout)
    assert (seen["state"], seen["num_pending"]) == ("LEARNING_STATE_PAUSED", "2")
    lines = (await run("learning", "resume")).stdout.splitlines()
    assert lines[0] == "learning: running"
    assert "  feedback learned: 5" in lines


def test_config_show_tells_origins_and_never_a_hash(tmp_path):
    path = tmp_path / "sona.toml"
    path.write_text(f'[[auth.key]]\ntenant = "t"\nprincipal = "p"\nsha256 = "{"a" * 64}"\n')
    result = local("config", "show", "--config", str(path), env={"SONA_SERVER_PORT": "9000"})
    lines = result.stdout.splitlines()
    assert "server.port = 9000  # environment SONA_SERVER_PORT" in lines
    assert f'auth.key = ["t/p (user)"]  # file {path}' in lines
    assert "engine.page_size = 16  # default" in lines
    assert "aaaa" not in result.stdout
    rows = json.loads(local("config", "show", "--json").stdout)
    assert rows["server.grpc_port"] == {"value": 50051, "origin": "default"}


def test_config_check_says_what_is_wrong(tmp_path):
    assert "is right" in local("config", "check", "--config", "small-cpu").stdout
    path = tmp_path / "sona.toml"
    path.write_text("[server]\nprot = 1\n")
    result = local("config", "check", "--config", str(path), status=1)
    assert "did you mean port?" in result.stderr


@pytest.fixture
def app(monkeypatch):
    """Stands in for `sona.app`: keeps the configuration, reports, and is ready."""
    fake = types.SimpleNamespace(configs=[])

    def run(config, *, progress, on_ready):
        fake.configs.append(config)
        progress("loading weights", 0, 2)
        progress("loading weights", 2, 2)
        progress("warming up", 0, 0)
        on_ready(types.SimpleNamespace(model="toy", grpc="127.0.0.1:50051", http="http://h:8000"))
        progress("too late", 0, 0)

    fake.run = run
    monkeypatch.setattr(sona, "app", fake, raising=False)
    monkeypatch.setitem(sys.modules, "sona.app", fake)
    return fake


def test_serve_turns_flags_into_settings(app, tmp_path):
    result = local(
        "serve", "models/x", "--port", "0", "--grpc-port", "7", "--max-num-seqs", "3",
        "--data-dir", str(tmp_path), "--no-learn", "--deterministic", "--api-key", "k",
        "--host", "0.0.0.0", "--served-model-name", "toy",
    )  # fmt: skip
    (config,) = app.configs
    assert (config.model, config.server.port, config.server.grpc_port) == ("models/x", 0, 7)
    assert (config.engine.max_num_seqs, config.engine.deterministic) == (3, True)
    assert (config.data.dir, config.learning.enabled) == (tmp_path, False)
    (key,) = config.auth.key
    assert (key.tenant, key.role, key.sha256) == ("default", "admin", hash_key("k"))
    assert result.stderr.splitlines() == ["loading weights ...", "warming up ..."]


def test_serve_says_how_to_talk_to_it(app):
    result = local("serve")
    assert "sona generate --temperature 0 'your prompt'" in result.stdout
    assert app.configs == [SonaConfig()]


def test_serve_takes_the_model_once(app):
    assert "give one" in local("serve", "a", "--model", "b", status=2).stderr
    local("serve", "--model", "b")
    assert [config.model for config in app.configs] == ["b"]


def test_serve_refuses_an_open_server_in_one_line(app):
    result = local("serve", "--host", "0.0.0.0", status=1)
    assert "anyone could teach the model" in result.stderr
    assert app.configs == []


def test_serve_tells_an_error_of_start_up_in_one_line(app):
    def run(config, **_):
        raise ConfigError("engine.max_model_len is 9; the model was trained for 8 tokens")

    app.run = run
    result = local("serve", status=1)
    assert result.stderr.splitlines()[-1].startswith("Error: engine.max_model_len is 9")


def test_ready_lines_name_the_bound_address_and_the_key():
    addresses: Any = types.SimpleNamespace(model="toy", grpc="0.0.0.0:7", http="http://0.0.0.0:8")
    key = KeyConfig(tenant="t", principal="p", sha256="a" * 64)
    config = SonaConfig(
        server=ServerConfig(host="0.0.0.0", grpc_port=7, port=8),
        auth=AuthConfig(key=(key,)),
        data=DataConfig(),
    )
    text = "\n".join(ready_lines(addresses, config))
    assert "sona generate --address 127.0.0.1:7 " in text
    assert 'Client("127.0.0.1:7", api_key="KEY")' in text
    assert "authorization: Bearer $SONA_API_KEY" in text
    assert "curl http://127.0.0.1:8/metrics" in text
    assert "0.0.0.0" not in text


def test_progress_shows_nothing_after_it_ended(capsys):
    with Progress() as progress:
        progress.report("loading", 0, 1)
        progress.end()
        progress.report("late", 0, 1)
    assert capsys.readouterr().err == "loading ...\n"
