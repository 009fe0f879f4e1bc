"""How many threads XLA computes with on a CPU.

A step of a small model is hundreds of operations of a few microseconds each. Split over threads,
each of them waits for the slowest, which beside a busy event loop waits for a core first. From
about 16 M parameters on, two threads are the faster ones (`docs/performance.md` has the figures).
"""

import os
from pathlib import Path

import jax

_VARIABLE = "NPROC"  # XLA reads it when a process first asks for a device, and never again
_SMALL_BYTES = 32 << 20  # of weights on disk


def use_xla_threads(threads: int, checkpoint: Path) -> None:
    """Choose the number for this process. Without effect once jax has been asked for a device.

    Args:
      threads: how many; 0 leaves it to the size of the model: one for a small one, else what
        XLA takes, a thread per core. NPROC in the environment goes before that.
    """
    wanted = threads or _for_size(checkpoint)
    if wanted is None:
        return
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(wanted)
    try:
        jax.devices()
    finally:  # a process started from here chooses for itself
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


def _for_size(checkpoint: Path) -> int | None:
    num_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return 1 if num_bytes <= _SMALL_BYTES and _VARIABLE not in os.environ else None
