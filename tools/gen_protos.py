"""Write `sona/v1/` from `protos/sona/v1/*.proto`: messages, stubs, and their types.

The generator's own version decides which runtimes can import its output: code made by
grpcio-tools 1.76 (protobuf 6.31) imports under protobuf 6.31 up to 7.x, newer code does not
import under older runtimes. So the version is pinned and checked here.

`--check` writes nothing and fails when the committed files differ from what would be written.
"""

import argparse
import filecmp
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PINNED = "1.76.0"
INIT = '"""Generated from protos/sona/v1 by tools/gen_protos.py. Do not edit."""\n'


def main() -> int:
    """Generate or check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    version = importlib.metadata.version("grpcio-tools")
    if version != PINNED:
        print(
            f"grpcio-tools is {version}; the committed code needs exactly {PINNED}: "
            f"pip install grpcio-tools=={PINNED}",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        made = generate(Path(scratch))
        target = ROOT / "sona" / "v1"
        if args.check:
            return check(made, target)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
        print(f"wrote {len(list(target.iterdir()))} files to {target.relative_to(ROOT)}")
    return 0


def generate(scratch: Path) -> Path:
    """Run protoc into `scratch`; the folder that holds the package."""
    scripts = Path(sys.executable).parent  # where protoc-gen-mypy lies
    os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    builtin = Path(protoc.__file__).parent / "_proto"  # google/protobuf/*.proto
    protos = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    outputs = ("python", "grpc_python", "mypy", "mypy_grpc")
    status: int = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'protos'}",
            f"-I{builtin}",
            *(f"--{name}_out={scratch}" for name in outputs),
            *protos,
        ]
    )
    if status:
        raise SystemExit(f"protoc ended with status {status}")
    package = scratch / "sona" / "v1"
    (package / "__init__.py").write_text(INIT, "utf-8")
    for services in package.glob("*_pb2_grpc.py"):
        if "Servicer" not in services.read_text("utf-8"):  # messages only: nothing to serve
            services.unlink()
            services.with_suffix(".pyi").unlink(missing_ok=True)
    return package


def check(made: Path, committed: Path) -> int:
    """Compare two folders by content; 1 when they differ."""
    names = {path.name for path in made.iterdir()}
    there = {path.name for path in committed.glob("*.py*")}
    _, differ, missing = filecmp.cmpfiles(made, committed, names, shallow=False)
    stale = sorted(set(differ) | set(missing) | (there - names))
    if stale:
        print(f"sona/v1 is out of date ({', '.join(stale)}); run: make protos", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
