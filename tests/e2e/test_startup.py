"""What start-up refuses, and how: before anything is loaded, naming what to change."""

import shutil

import pytest
import tokenizers
from support.checkpoints import make_checkpoint
from support.server import configured, running_server

from engine.errors import ConfigError, TokenizerError, WeightsError
from sona.errors import DataDirLocked, DataDirUnwritable, PortInUse

SMALL = {"max_num_seqs": 2, "max_learned_slots": 4}


async def refused(config):
    """The error of a start that must fail, taken out of its task group."""
    try:
        async with running_server(config):
            pytest.fail("the server started")
    except BaseExceptionGroup as group:
        assert len(group.exceptions) == 1
        return group.exceptions[0]
    except Exception as error:
        return error


async def test_checkpoints_that_cannot_be_served(tmp_path):
    good = tmp_path / "good"
    make_checkpoint(good, "llama")
    error = await refused(configured(tmp_path / "d", model=tmp_path / "nowhere"))
    assert isinstance(error, ConfigError) and "is not a directory" in str(error)

    broken = shutil.copytree(good, tmp_path / "truncated")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = await refused(configured(tmp_path / "d", model=broken))
    assert isinstance(error, WeightsError) and "truncated" in str(error)

    broken = shutil.copytree(good, tmp_path / "missing")
    (broken / "model.safetensors").unlink()
    error = await refused(configured(tmp_path / "d", model=broken))
    assert isinstance(error, WeightsError) and "model.safetensors" in str(error)

    broken = shutil.copytree(good, tmp_path / "unknown")
    table = (broken / "config.json").read_text().replace("LlamaForCausalLM", "NewForCausalLM")
    (broken / "config.json").write_text(table)
    error = await refused(configured(tmp_path / "d", model=broken))
    assert isinstance(error, ConfigError) and "supported: LlamaForCausalLM" in str(error)

    broken = shutil.copytree(good, tmp_path / "tokenizer")
    larger = tokenizers.Tokenizer.from_file(str(broken / "tokenizer.json"))
    larger.add_tokens([f"word{i}" for i in range(100)])
    larger.save(str(broken / "tokenizer.json"))
    error = await refused(configured(tmp_path / "d", model=broken))
    assert isinstance(error, TokenizerError) and "embedding has 300 rows" in str(error)


async def test_places_that_cannot_be_used(tmp_path):
    model = tmp_path / "model"
    make_checkpoint(model, "llama")
    config = configured(tmp_path / "data", model=model, engine=SMALL)
    async with running_server(config) as addresses:
        error = await refused(configured(tmp_path / "data", model=model, engine=SMALL))
        assert isinstance(error, DataDirLocked)
        taken = int(addresses.grpc.rpartition(":")[2])
        again = configured(tmp_path / "other", model=model, engine=SMALL)
        object.__setattr__(again.server, "grpc_port", taken)
        error = await refused(again)
        assert isinstance(error, PortInUse) and str(taken) in str(error)
    (tmp_path / "file").write_text("")
    error = await refused(configured(tmp_path / "file" / "below", model=model))
    assert isinstance(error, DataDirUnwritable)
