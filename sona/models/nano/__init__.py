"""sona-nano: the model that travels with the package. Not a chat model; see checkpoint/README.md.

`train_nano` is imported on first use: serving the checkpoint needs neither optax nor orbax.
"""

from pathlib import Path
from typing import Any


def train_nano(out_dir: Path, **options: Any) -> dict[str, float]:
    """Train the model anew; see `sona.models.nano.train.train_nano` for the options."""
    from sona.models.nano.train import train_nano as run

    return run(out_dir, **options)
