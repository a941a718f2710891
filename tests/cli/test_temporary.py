"""Files on their way: those of dead processes are removed, those of living ones are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowering import temporary
from lowering.cli.outputs import check_apart
from lowering.errors import UsageError

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes"
)

LEAVES = """
import os, sys
from pathlib import Path
from lowering import temporary
path = temporary.beside(Path(sys.argv[1]))
path.write_text("half")
print(path, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""


def start(path: Path, how: str) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", LEAVES, str(path), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    living, held = start(tmp_path / "m.vmfb", "waits")
    dead, left = start(tmp_path / "m.vmfb", "killed")
    dead.wait()
    others = [tmp_path / ".m.vmfb.vmfuse", tmp_path / "m.vmfb", tmp_path / ".vmfuse-keep"]
    for other in others:
        other.touch()
    elsewhere = tmp_path / left.name.replace(temporary._machine(), "01234567")
    elsewhere.touch()
    assert left.exists()
    mine = temporary.beside(tmp_path / "m.vmfb")
    assert not left.exists()
    assert held.exists() and mine.exists() and elsewhere.exists() and all(map(Path.exists, others))
    living.communicate()


def test_a_directory_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    abandoned = tmp_path / temporary._mark().replace(f"-{os.getpid()}-", "-999999999-")
    abandoned.mkdir()
    (abandoned / "weights").touch()
    with temporary.directory() as mine:
        assert [mine] == list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_long_name_and_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / ("€" * 80 + ".vmfb")
    temporary.replace(path, lambda file: file.write_text("whole"))
    assert path.read_text() == "whole"

    def fails(file: Path) -> None:
        file.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        temporary.replace(path, fails)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_files_that_are_one_by_other_names(tmp_path: Path) -> None:
    source = tmp_path / "model.py"
    source.touch()
    (tmp_path / "hard.py").hardlink_to(source)
    (tmp_path / "soft.py").symlink_to("model.py")
    (tmp_path / "loop.py").symlink_to("loop.py")
    for name in ("model.py", "hard.py", "soft.py", "../" + tmp_path.name + "/model.py"):
        with pytest.raises(UsageError, match="has the same path as the source"):
            check_apart({"-o": tmp_path / name}, {"source": source})
    check_apart({"-o": tmp_path / "MODEL.py", "--report": tmp_path / "loop.py"}, {"source": source})
    with pytest.raises(UsageError, match=r"--report .* has the same path as -o"):
        check_apart({"-o": tmp_path / "a", "--report": tmp_path / "." / "a"}, {})
