"""The IR tests: every ``tests/ir/*.mlir`` is a case, its RUN line says how, its CHECK lines what.

``lit tests/ir`` runs the same files; here the RUN lines run inside the test process, because each
process of its own would spend two seconds importing torch.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from filecheck.matcher import Matcher
from filecheck.options import parse_argv_options

from tools import opt

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "ir").glob("*.mlir"))


def run_lines(path: Path) -> list[tuple[list[str], list[str]]]:
    """The arguments of opt.py and of filecheck on each RUN line of ``path``."""
    commands = []
    for line in re.findall(r"^// RUN: (.+)$", path.read_text(), flags=re.MULTILINE):
        producer, checker = (shlex.split(command.replace("%s", str(path))) for command in line.split("|"))
        assert (producer[0], checker[0]) == ("%opt", "%filecheck"), f"{path.name}: cannot run {line!r}"
        commands.append((producer[1:], checker[1:]))
    return commands


def check(output: str, arguments: list[str], scratch: Path) -> int:
    """filecheck's exit code for ``output``; what it has to say goes to stderr."""
    printed = scratch / "output.mlir"
    printed.write_text(output)
    return Matcher.from_opts(
        parse_argv_options(["filecheck", *arguments, "--input-file", str(printed)])
    ).run()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ir(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = run_lines(path)
    assert commands, f"{path.name} has no RUN line"
    for arguments, checks in commands:
        code = opt.main(arguments)
        output = capsys.readouterr()
        assert code == 0, output.err
        assert check(output.out, checks, tmp_path) == 0, capsys.readouterr().err


def test_a_check_that_does_not_hold_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "case.mlir"
    case.write_text("// CHECK: torch.aten.relu\nfunc.func @main() {\n  return\n}\n")
    assert opt.main([str(case)]) == 0
    assert check(capsys.readouterr().out, [str(case)], tmp_path) != 0


def test_the_files_also_run_under_lit() -> None:
    """One of them: that is enough to know that tests/ir/lit.cfg.py still fits opt.py and the RUN lines."""
    lit = Path(sysconfig.get_path("scripts")) / "lit"
    command = [lit, "-v", "--filter", "normalize_parameters", ROOT / "tests" / "ir"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Passed *: *1 ", result.stdout), result.stdout


def test_opt_reads_standard_input_and_reports() -> None:
    text = (ROOT / "tests" / "ir" / "raise_lowering_rms_norm.mlir").read_text()
    command = [sys.executable, "-m", "tools.opt", "--steps", "raise", "--report"]
    result = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=True)
    assert "vmfuse.norm" in result.stdout
    assert "// site 0: rms_norm at line" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "raise,polish"], 2, "unknown step 'polish'; the steps are normalize, raise"),
        (["--target", "abacus", str(FILES[0])], 2, "unknown target 'abacus'"),
        (["no/such/file.mlir"], 1, "no/such/file.mlir"),
    ],
)
def test_opt_says_what_was_wrong(arguments: list[str], code: int, message: str, capsys) -> None:
    try:
        assert opt.main(arguments) == code
    except SystemExit as stopped:
        assert stopped.code == code
    assert message in capsys.readouterr().err
