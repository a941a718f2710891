"""The package of docs/extending, installed as anybody's would be, and its own tests run where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path("docs") / "extending" / "vmfuse_layer_norm"


def run(root: Path, *command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_an_operation_with_a_kernel_of_its_own_comes_from_outside(root: Path, tmp_path: Path) -> None:
    """Found, reported, compiled for every target, run on the CPU and in the executor; and what is refused."""
    sources = tmp_path / "sources"  # a build leaves nothing in the repository
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "vmfuse_layer_norm"):
        (sources / name).symlink_to(root / PACKAGE / name)
    installed = tmp_path / "installed"
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(root, "pip", "install", *offline, "--target", installed, sources)
    # Not as part of this project's tests: nothing but the installation makes the package known.
    tests = ("-c", "pyproject.toml", "--rootdir", ".", "-p", "no:cacheprovider", "-p", "no:logging")
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    said = run(
        *(root, "pytest", *tests, "-o", "addopts=", PACKAGE / "tests"), PYTHONPATH=path, LOWERING_VERIFY="1"
    )
    assert " passed" in said and "skipped" not in said
