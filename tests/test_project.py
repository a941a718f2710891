"""The project itself: lint, types, layering, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, root: Path) -> str:
    done = run(sys.executable, "-c", code, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Lint and types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(root, command):
    done = run(sys.executable, "-m", "ruff", *command, ".", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types(root):
    done = run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr


# Layering ---------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """The top-level names a file imports, wherever in the file; "." for a relative import."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.module and not node.level else ".")
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("patterns", {"lowering", "tools", "torch"}), ("lowering", {"tools", "tests", "kernels"})],
)
def test_imports_go_one_way(root, package, forbidden):
    wrong = {
        path.relative_to(root).as_posix(): sorted(imported(path) & forbidden)
        for path in (root / package).rglob("*.py")
        if imported(path) & forbidden
    }
    assert wrong == {}


def test_importing_lowering_registers_the_ops_and_imports_neither_compiler_nor_runtime(root):
    code = (
        "import sys, torch, lowering; torch.ops.lowering.rms_norm;"
        "print([n for n in sys.modules if n.split('.')[0] in ('iree', 'torch_mlir', 'transformers')])"
    )
    assert python(code, root).strip() == "[]"


def test_loading_does_not_import_the_compiler(root):
    code = "import sys, lowering; lowering.load; print([n for n in sys.modules if 'iree.compiler' in n])"
    assert python(code, root).strip() == "[]"


def test_every_public_name_exists(root):
    assert python("import lowering; [getattr(lowering, n) for n in lowering.__all__]", root) == ""


# The wheel --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("vmfuse-*.whl")
    return zipfile.ZipFile(built)


def test_wheel_ships_the_kernel_sources_inside_the_package(root, wheel):
    sources = {
        p.relative_to(root / "kernels").as_posix() for p in (root / "kernels").rglob("*") if p.is_file()
    }
    shipped = {n.removeprefix("lowering/_kernels/") for n in wheel.namelist() if "_kernels/" in n}
    assert sources
    assert shipped == sources


def test_wheel_has_two_import_packages_and_no_kernels(wheel):
    top = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert top == {"lowering", "patterns"}
    assert {"lowering/py.typed", "patterns/py.typed"} <= set(wheel.namelist())


def test_wheel_declares_the_commands_and_the_extras(wheel):
    (info,) = {n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "compile-to-vmfb = lowering.cli.compile:main" in scripts
    assert "run-vmfb = lowering.cli.run:main" in scripts
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert {"cuda", "hip", "test"} <= set(metadata.get_all("Provides-Extra") or [])


def test_wheel_carries_the_license(root, wheel):
    (info,) = {n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0 WITH LLVM-exception"
    assert wheel.read(f"{info}/licenses/LICENSE") == (root / "LICENSE").read_bytes()


def test_kernels_holds_device_sources_only(root):
    assert not list((root / "kernels").rglob("*.py"))


# The repository ---------------------------------------------------------------------------------


def test_continuous_integration_runs_what_developers_run(root):
    script = root / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "make test" in script.read_text()


def test_no_file_names_an_absolute_path_of_a_machine(root):
    tracked = run("git", "ls-files", cwd=root)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    # Spelled in two parts so that this file does not contain what it looks for.
    needles = ["/" + "work/", "/" + "root/", "/" + "home/"]
    wrong = [
        name
        for name in tracked.stdout.splitlines()
        if (root / name).suffix in (".py", ".toml", ".txt", ".md", ".c", ".h", ".cu", ".hip", ".mlir", "")
        and (root / name).is_file()
        and any(needle in (root / name).read_text(errors="ignore") for needle in needles)
    ]
    assert wrong == []
