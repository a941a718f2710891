"""compile-to-vmfb: what it accepts, what it says, what it leaves behind.

Most tests replace the compiler by one that returns at once, since what is tested is the command
around it; the last ones go the whole way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import lowering
import lowering.cli.verify
import lowering.runtime.program
from lowering.cli import compile as compile_cli
from lowering.cli.source import MlirText, Model, resolve
from lowering.errors import CompileError, UsageError
from lowering.report.report import Report
from lowering.report.sites import Site
from lowering.targets import resolve as resolve_target

ROOT = Path(__file__).resolve().parents[2]
FUSED = Site("rms_norm", "model.py:7", "fused", "rms_norm+group_quant", "row_h64")
UNFUSED = Site("group_quant", "model.py:9", "unfused", reason="its input is not a norm")

MODEL = """
import torch

class Double(torch.nn.Module):
    def forward(self, x):
        return x * 2

def build():
    return Double(), (torch.ones(2, 8),)

def dynamic():
    return Double(), (torch.ones(2, 8),), {"x": {0: torch.export.Dim("t")}}

def bare():
    return Double()

def tensor():
    return Double(), torch.ones(2)

def four():
    return Double(), (), None, 4

def named():
    return Double(), (), {"x": torch.ones(2, 8)}, {"x": {0: torch.export.Dim("t")}}

def wrong_names():
    return Double(), (), [torch.ones(2, 8)], None

def nothing():
    pass

def raises():
    return 1 / 0

def leaves():
    raise SystemExit("bye")

def needs(argument):
    pass

def wrong_shapes():
    return Double(), (torch.ones(2),), 7

number = 3
"""


@dataclass
class FakeCompiled:
    target: object
    report: Report

    def save(self, path):
        Path(path).write_bytes(b"program")

    def dump_kernels(self, directory):
        (Path(directory) / "kernels.json").write_text('{"launches": []}')


@dataclass
class FakeCompiler:
    """Stands for lowering.compiler: records how it was called and returns ``sites``."""

    sites: tuple[Site, ...] = (FUSED,)
    error: Exception | None = None
    program: object = None
    calls: list[tuple] = field(default_factory=list)

    def compile(self, module, args=(), *, dynamic_shapes=None, **settings):
        self.calls.append((module, args, dynamic_shapes, settings))
        return self._compiled(**settings)

    def compile_mlir(self, text, **settings):
        self.calls.append((text, settings))
        return self._compiled(**settings)

    def _compiled(self, *, target, parameters, progress, patterns=(), fp8="as-is", **others):
        assert not patterns and fp8 == "as-is" and not others.pop("source_paths")
        assert set(others) <= {"kwargs", "output", "dump_phases_to"}
        progress("import", "a model")
        progress("kernels", "1 of 1")
        if parameters:
            Path(parameters).write_bytes(b"weights")
        if self.error:
            raise self.error
        return FakeCompiled(resolve_target(target), Report(resolve_target(target).name, self.sites, 3))


@pytest.fixture
def compiler(monkeypatch) -> FakeCompiler:
    fake = FakeCompiler()
    runtime = types.SimpleNamespace(load=lambda path, parameters=None: fake.program)
    for name, module in (("compiler", fake), ("runtime.program", runtime)):
        monkeypatch.setitem(sys.modules, f"lowering.{name}", module)
    monkeypatch.setattr(lowering, "compiler", fake, raising=False)
    monkeypatch.setattr(lowering.runtime, "program", runtime)
    return fake


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A directory with model.py in it, and nothing else."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left_behind(directory: Path) -> set[str]:
    ignored = {"model.py", "__pycache__"}
    return {p.name for p in directory.iterdir()} - ignored


def fails(capsys, code: int, *arguments: str) -> str:
    """The message of a run that must fail with ``code``: one message, no traceback."""
    assert compile_cli.main(arguments) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("compile-to-vmfb: error:") == 1
    return err[err.index("compile-to-vmfb: error:") :].strip()


# Getting it right -------------------------------------------------------------------------------


def test_compiles_and_says_where_it_went(here, compiler, capsys):
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb"]) == 0
    assert left_behind(here) == {"m.vmfb"}
    assert (here / "m.vmfb").read_bytes() == b"program"
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["load", "import", "kernels", "save", "done"]
    assert "m.vmfb" in err and "1 of 1 sites fused into 3 custom dispatches" in err


def test_hands_on_what_the_callable_returned(here, compiler):
    compile_cli.main(["model.py:dynamic", "-o", "m.vmfb", "--target", "H200", "--dump-phases-to", "ir"])
    module, args, shapes, settings = compiler.calls[0]
    assert type(module).__name__ == "Double"
    assert len(args) == 1 and list(shapes["x"]) == [0]
    assert settings["target"] == "H200" and settings["dump_phases_to"] == Path("ir")
    assert settings["kwargs"] == {} and settings["output"] is None
    compile_cli.main(["model.py:named", "-o", "m.vmfb", "--only-output", "logits"])
    _, args, shapes, settings = compiler.calls[1]
    assert args == () and settings["kwargs"]["x"].shape == (2, 8) and list(shapes["x"]) == [0]
    assert settings["output"] == "logits"
    compile_cli.main(["model.py:build", "-o", "m.vmfb", "--only-output", "a", "--only-output", "b.0"])
    assert compiler.calls[2][-1]["output"] == ["a", "b.0"]


@pytest.mark.parametrize("name", ["r.json", "r.html"])
def test_writes_the_report(here, compiler, name):
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb", "--report", name]) == 0
    assert left_behind(here) == {"m.vmfb", name}
    text = (here / name).read_text()
    if name.endswith("json"):
        assert json.loads(text)["summary"] == {"fused": 1, "unfused": 0, "dispatches": 3}
    else:
        assert text.startswith("<!doctype html>")


def test_explain_prints_the_table_on_stdout(here, compiler, capsys):
    compiler.sites = (FUSED, UNFUSED)
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 sites fused" in out and "its input is not a norm" in out
    assert max(map(len, out.splitlines())) <= 100


def test_parameters_and_dumps(here, compiler):
    arguments = ["--parameters", "w.irpa", "--dump-kernels", "a/kernels", "--dump-phases-to", "ir"]
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb", *arguments]) == 0
    assert left_behind(here) == {"m.vmfb", "w.irpa", "a", "ir"}
    assert (here / "w.irpa").read_bytes() == b"weights"
    assert (here / "a" / "kernels" / "kernels.json").is_file()


def test_output_permissions_follow_the_umask(here, compiler):
    compile_cli.main(["model.py:build", "-o", "m.vmfb"])
    (here / "plain").write_text("")
    assert (here / "m.vmfb").stat().st_mode == (here / "plain").stat().st_mode


def test_an_existing_output_is_replaced_and_a_link_is_followed(here, compiler):
    (here / "real.vmfb").write_text("old")
    (here / "m.vmfb").symlink_to("real.vmfb")
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb"]) == 0
    assert (here / "m.vmfb").is_symlink()
    assert (here / "real.vmfb").read_bytes() == b"program"


# Exit codes 1, 3 and 4 --------------------------------------------------------------------------


def test_a_model_that_cannot_be_compiled_leaves_nothing(here, compiler, capsys):
    compiler.error = CompileError("model.py:7: aten.foo cannot be lowered")
    message = fails(
        capsys, 1, "model.py:build", "-o", "m.vmfb", "--parameters", "w.irpa", "--report", "r.json"
    )
    assert message == "compile-to-vmfb: error: model.py:7: aten.foo cannot be lowered"
    assert left_behind(here) == set()


def test_an_unexpected_exception_is_a_bug_and_not_a_traceback(here, compiler, capsys):
    compiler.error = IndexError("list index out of range")
    message = fails(capsys, 1, "model.py:build", "-o", "m.vmfb")
    assert "bug" in message and "IndexError: list index out of range" in message


def test_failure_keeps_the_previous_output(here, compiler, capsys):
    (here / "m.vmfb").write_text("before")
    compiler.error = CompileError("no")
    fails(capsys, 1, "model.py:build", "-o", "m.vmfb")
    assert (here / "m.vmfb").read_text() == "before"


def test_require_fused_writes_the_report_and_no_program(here, compiler, capsys):
    compiler.sites = (FUSED, UNFUSED)
    message = fails(
        capsys,
        3,
        "model.py:build",
        "-o",
        "m.vmfb",
        "--require-fused",
        "--report",
        "r.json",
        "--parameters",
        "w.irpa",
    )
    assert "1 of 2 sites" in message and "group_quant at model.py:9: its input is not a norm" in message
    assert left_behind(here) == {"r.json"}


def test_require_fused_is_content_when_everything_fused(here, compiler):
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb", "--require-fused"]) == 0


def test_verify_accepts_the_same_result(here, compiler, capsys):
    compiler.program = lambda x: x * 2
    assert compile_cli.main(["model.py:build", "-o", "m.vmfb", "--verify"]) == 0
    assert "1 outputs agree (1 bit for bit" in capsys.readouterr().err


def test_verify_refuses_another_result_and_writes_no_program(here, compiler, capsys):
    compiler.program = lambda x: x * 2 + torch.eye(2, 8)
    message = fails(capsys, 4, "model.py:build", "-o", "m.vmfb", "--verify", "--report", "r.json")
    assert "output 0: relative error 5.0e-01" in message
    assert left_behind(here) == {"r.json"}


def test_verify_without_the_device_is_a_usage_error_before_compiling(here, compiler, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    message = fails(capsys, 2, "model.py:build", "-o", "m.vmfb", "--verify", "--target", "b200")
    assert "this machine has no NVIDIA GPU" in message
    assert compiler.calls == []


# Usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent.py:build", ["absent.py: no such file"]),
        ("absent.pt2", ["absent.pt2: no such file"]),
        ("absent.mlir", ["absent.mlir: no such file"]),
        ("absent_package.models:build", ["no module named 'absent_package'"]),
        ("json.absent:build", ["no module named 'json.absent'"]),
        ("json:absent", ["json has no 'absent'", "loads"]),
        ("model.py", ["needs the name of a callable", "model.py:build", "dynamic"]),
        ("model", ["'model' is not a source", "file.py:callable"]),
        ("model.py:", ["names no callable"]),
        (":build", ["names no callable"]),
        ("model.py:missing", ["has no 'missing'", "it defines Double, build"]),
        ("model.py:number", ["is an int, not a callable"]),
        ("model.py:bare", ["returned a Double", "expected (module, args)"]),
        ("model.py:tensor", ["bare tensor", "(module, (x,))"]),
        ("model.py:four", ["an int as dynamic_shapes"]),
        ("model.py:wrong_names", ["a list as kwargs", "a dict of arguments by name"]),
        ("model.py:nothing", ["returned None", "expected (module, args)"]),
        ("model.py:raises", ["ZeroDivisionError: division by zero", "(model.py:33)"]),
        ("model.py:leaves", ["SystemExit: bye"]),
        ("model.py:needs", ["TypeError", "argument"]),
        ("model.py:wrong_shapes", ["an int as dynamic_shapes"]),
    ],
)
def test_a_wrong_source_is_explained(here, compiler, capsys, source, words):
    message = fails(capsys, 2, source, "-o", "m.vmfb")
    assert all(word in message for word in words), message
    assert left_behind(here) == set()
    assert compiler.calls == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\n\nimport no_such_thing\n", ["ModuleNotFoundError", "no_such_thing", "broken.py:3"]),
        ("def build(:\n", ["SyntaxError", "broken.py:1"]),
        ("\n\nraise SystemExit(3)\n", ["SystemExit: 3", "broken.py:3"]),
    ],
)
def test_a_source_that_does_not_import_shows_its_error_and_line(here, compiler, capsys, text, words):
    (here / "broken.py").write_text(text)
    message = fails(capsys, 2, "broken.py:build", "-o", "m.vmfb")
    assert "does not import" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "h300"], ["unknown target 'h300'", "gfx950"]),
        (["--report", "r.txt"], [".json or .html"]),
        (["--report", "m.vmfb/r.json"], ["cannot write"]),
        (["--parameters", "m.vmfb"], ["the same path"]),
        (["--parameters", "absent/w.irpa"], ["the directory absent does not exist"]),
        (["--dump-kernels", "model.py"], ["cannot write model.py"]),
        (["-o", "absent/m.vmfb"], ["the directory absent does not exist"]),
        (["-o", "."], ["is a directory"]),
        (["-o", "/dev/null"], ["not a regular file"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_wrong_option_is_found_before_the_model_is_imported(here, compiler, capsys, arguments, words):
    (here / "model.py").write_text("raise AssertionError('imported')")
    message = fails(capsys, 2, "model.py:build", "-o", "m.vmfb", *arguments)
    assert all(word in message for word in words), message
    assert left_behind(here) == set()


def test_mlir_has_no_eager_model_to_verify_with(here, compiler, capsys):
    (here / "m.mlir").write_text("module {}")
    assert "an MLIR source has none" in fails(capsys, 2, "m.mlir", "-o", "m.vmfb", "--verify")


def test_help_is_quick_and_shows_every_option(here):
    command = Path(sys.executable).with_name("compile-to-vmfb")
    if not command.exists():
        pytest.skip("not installed")
    # The script is run by this interpreter so that it says what it imports.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(command), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for option in ("--target", "--parameters", "--report", "--explain", "--require-fused", "--verify"):
        assert option in done.stdout
    assert "--dump-kernels" in done.stdout and "--dump-phases-to" in done.stdout
    assert "exit codes" in done.stdout and "examples" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "rich", "iree"}


# Sources that are right -------------------------------------------------------------------------


def test_exported_programs_bring_their_own_arguments(here):
    exported = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    torch.export.save(exported, "m.pt2")
    model = resolve("m.pt2")
    assert isinstance(model, Model)
    assert [tuple(a.shape) for a in model.args] == [(2, 4)]
    assert model.eager()(*model.args).shape == (2, 4)
    exported = torch.export.export(torch.nn.Linear(4, 4), (), {"input": torch.ones(3, 4)})
    torch.export.save(exported, "named.pt2")
    model = resolve("named.pt2")
    assert isinstance(model, Model) and model.args == ()
    assert model.eager()(**model.kwargs).shape == (3, 4)


def test_a_file_that_is_no_exported_program(here):
    (here / "m.pt2").write_bytes(b"not a zip")
    with pytest.raises(UsageError, match=r"m\.pt2 is not a program torch\.export\.save wrote"):
        resolve("m.pt2")


def test_mlir_from_standard_input(here):
    with (here / "m.mlir").open("w+") as stdin:
        stdin.write("module {}")
        stdin.seek(0)
        assert resolve("-", stdin) == MlirText("module {}")
        with pytest.raises(UsageError, match="standard input is empty"):
            resolve("-", stdin)
    (here / "bytes").write_bytes(b"ML\xefR")
    for errors in ("strict", "surrogateescape"):
        no_text = pytest.raises(UsageError, match="standard input is not MLIR text")
        with (here / "bytes").open(encoding="utf-8", errors=errors) as stdin, no_text:
            resolve("-", stdin)


def test_a_module_of_the_current_directory(here, monkeypatch):
    (here / "zoo").mkdir()
    (here / "zoo" / "__init__.py").write_text("")
    (here / "zoo" / "tiny.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(resolve("zoo.tiny:build"), Model)


def test_a_file_finds_its_neighbours(here, monkeypatch):
    (here / "neighbour_of_model.py").write_text("WIDTH = 8")
    (here / "user.py").write_text("from neighbour_of_model import WIDTH\n" + MODEL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir("/")
    assert isinstance(resolve(f"{here / 'user.py'}:build"), Model)


# The whole way ----------------------------------------------------------------------------------

NORMED = """
import torch
import lowering

class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(256, dtype=torch.bfloat16))

    def forward(self, x):
        y = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        return torch.ops.lowering.group_quant(y, 128)

class Plain(torch.nn.Module):
    def forward(self, x):
        return torch.ops.lowering.group_quant(x * 2, 16)  # no kernel has groups this small

def build():
    torch.manual_seed(0)
    shapes = {"x": {0: torch.export.Dim("t")}}
    return Normed(), (torch.randn(5, 256, dtype=torch.bfloat16),), shapes

def plain():
    return Plain(), (torch.randn(5, 256, dtype=torch.bfloat16),)
"""


# More for IREE to name: a product, a table, a choice.
SORTED = """y = y * torch.arange(256) + torch.softmax(x.float() @ self.weight.float()[:, None], 0)
        return torch.topk(y, 3), torch.ops.lowering.group"""


@pytest.fixture
def normed(tmp_path, monkeypatch) -> Path:
    (tmp_path / "normed.py").write_text(NORMED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_norm_and_its_quantization_end_to_end(normed, capsys):
    arguments = ["--report", "r.json", "--explain", "--require-fused", "--verify", "--dump-kernels", "k"]
    code = compile_cli.main(["normed.py:build", "-o", "m.vmfb", "--parameters", "w.irpa", *arguments])
    assert code == 0, capsys.readouterr().err
    report = json.loads((normed / "r.json").read_text())
    assert report["summary"] == {"fused": 2, "unfused": 0, "dispatches": 1}
    assert {site["op"] for site in report["sites"]} == {"rms_norm", "group_quant"}
    assert len(json.loads((normed / "k" / "kernels.json").read_text())["launches"]) == 1
    assert (normed / "m.vmfb").stat().st_size > 1000


BUILT_TWICE = """
import sys, hashlib
import lowering
from lowering.cli.source import resolve
model = resolve("model.py:build")
for target in sys.argv[1:]:
    compiled = lowering.compile(model.module, model.args, dynamic_shapes=model.dynamic_shapes, target=target)
    for path in (b"/model.py", b"/nn/modules/", sys.path[0].encode()):
        assert path not in compiled.vmfb, (target, path)
    print(target, hashlib.sha256(compiled.vmfb).hexdigest())
"""


@pytest.mark.slow
def test_a_build_is_the_same_bytes_in_another_process_and_directory(tmp_path):
    """With the weights inside, other seeds of hashes, no cache; and no path of this machine is in it."""
    targets, running = ["cpu", "h200", "gfx950"], []
    for seed, name in (("1", "one"), ("2", "other/deeper")):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "model.py").write_text(NORMED.replace("return torch.ops.lowering.group", SORTED))
        (directory / "twice.py").write_text(BUILT_TWICE)
        (directory / "scratch").mkdir()
        changed = {"PYTHONHASHSEED": seed, "TMPDIR": str(directory / "scratch"), "VMFUSE_NO_CACHE": "1"}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "twice.py", *targets]
        environment = {**os.environ, **changed, "PYTHONPATH": path}
        running.append(subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE))
    first, second = (process.communicate()[0].decode() for process in running)
    assert first == second and [line.split()[0] for line in first.splitlines()] == targets


@pytest.mark.slow
def test_a_site_no_kernel_can_take_is_named_with_its_line(normed, capsys):
    message = fails(capsys, 3, "normed.py:plain", "-o", "m.vmfb", "--require-fused")
    assert "group_quant at" in message and "normed.py:" in message
    assert not (normed / "m.vmfb").exists()


@pytest.mark.slow
def test_standard_input_that_is_not_mlir(normed, monkeypatch, capsys):
    (normed / "text").write_text("this is not MLIR")
    with (normed / "text").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        fails(capsys, 1, "-", "-o", "m.vmfb")
