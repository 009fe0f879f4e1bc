"""The four import names are ours, and importing the light ones stays light."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("sona", "engine", "adapters", "reasoning_bank")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_belongs_to_our_distribution(package):
    owners = importlib.metadata.packages_distributions().get(package, [])
    assert owners in ([], ["sona"])  # an editable install lists no files for its packages
    found = subprocess.run(
        [sys.executable, "-c", f"import {package}; print({package}.__file__)"],
        capture_output=True, text=True, check=True, cwd="/",
    ).stdout.strip()  # fmt: skip
    import sona

    assert Path(found).parent.parent == Path(str(sona.__file__)).parent.parent


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("engine", ["jax", "grpc", "flax"]),
        ("sona.journal", ["jax", "grpc"]),
        ("adapters.store", ["jax", "grpc"]),
        ("sona.cli", ["jax", "grpc", "engine.model"]),
        ("engine.scheduler", ["jax", "grpc", "faiss"]),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_references_import_nothing_of_ours():
    for path in (Path(__file__).parents[1] / "reference").glob("*.py"):
        text = path.read_text("utf-8")
        for name in (*PACKAGES, "jax"):
            assert f"import {name}" not in text and f"from {name}" not in text, (path, name)
