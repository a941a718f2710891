"""Measures how products are best divided among the multiprocessors of a GPU, and writes what was found.

    python tools/tune_gemm.py pack DIR --target h200    # where the compiler is; no GPU needed
    python tools/tune_gemm.py run DIR --json FILE       # where the GPU is

For every size of weights of tools/bench_gemm_gpu.py and every number of rows each plan that makes sense is
timed.  The best go to FILE, which belongs into lowering/tuning/, as sm_90_products.json for an H200.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_gemm_gpu import SHAPES, kernel_of, operand_sets
from gpu_timing import time_calls
from kernel_launch import CudaKernel, launch_of

from lowering.matmul_cuda import ANY_ROWS, TOKENS, Plan
from lowering.toolchain import compile_kernel

ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TEAMS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4))  # split, share
_BLOCK = 128
_MOST_WORKGROUPS = 264  # of units that split K: two for each multiprocessor
_CLEARLY = 1.02  # times as fast: below that the plan of fewer rows goes on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("pack", "run"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--target", default="h200", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the plans are written")
    options = parser.parse_args(arguments)
    return pack(options) if options.command == "pack" else run(options)


def candidates(columns: int, depth: int, rows: int) -> Iterator[Plan]:
    """What makes sense for so many rows, but for ``Plan.rows``."""
    fitting = next((tokens for tokens in TOKENS if tokens >= rows), TOKENS[-1])
    for tokens in (fitting, fitting // 2):
        units = -(-columns // _BLOCK) * -(-rows // tokens)
        for split, share in TEAMS:
            fills = split == 1 or (units * split <= _MOST_WORKGROUPS and split * _BLOCK <= depth)
            if tokens in TOKENS and fills and (share - 1) * tokens < rows:
                yield Plan(ANY_ROWS, tokens, split, share)


def pack(options: argparse.Namespace) -> int:
    """Compile every candidate."""
    options.directory.mkdir(parents=True, exist_ok=True)
    for columns, depth in SHAPES:
        for plan in dict.fromkeys(plan for rows in ROWS for plan in candidates(columns, depth, rows)):
            kernel = kernel_of(columns, depth, options.target, (plan,))
            (options.directory / f"{kernel.entry}.cubin").write_bytes(compile_kernel(kernel))
    return 0


def run(options: argparse.Namespace) -> int:
    """Time every candidate; write the best."""
    products = []
    for columns, depth in SHAPES:
        chosen: list[Plan] = []
        for rows in ROWS:
            times = measure(options, columns, depth, rows)
            best = min(times, key=lambda plan: times[plan])
            if (
                chosen
                and times.get(same := replace(chosen[-1], rows=ANY_ROWS), 1e9) <= _CLEARLY * times[best]
            ):
                best = same
                chosen.pop()
            chosen.append(replace(best, rows=rows))
            listed = sorted((round(time, 2), astuple(plan)[1:]) for plan, time in times.items())
            print(f"{columns} x {depth}, {rows} rows: {listed}", flush=True)
        chosen[-1] = replace(chosen[-1], rows=ANY_ROWS)
        products.append({"columns": columns, "depth": depth, "plans": [astuple(plan) for plan in chosen]})
    if options.json:
        lines = ",\n  ".join(json.dumps(product) for product in products)
        gpu = json.dumps(torch.cuda.get_device_name())
        options.json.write_text(f'{{"gpu": {gpu}, "products": [\n  {lines}\n]}}\n', encoding="utf-8")
    return 0


def measure(options: argparse.Namespace, columns: int, depth: int, rows: int) -> dict[Plan, float]:
    """Microseconds of each candidate."""
    times, sets = {}, None
    for plan in candidates(columns, depth, rows):
        kernel = kernel_of(columns, depth, options.target, (plan,))
        launch = launch_of(kernel, options.directory / f"{kernel.entry}.cubin", rows)
        sets = sets or operand_sets(launch, kernel)
        call = CudaKernel(launch)
        calls = [lambda each=each, call=call, launch=launch: call(launch, each.tensors) for each in sets]
        times[plan] = 1e6 * time_calls(calls, launch.bytes)
    return times


if __name__ == "__main__":
    sys.exit(main())
