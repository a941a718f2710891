"""Tell how much of a program's time its kernels are: 64 chained sites in one vmfb, in the IREE runtime.

    python -m tools.bench.program pack gpu/program --target h200     # on a machine with the compiler
    python -m tools.bench.program run gpu/program                    # on one with the GPU

Every site adds the residual, normalises, quantizes, and hands both values on.  The kernels alone are the same
launches in one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lowering

SITES, HIDDEN, GROUP, EPS = 64, 7168, 128, 1e-6
ROWS = (1, 16, 128, 1024)


class Chain(nn.Module):
    """SITES times add, norm and quantization; returns every q and scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        written: list[Tensor] = []
        for _ in range(SITES):
            x, residual = torch.ops.lowering.add_rms_norm(x, residual, self.weight, EPS)
            written += torch.ops.lowering.group_quant(x, GROUP)
        return (*written, x, residual)


def pack(directory: Path, target: str) -> int:
    """Compile the chain; returns the exit code."""
    rows = torch.export.Dim("T")
    example = tuple(torch.randn(16, HIDDEN).bfloat16() for _ in range(2))
    compiled = lowering.compile(
        Chain().eval().requires_grad_(False), example, dynamic_shapes=({0: rows}, {0: rows}), target=target
    )
    directory.mkdir(parents=True, exist_ok=True)
    compiled.save(directory / "chain.vmfb")
    compiled.dump_kernels(directory / "kernels")
    print(compiled.report.summary())
    return 0 if compiled.report.summary()["unfused"] == 0 else 1


def run(directory: Path) -> int:
    """Time the program and its kernels; returns the exit code."""
    from tools.gpu.launch import CudaKernel, read_launches
    from tools.gpu.timing import call_seconds, tensor_sets, time_calls

    program = lowering.load(directory / "chain.vmfb", device="cuda")
    launches = read_launches(directory / "kernels")
    kernel = CudaKernel(launches[0])
    found = []
    for rows in ROWS:
        inputs = [torch.randn(rows, HIDDEN, device="cuda").bfloat16() for _ in range(2)]
        call = call_seconds(lambda inputs=inputs: program(*inputs), 20)
        launch = launches[0].resized(rows)
        sets = tensor_sets(launch)
        alone = len(launches) * time_calls(
            [lambda s=s, one=launch: kernel(one, s) for s in sets], launch.bytes
        )
        found.append(
            {"rows": rows, "sites": len(launches), "program_us": 1e6 * call, "kernels_us": 1e6 * alone}
        )
        times = f"program {1e6 * call:8.0f} us, its kernels {1e6 * alone:8.0f} us, {alone / call:.0%}"
        print(f"{rows:5d} rows: {times}")
    print(json.dumps(found))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "run"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--target", default="h200", help="what to compile for (default: %(default)s)")
    options = parser.parse_args(arguments)
    return pack(options.directory, options.target) if options.what == "pack" else run(options.directory)


if __name__ == "__main__":
    sys.exit(main())
