"""Sizes derived at start-up."""

import pytest
from support.checkpoints import make_checkpoint

from engine.config import EngineConfig, plan_engine
from engine.model import load_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "qwen3")
    return directory


@pytest.mark.parametrize(
    ("num_seqs", "deterministic", "buckets"),
    [
        (16, False, (1, 2, 4, 8, 16)),
        (12, False, (1, 2, 4, 8, 12)),
        (1, False, (1,)),
        (16, True, (16,)),
    ],
)
def test_decode_buckets(checkpoint, num_seqs, deterministic, buckets):
    config = EngineConfig(max_num_seqs=num_seqs, deterministic=deterministic)
    assert plan_engine(config, load_config(checkpoint), platform="cpu").decode_buckets == buckets
