"""Compiles the cases of ``gpu_cases`` for a machine that has a GPU and no compiler.

    python -m tools.gpu.pack gpu --target h200 --wheel 3.12
    python -m tools.gpu.pack build/cpu-cases --target cpu        # the same, to be run right here

DIR gets for every case the vmfb, its weights (.irpa where they are kept apart, and .safetensors for the
eager model), the kernel objects with kernels.json, and one manifest.json.  The other machine needs this
repository, DIR, PyTorch and the iree-base-runtime wheel; then it runs ``tools/gpu/run.py DIR``.

--wheel PYTHON puts that wheel into DIR/wheels, through pip as it is configured here:

    pip download --no-deps --only-binary=:all: --python-version PYTHON --implementation cp \\
        --platform manylinux_2_28_x86_64 -d DIR/wheels iree-base-runtime==VERSION

Exit codes: 0 packed and every case fused as it should, 1 a case did not, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tools.gpu.cases import CASES, Case, Manifest, Packed, build, case_named, load_weights, save_weights

import lowering
from lowering.errors import LoweringError
from lowering.targets import Target, resolve

RUNTIME = "iree-base-runtime"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own
    try:
        target = resolve(options.target)
        cases = [case_named(name) for name in options.case] or list(CASES)
        options.directory.mkdir(parents=True, exist_ok=True)
        packed = [pack(case, target, options.directory) for case in cases]
    except (LoweringError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    Manifest(target.name, target.backend, target.arch, versions(), tuple(packed)).save(options.directory)
    if options.wheel and not download_runtime(options.directory / "wheels", options.wheel):
        return 1
    size = sum(file.stat().st_size for file in options.directory.rglob("*") if file.is_file())
    print(f"{options.directory}: {len(packed)} cases for {target.name}, {size / 2**20:.1f} MiB")
    return 0 if all(fused_as_expected(case, done) for case, done in zip(cases, packed, strict=True)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where everything is written")
    parser.add_argument("--target", default="h200", help="what to compile for (default: %(default)s)")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="only this case (repeatable)"
    )
    parser.add_argument(
        "--wheel", metavar="PYTHON", help=f"add the {RUNTIME} wheel for this Python, e.g. 3.12"
    )
    return parser


def pack(case: Case, target: Target, directory: Path) -> Packed:
    """Compile one case into ``directory``."""
    start = time.perf_counter()
    weights, kernels = f"{case.name}.safetensors", f"kernels/{case.name}"
    model = build(case)
    save_weights(model, directory / weights)
    load_weights(model, directory / weights)
    parameters = f"{case.name}.irpa" if case.separate else None
    compiled = lowering.compile(
        model,
        case.inputs(case.example_rows, 0, torch.device("cpu")),
        dynamic_shapes=case.dynamic_shapes(),
        target=target.name,
        parameters=directory / parameters if parameters else None,
    )
    compiled.save(directory / f"{case.name}.vmfb")
    compiled.dump_kernels(directory / kernels)
    summary = compiled.report.summary()
    print(f"{case.name}: {summary}, {time.perf_counter() - start:.1f} s")
    return Packed(
        name=case.name,
        vmfb=f"{case.name}.vmfb",
        weights=weights,
        kernels=kernels,
        specs={entry: kernel.spec.to_dict() for entry, kernel in compiled.dispatched.kernels.items()},
        report=summary,
        example_rows=case.example_rows,
        parameters=parameters,
    )


def fused_as_expected(case: Case, packed: Packed) -> bool:
    """Tell whether every site fused, and the model became as many kernels as it should."""
    if packed.report["unfused"] == 0 and case.kernels in (None, packed.report["dispatches"]):
        return True
    print(f"{case.name} did not fuse as it should: {packed.report}", file=sys.stderr)
    return False


def versions() -> dict[str, str]:
    """Give what the cases were made with."""
    names = ("torch", "transformers", "iree-base-compiler", RUNTIME)
    return {name: importlib.metadata.version(name) for name in names}


def download_runtime(directory: Path, python: str) -> bool:
    """Fetch the runtime wheel of the version installed here for ``python`` on x86-64 Linux."""
    package = f"{RUNTIME}=={importlib.metadata.version(RUNTIME)}"
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, *platforms, "-d", str(directory)]
    done = subprocess.run([*command, package], check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
