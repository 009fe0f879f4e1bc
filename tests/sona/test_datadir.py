"""The data directory: private, writable, one process at a time."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sona.datadir import DataDir
from sona.errors import DataDirLocked, DataDirUnwritable

ROOT = Path(__file__).parents[2]
HOLD = "import sys; from pathlib import Path; from sona.datadir import DataDir; "
HOLD += "held = DataDir(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def run_child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_made_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0o000)
    try:
        with DataDir(tmp_path / "a" / "b") as data:
            assert data.path.stat().st_mode & 0o777 == 0o700
            assert (data.path / "lock").stat().st_mode & 0o777 == 0o600
            assert data.cache_path.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_names_its_files_by_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with DataDir(Path(".sona")) as data:
        assert data.journal_path == tmp_path / ".sona" / "journal.db"
        assert data.adapters_path == tmp_path / ".sona" / "adapters.db"
        assert data.cache_path == tmp_path / ".sona" / "cache"


def test_leaves_nothing_but_its_lock(tmp_path):
    with DataDir(tmp_path / "data") as data:
        assert [file.name for file in data.path.iterdir()] == ["lock"]


def test_a_second_server_is_told_who_holds_it(tmp_path):
    child = run_child(HOLD, tmp_path)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(DataDirLocked, match=rf"process {child.pid} \(-c.*--data-dir"):
            DataDir(tmp_path)
    finally:
        child.kill()
        child.communicate(timeout=10)
    with DataDir(tmp_path) as data:  # the kernel lets go when the holder dies, however it dies
        assert data.path == tmp_path


def test_held_within_one_process_too_until_closed(tmp_path):
    first = DataDir(tmp_path)
    with pytest.raises(DataDirLocked, match=f"process {os.getpid()} "):
        DataDir(tmp_path)
    first.close()
    first.close()
    DataDir(tmp_path).close()


def test_an_unreadable_lock_note_still_makes_a_message(tmp_path):
    with DataDir(tmp_path):
        (tmp_path / "lock").write_text("torn {")
        with pytest.raises(DataDirLocked, match="another process"):
            DataDir(tmp_path)


def test_a_child_program_does_not_inherit_the_lock(tmp_path):
    data = DataDir(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        data.close()
        DataDir(tmp_path).close()
    finally:
        child.communicate(b"\n", timeout=10)


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataDirUnwritable, match="is a file"):
        DataDir(tmp_path / "file")
    with pytest.raises(DataDirUnwritable, match="below a file"):
        DataDir(tmp_path / "file" / "data")


REFUSED = """
import os, resource, sys
from pathlib import Path
from sona.datadir import DataDir
from sona.errors import DataDirUnwritable
path, limit = Path(sys.argv[1]), sys.argv[2]
if limit == "mode":
    if os.geteuid() == 0:
        os.setuid(65534)  # permissions do not bind root
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    DataDir(path)
except DataDirUnwritable as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(error)
"""


@pytest.mark.parametrize("limit,words", [("mode", "Permission denied"), ("size", "File too large")])
def test_a_directory_that_takes_no_writes_is_refused(limit, words):
    with tempfile.TemporaryDirectory() as above:  # tmp_path may lie below a private directory
        Path(above).chmod(0o755)
        target = Path(above, "data")
        target.mkdir()
        target.chmod(0o555 if limit == "mode" else 0o700)
        said, _ = run_child(REFUSED, target, limit).communicate(timeout=30)
        assert words in said and str(target) in said and "--data-dir" in said
