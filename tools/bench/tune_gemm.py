"""Measures how products are best divided among the multiprocessors of a GPU, and writes what was found.

    python -m tools.bench.tune_gemm pack DIR --target h200    # where the compiler is; no GPU needed
    python -m tools.bench.tune_gemm run DIR --json FILE       # where the GPU is

For every size of weights of tools/bench/gemm_gpu.py and every number of rows each plan that makes sense is
timed.  The best go to FILE, which belongs into lowering/families/tuning/, as sm_90_products.json for an H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import torch

from lowering.backends.toolchain import compile_kernel
from lowering.families.instance import KernelInstance
from lowering.families.matmul.cuda import ANY_ROWS, AT_ONCE, TOKENS, Plan
from lowering.targets import Target, resolve
from tools.bench.gemm_gpu import SHAPES, kernel_of, operand_sets
from tools.gpu.launch import CudaKernel, launch_of
from tools.gpu.timing import time_calls

ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_BLOCK = 128
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


def clusters(columns: int, target: Target) -> list[int]:
    """Sizes of clusters that may be best: small, or such that each tile of columns has one that splits K."""
    tiles, at_once = -(-columns // _BLOCK), AT_ONCE[target.name]
    return [size for size in (1, 2, 4, 8) if size <= 2 or tiles * size <= at_once[size]]


def candidates(columns: int, depth: int, rows: int, cluster: int, target: Target) -> Iterator[Plan]:
    """Give what makes sense for so many rows, but for ``Plan.rows``."""
    sizes, tiles = TOKENS[target.name], -(-columns // _BLOCK)
    fitting = next((tokens for tokens in sizes if tokens >= rows), sizes[-1])
    for tokens in {fitting, fitting // 2} & set(sizes):
        units = tiles * -(-rows // tokens)
        splits = (split for split in (2, 4, 8) if split <= cluster and split * _BLOCK <= depth)
        yield Plan(ANY_ROWS, tokens)
        yield from (Plan(ANY_ROWS, tokens, s) for s in splits if s * units <= AT_ONCE[target.name][cluster])
        yield from (Plan(ANY_ROWS, tokens, 1, s) for s in (2, 4) if s <= cluster and s * tokens <= rows)


def kernels(columns: int, depth: int, rows: int, cluster: int, name: str) -> dict[Plan, KernelInstance]:
    """Each candidate's kernel; a plan for no rows makes its cluster as large as that."""
    return {
        plan: kernel_of(columns, depth, name, (Plan(0, plan.tokens, cluster), plan))
        for plan in candidates(columns, depth, rows, cluster, resolve(name))
    }


def pack(options: argparse.Namespace) -> int:
    """Compile every candidate."""
    options.directory.mkdir(parents=True, exist_ok=True)
    for columns, depth in SHAPES:
        for cluster, rows in itertools.product(clusters(columns, resolve(options.target)), ROWS):
            for kernel in kernels(columns, depth, rows, cluster, options.target).values():
                (options.directory / f"{kernel.entry}.cubin").write_bytes(compile_kernel(kernel))
    return 0


def run(options: argparse.Namespace) -> int:
    """Time every candidate; write the best."""
    products = []
    for columns, depth in SHAPES:
        sizes = clusters(columns, resolve(options.target))
        plans = best_of([choose(measure(options, columns, depth, cluster)) for cluster in sizes])
        print(f"{columns} x {depth}: {[astuple(plan) for plan in plans]}", flush=True)
        products.append({"columns": columns, "depth": depth, "plans": [astuple(plan) for plan in plans]})
    if options.json:
        lines = ",\n  ".join(json.dumps(product) for product in products)
        gpu = json.dumps(torch.cuda.get_device_name())
        options.json.write_text(f'{{"gpu": {gpu}, "products": [\n  {lines}\n]}}\n', encoding="utf-8")
    return 0


def best_of(chosen: Sequence[tuple[list[Plan], float]]) -> list[Plan]:
    """The plans of least cost."""
    return min(chosen, key=lambda each: each[1])[0]


def choose(measured: Sequence[dict[Plan, float]]) -> tuple[list[Plan], float]:
    """The best plan of each number of rows, and what all cost: the sum of the logarithms of their times.

    The plan of fewer rows goes on where no other is clearly faster.
    """
    chosen: list[Plan] = []
    for rows, times in zip(ROWS, measured, strict=True):
        best = min(times, key=lambda plan: times[plan])
        before = replace(chosen[-1], rows=ANY_ROWS) if chosen else best
        if times.get(before, math.inf) <= _CLEARLY * times[best]:
            best, chosen = before, chosen[:-1]
        chosen.append(replace(best, rows=rows))
    cost = sum(math.log(min(times.values())) for times in measured)
    return [*chosen[:-1], replace(chosen[-1], rows=ANY_ROWS)], cost


def measure(options: argparse.Namespace, columns: int, depth: int, cluster: int) -> list[dict[Plan, float]]:
    """Microseconds of each candidate, for each of ROWS."""
    measured = []
    for rows in ROWS:
        times, sets = {}, None
        for plan, kernel in kernels(columns, depth, rows, cluster, options.target).items():
            launch = launch_of(kernel, options.directory / f"{kernel.entry}.cubin", rows)
            sets = sets or operand_sets(launch, kernel)
            call = CudaKernel(launch)
            calls = [lambda each=each, call=call, launch=launch: call(launch, each.tensors) for each in sets]
            times[plan] = 1e6 * time_calls(calls, launch.bytes)
        listed = sorted((round(time, 2), astuple(plan)[1:]) for plan, time in times.items())
        print(f"{columns} x {depth}, clusters of {cluster}, {rows} rows: {listed}", flush=True)
        measured.append(times)
    return measured


if __name__ == "__main__":
    sys.exit(main())
