"""What becomes of a compilation when the compiler crashes, hangs or is interrupted, and what it leaves."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from iree.compiler import ir

import lowering
from lowering.errors import CompileError, UsageError
from lowering.importing.importer import import_module, parse_module
from lowering.importing.merging import merge
from lowering.isolation import child as isolated
from lowering.isolation import process as isolation
from lowering.isolation.culprit import find_culprit
from lowering.isolation.iree_steps import Iree

# torch-mlir reads past the sizes of a tensor for a dimension that is counted from the end.
CRASHES = """
func.func @main(%x: !torch.vtensor<[4,8],f32>, %i: !torch.vtensor<[4,8],si64>) -> !torch.vtensor<[4,8],f32> {
  %dim = torch.constant.int -1
  %y = torch.aten.scatter.src %x, %dim, %i, %x : !torch.vtensor<[4,8],f32>, !torch.int,
      !torch.vtensor<[4,8],si64>, !torch.vtensor<[4,8],f32> -> !torch.vtensor<[4,8],f32>
  return %y : !torch.vtensor<[4,8],f32>
}
"""
NOTHING = "module {}"

# In place of the compiler: a script that runs ``isolated`` with another way to compile.
BROKEN = """
import io
import json, os, signal, socket, sys, time
sys.path[:] = [{directory!r}, *json.loads(sys.argv[2])]
import child as isolated
def compile(asked, directory, diagnostics):
    print("{words}", flush=True)
    {action}
isolated._compile = compile
isolated.serve(socket.socket(fileno=int(sys.argv[1])))
"""

# Compiles and writes what was reported.
REPORTS = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import child as isolated
diagnostics = []
assert not isolated._compile({"flags": ["--iree-input-type=none"]}, pathlib.Path(sys.argv[2]), diagnostics)
print(diagnostics)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Puts a compiler that does ``action`` in place of IREE's."""

    def install(action: str, words: str = "", script: str = BROKEN) -> Path:
        path = tmp_path / "broken.py"
        directory = str(Path(isolated.__file__).parent)
        path.write_text(script.format(action=action, words=words, directory=directory))
        isolation._close()
        monkeypatch.setattr(isolated, "__file__", str(path))
        return path

    yield install
    isolation._close()


def compile_nothing() -> bytes:
    with ir.Context():
        return Iree().compile(ir.Module.parse(NOTHING), ())


class Add(torch.nn.Module):
    def __init__(self, number: float):
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.number


# --- what the compiler dies of --------------------------------------------------------------------------


def test_a_crash_of_torch_mlir_is_an_error_and_its_reproducer_crashes_as_well(tmp_path: Path) -> None:
    with ir.Context(), pytest.raises(CompileError, match=r"torch-to-iree\) died of SIG(SEGV|ABRT)") as caught:
        Iree(tmp_path).lower(ir.Module.parse(CRASHES))
    found = re.search(r"reproduce it with: (iree-opt) (.*)", str(caught.value))
    assert found is not None
    scripts = Path(sys.executable).parent
    done = subprocess.run(f"{scripts}/{found[1]} {found[2]}", shell=True, capture_output=True, check=False)
    # What is past the sizes is not the same everywhere; the script hands on what the compiler died of.
    assert -done.returncode % 256 in (signal.SIGSEGV, signal.SIGABRT), done.stderr


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGABRT)", "died of SIGABRT .*: LLVM ERROR: out of memory"),
        ("os.kill(os.getpid(), signal.SIGFPE)", "died of SIGFPE"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL.* memory runs out"),
        ("raise ValueError('odd flag')", "exit code 1: ValueError: odd flag"),
    ],
)
def test_whatever_it_dies_of_is_said(broken: Callable[..., Path], action: str, said: str) -> None:
    broken(action, words="LLVM ERROR: out of memory")
    with pytest.raises(CompileError, match=said):
        compile_nothing()


def test_the_next_compilation_is_not_affected(broken: Callable[..., Path]) -> None:
    broken("os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
    with pytest.raises(CompileError, match="was killed"):
        compile_nothing()
    server = isolation._current()
    server.process.kill()
    server.process.wait()
    with pytest.raises(CompileError, match="was killed"):
        compile_nothing()
    assert isolation._current() is not server


def test_a_compiler_that_cannot_be_loaded_says_so(broken: Callable[..., Path]) -> None:
    broken(
        "", script=BROKEN.replace("isolated._compile", "isolated._load = lambda: 1 / 0\nisolated._compile")
    )
    with pytest.raises(CompileError, match=r"cannot be loaded(.|\n)*ZeroDivisionError"):
        compile_nothing()


def test_what_it_reports_while_others_hold_the_interpreter_is_noted(tmp_path: Path) -> None:
    rejected = """func.func @main(%x: !llvm.ptr) -> i32 {
      %y = llvm.load %x : !llvm.ptr -> i32
      return %y : i32
    }"""
    with ir.Context():
        bytecode = io.BytesIO()
        ir.Module.parse(rejected).operation.write_bytecode(bytecode)
    (tmp_path / isolated.SOURCE).write_bytes(bytecode.getvalue())
    # The memory allocator of this mode ends the process where it is called without the interpreter's lock,
    # which every one does from Python 3.12 on.
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", REPORTS, Path(isolated.__file__).parent, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed to legalize" in done.stdout, done.stdout


def test_the_operation_that_a_compiler_dies_of_is_named(broken: Callable[..., Path]) -> None:
    broken("os.abort()")

    class Several(torch.nn.Module):
        def forward(self, x):
            return x.cos() + x.sin()

    with pytest.raises(CompileError, match=rf"SIGABRT.*\n  \S*{Path(__file__).name}:\d+: it fails on torch"):
        lowering.compile(Several(), (torch.ones(4),))


def test_the_first_operation_without_which_a_part_compiles_is_found() -> None:
    class Several(torch.nn.Module):
        def forward(self, x, y):
            return x.cos() + y, x.sin().tan()

    context = ir.Context()
    program = merge([import_module(Several(), (torch.ones(4), torch.ones(4)), context)])

    def fails(part: ir.Module) -> bool:
        assert part.operation.verify()
        return "torch.aten.sin" in str(part)

    found = find_culprit(program, fails)
    assert found is not None
    assert found.name == "torch.aten.sin"
    assert find_culprit(program, lambda part: False) is None


CASTS = """
func.func @main(%x: tensor<4xf32>) -> !torch.vtensor<[4],f32> {
  %0 = arith.negf %x : tensor<4xf32>
  %1 = torch_c.from_builtin_tensor %0 : tensor<4xf32> -> !torch.vtensor<[4],f32>
  return %1 : !torch.vtensor<[4],f32>
}
"""


def test_not_the_cast_behind_it() -> None:
    program = merge([parse_module(CASTS, ir.Context())])
    found = find_culprit(program, lambda part: "arith.negf" in str(part))
    assert found is not None
    assert found.name == "arith.negf"


# --- limits ---------------------------------------------------------------------------------------------


def test_what_computes_for_ever_ends_at_the_limit(
    broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("while True: pass")
    monkeypatch.setenv(isolation.TIMEOUT, "0.5")
    with pytest.raises(CompileError, match=f"did not come to an end .*{isolation.TIMEOUT}"):
        compile_nothing()


def test_what_waits_for_ever_ends_too(broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken("time.sleep(600)")
    monkeypatch.setenv(isolation.TIMEOUT, "0.1")
    with pytest.raises(CompileError, match="did not come to an end"):
        compile_nothing()


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isolation.TIMEOUT, "soon")
    with pytest.raises(UsageError, match="soon"):
        compile_nothing()


def test_the_limit_grows_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with ir.Context():
        small, large = ir.Module.parse(NOTHING), ir.Module.parse(CRASHES, ir.Context())
        assert 60 <= isolation._seconds(small) < isolation._seconds(large)  # type: ignore[operator]
        monkeypatch.setenv(isolation.TIMEOUT, "0")
        assert isolation._seconds(large) is None


# --- interruptions, from processes of their own ---------------------------------------------------------

HANGING = """
import sys
import torch, lowering
from lowering.isolation import child as isolated
isolated.__file__ = sys.argv[1]
class Add(torch.nn.Module):
    def forward(self, x): return x + 1
print("ready", flush=True)
lowering.compile(Add(), (torch.ones(4),))
"""


@pytest.fixture
def hanging(tmp_path: Path, broken: Callable[..., Path]) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for a compiler that sleeps; both have made their files."""
    script = broken(f"open({str(tmp_path / 'working')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    (tmp_path / "model.py").write_text(HANGING)
    (tmp_path / "files").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "model.py"), str(script)],
        env={**os.environ, "TMPDIR": str(tmp_path / "files")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: (tmp_path / "working").exists() and (tmp_path / "working").read_text(), 120)
    yield process
    process.kill()
    process.communicate()


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interruption_ends_the_compiler_and_leaves_nothing(
    hanging: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    worker = int((tmp_path / "working").read_text())
    assert list((tmp_path / "files").iterdir())
    hanging.send_signal(number)
    _, said = hanging.communicate(timeout=20)
    if number == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt"), said
    until(lambda: is_gone(worker), 10)
    until(lambda: not list((tmp_path / "files").glob("vmfuse-*")), 10)


# Without a guard for the main module, in a forked child, started by something that is no Python.
ODD = """
import os, sys
import torch, lowering
class Add(torch.nn.Module):
    def forward(self, x): return x + 1
os.chdir("/")
sys.executable = "/usr/bin/false"
lowering.compile(Add(), (torch.ones(4),))
child = os.fork()
if child == 0:
    lowering.compile(Add(), (torch.ones(4),))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
lowering.compile(Add(), (torch.ones(4),))
"""


def test_it_works_from_odd_places(tmp_path: Path) -> None:
    script = tmp_path / "odd.py"
    script.write_text(ODD)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr


# --- many at once, and one after another ----------------------------------------------------------------


def test_two_threads_compile_while_a_third_calls() -> None:
    x = torch.arange(4.0)
    program = lowering.load(lowering.compile(Add(1.0), (x,)).vmfb)
    found: dict[float, torch.Tensor] = {}

    def compile_and_call(number: float) -> None:
        found[number] = lowering.load(lowering.compile(Add(number), (x,)).vmfb)(x)

    threads = [threading.Thread(target=compile_and_call, args=(number,)) for number in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(program(x), x + 1)
    assert found.keys() == {2.0, 3.0}
    assert all(torch.equal(y, x + number) for number, y in found.items())


MANY = """
import sys, torch, lowering
class Add(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
    def forward(self, x): return torch.nn.functional.silu(x) + self.number
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for number in range(12):
    lowering.compile(Add(float(number)), (torch.ones(4, 8),))
    if number == 1:
        before = resident()
print((resident() - before) / 10)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_compiling_does_not_make_the_process_grow() -> None:
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1_000_000  # bytes for each program
