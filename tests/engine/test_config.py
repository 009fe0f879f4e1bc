"""Sizes derived at start-up, and the threads that compute with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint

from engine.config import EngineConfig, plan_engine
from engine.model import load_config

_COUNT = """
import sys
from pathlib import Path
from engine.threads import use_xla_threads
use_xla_threads(int(sys.argv[1]), Path(sys.argv[2]))
import jax.numpy as jnp
(jnp.ones((64, 64)) @ jnp.ones((64, 64))).block_until_ready()
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print(names.count("tf_XLAEigen"))
"""


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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system lists no threads")
@pytest.mark.parametrize(
    ("setting", "environment", "megabytes", "threads"),
    [
        (0, {}, 1, 1),  # a small model
        (0, {"NPROC": "3"}, 1, 3),  # the environment knows better
        (2, {"NPROC": "3"}, 1, 2),  # the setting knows best
        (0, {"NPROC": "3"}, 64, 3),  # a large model: left to XLA
    ],
)
def test_xla_computes_with_as_many_threads_as_were_chosen(
    tmp_path, setting, environment, megabytes, threads
):
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(megabytes << 20)
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT, str(setting), str(tmp_path)],
        env={k: v for k, v in os.environ.items() if k != "NPROC"} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(counted.stdout) == threads
