"""Every kernel family at every size, against everything else that computes the same rows, in one run.

    python -m tools.bench.kernels pack gpu/bench --target h200       # on a machine with the compiler
    python -m tools.bench.kernels run gpu/bench --flashinfer INCLUDE --json OUT.json   # on one with the GPU
    compute-sanitizer --tool memcheck python -m tools.bench.kernels check gpu/bench    # there, or by itself

``pack`` writes the objects that a program for the target embeds, and their kernels.json.  ``run`` checks each
against float64 over poisoned outputs, then times it and its peers (``peers``) as CUDA graphs
(``gpu_timing``).  ``--inductor`` adds torch.compile for some families and sizes, as compiling takes long;
``--warm N`` compiles those in N processes first, whose results are in its cache afterwards.  ``check``
launches every kernel at ragged numbers of rows, aligned and not, and compares with float64.

Exit codes: 0 done, 1 a kernel computed something wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patterns.contracts import RowSpec
from tools.bench.float64_check import problems
from tools.bench.peers import Call, FlashInfer, Step, inductor_calls, ways
from tools.command_line import write_json
from tools.gpu.launch import CudaKernel, Launch, inputs_for, outputs_for, read_launches, row_spec
from tools.gpu.timing import copy_bandwidth, is_cold, tensor_sets, time_calls, time_in_turn
from tools.kernel_families import CHECKED, CHECKED_HIDDEN, FAMILIES, HIDDEN, ROWS

SPECS = "specs.json"
INDUCTOR = ("norm, quant", "add, norm, quant, y")
INDUCTOR_HIDDEN = (1536, 4096, 7168)
INDUCTOR_ROWS = (1, 16, 128, 1024, 4096, 16384)
AUTOTUNED = ((7168, 16384), (7168, 1024), (1536, 16384), (1536, 1024), (4096, 16384))  # hidden, rows
_RAGGED = (1, 3, 5, 17, 67, 133, 701)
Point = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.what == "pack":
        return pack(options.directory, options.target)
    if options.what == "check":
        return check(options.directory, options.hidden)
    if options.worker:
        return compile_share(*map(int, options.worker.split("/")))
    with tempfile.TemporaryDirectory() as cache:
        if options.warm:
            warm(options.warm, Path(cache))
        return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "run", "check"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--target", default="h200", help="what to pack for (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--flashinfer", type=Path, metavar="INCLUDE", help="FlashInfer's headers")
    parser.add_argument("--inductor", action="store_true", help="torch.compile too")
    parser.add_argument("--warm", type=int, metavar="N", help="compile for --inductor in N processes first")
    parser.add_argument("--seconds", type=float, default=math.inf, help="autotune no more after so long")
    parser.add_argument("--hidden", type=int, action="append", help="check only this length (repeatable)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


# Packing ----------------------------------------------------------------------------------------


def every_spec() -> Iterator[RowSpec]:
    """All that is launched: the families, and what the other ways need."""
    for family in FAMILIES.values():
        for hidden in HIDDEN:
            for steps in ways(family(hidden)).values():
                yield from (step.spec for step in steps)
    yield from (family(hidden) for family in CHECKED.values() for hidden in CHECKED_HIDDEN)


def pack(directory: Path, name: str) -> int:
    """Compile every kernel for the target and write the objects, kernels.json and which spec each is of."""
    from lowering.backends.toolchain import compile_kernel
    from lowering.families.row import instance
    from lowering.passes.dispatch import Dispatched
    from lowering.passes.dispatch import Launch as Dispatch
    from lowering.program.dump import dump_kernels
    from lowering.targets import resolve

    packed = Dispatched()
    kernels = [instance(spec, resolve(name)) for spec in dict.fromkeys(every_spec())]
    with ProcessPoolExecutor(2) as pool:
        objects = list(pool.map(compile_kernel, kernels))
    for kernel, data in zip(kernels, objects, strict=True):
        packed.kernels[kernel.entry] = kernel
        packed.objects[kernel.entry] = data
        packed.launches.append(Dispatch(kernel, ROWS[-1]))
    dump_kernels(packed, directory)
    specs = {kernel.entry: kernel.spec.to_dict() for kernel in kernels}
    (directory / SPECS).write_text(json.dumps(specs) + "\n", encoding="utf-8")
    print(f"{directory}: {len(kernels)} kernels")
    return 0


# Running ----------------------------------------------------------------------------------------


class Kernels:
    """The packed kernels, by spec."""

    def __init__(self, directory: Path) -> None:
        specs = json.loads((directory / SPECS).read_text(encoding="utf-8"))
        self._launches = {row_spec(specs[launch.entry]): launch for launch in read_launches(directory)}
        self._loaded: dict[RowSpec, CudaKernel] = {}

    @property
    def specs(self) -> list[RowSpec]:
        return list(self._launches)

    def launch(self, spec: RowSpec, rows: int) -> Launch:
        return self._launches[spec].resized(rows)

    def call(self, steps: Sequence[Step], rows: int, tensors: Mapping[str, Tensor]) -> None:
        """Launch one step after another."""
        for step in steps:
            launch = self.launch(step.spec, rows)
            kernel = self._loaded.get(step.spec) or self._loaded.setdefault(step.spec, CudaKernel(launch))
            names = {
                binding.name: step.renamed.get(binding.name, binding.name) for binding in launch.bindings
            }
            kernel(launch, {binding: tensors[name] for binding, name in names.items()})


def check(directory: Path, hidden: Sequence[int] | None) -> int:
    """Launch everything (of some lengths) at ragged numbers of rows; returns the exit code."""
    kernels = Kernels(directory)
    specs = [spec for spec in kernels.specs if not hidden or spec.hidden in hidden]
    wrong = launches = 0
    for spec in specs:
        for rows, shift in itertools.product(_RAGGED, (0, 1)):
            launch = kernels.launch(spec, rows)
            tensors = _shifted(launch, shift)
            kernels.call([Step(spec)], rows, tensors)
            launches += 1
            if found := problems(spec, tensors):
                wrong += 1
                print(
                    f"WRONG {launch.entry}, {rows} rows, {shift} elements off: {'; '.join(found)}", flush=True
                )
    print(f"{len(specs)} kernels, {launches} launches, {wrong} wrong")
    return 1 if wrong else 0


def _shifted(launch: Launch, shift: int) -> dict[str, Tensor]:
    """Inputs and poisoned outputs that start ``shift`` elements off an aligned address."""
    device = torch.device("cuda")
    moved = {}
    for name, tensor in {**inputs_for(launch, device), **outputs_for(launch, device)}.items():
        storage = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
        moved[name] = storage[shift:].view(tensor.shape)
        moved[name].copy_(tensor)
    return moved


def run(options: argparse.Namespace) -> int:
    """Time every point; returns the exit code."""
    start = time.perf_counter()
    kernels = Kernels(options.directory)
    flashinfer = FlashInfer(options.flashinfer) if options.flashinfer else None
    bandwidth = copy_bandwidth()
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bandwidth": bandwidth}
    points: list[Point] = []
    print(f"{found}", flush=True)
    for name, family in FAMILIES.items():
        for hidden in HIDDEN:
            for rows in ROWS:
                point = time_point(kernels, flashinfer, name, family(hidden), rows, bandwidth)
                points.append(point)
                print(line(point), flush=True)
    write_json(options.json, {**found, "points": points})
    if options.inductor:  # which may take longer than there is time
        time_inductor(points, lambda: time.perf_counter() - start < options.seconds)
        write_json(options.json, {**found, "points": points})
    print("\n".join(summary(points)))
    return 1 if any(point["problems"] for point in points) else 0


def time_point(
    kernels: Kernels, flashinfer: FlashInfer | None, name: str, spec: RowSpec, rows: int, bandwidth: float
) -> Point:
    """Check one family at one size, and time the fused kernel, its peers and a copy of as many bytes."""
    launch = kernels.launch(spec, rows)
    sets = tensor_sets(launch)
    found = ways(spec)
    kernels.call(found["fused"], rows, sets[0])
    wrong = problems(spec, sets[0])
    if any("y" in step.renamed.values() for steps in found.values() for step in steps) and "y" not in sets[0]:
        for tensors in sets:
            tensors["y"] = torch.empty(rows, spec.hidden, dtype=getattr(torch, spec.dtype), device="cuda")
    calls: dict[str, Sequence[Call]] = {
        way: [lambda each=each, steps=steps: kernels.call(steps, rows, each) for each in sets]
        for way, steps in found.items()
    }
    if flashinfer and (peer := flashinfer.calls(spec, sets)):
        calls["flashinfer"] = peer
    calls["copy"] = _copies(launch.bytes, len(sets))
    for each in calls.values():
        each[0]()  # warm: modules are loaded at the first launch
    times = zip(calls, time_in_turn(list(calls.values()), launch.bytes), strict=True)
    return {
        "family": name,
        "hidden": spec.hidden,
        "rows": rows,
        "bytes": launch.bytes,
        "cold": is_cold(launch),
        "floor": 1e6 * launch.bytes / bandwidth,
        "times": {way: 1e6 * seconds for way, seconds in times},
        "problems": wrong,
    }


def _copies(moved: int, sets: int) -> list[Call]:
    """Elementwise kernels of PyTorch that read and write ``moved`` bytes altogether."""
    words = max(1, moved // 8)
    source = [torch.randint(1 << 30, (words,), dtype=torch.int32, device="cuda") for _ in range(sets)]
    target = [torch.empty_like(each) for each in source]
    return [lambda i=i: torch.bitwise_not(source[i], out=target[i]) for i in range(sets)]


# torch.compile ----------------------------------------------------------------------------------


def _inductor_points() -> list[tuple[str, str, str, int, int]]:
    """(what the time is called, mode, family, hidden, rows) of everything tried, in order."""
    sizes = [(hidden, rows) for hidden in INDUCTOR_HIDDEN for rows in INDUCTOR_ROWS]
    every = [("inductor", "default", name, *size) for name in INDUCTOR for size in sizes]
    mode = "max-autotune-no-cudagraphs"
    return every + [("inductor tuned", mode, name, *size) for size in AUTOTUNED for name in INDUCTOR]


def warm(count: int, cache: Path) -> None:
    """Compile every point in ``count`` processes, into torch's ``cache`` of this one.

    Which of several kernels is fastest they cannot tell beside each other: that is left to this process.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    command = [sys.executable, __file__, "run", "-", "--worker"]
    for process in [subprocess.Popen([*command, f"{index}/{count}"]) for index in range(count)]:
        process.wait()
    for choice in cache.rglob("*.best_config"):
        choice.unlink()


def compile_share(index: int, count: int) -> int:
    """Compile every ``count``-th point, for the cache."""
    for _, mode, name, hidden, rows in _inductor_points()[index::count]:
        spec = FAMILIES[name](hidden)
        inductor_calls(spec, [_inputs(spec, rows)], mode)
    return 0


def _inputs(spec: RowSpec, rows: int) -> dict[str, Tensor]:
    made = {"x": torch.randn(rows, spec.hidden, device="cuda").bfloat16()}
    made["weight"] = torch.rand(spec.hidden, device="cuda").bfloat16()
    if spec.norm and spec.norm.residual:
        made["residual"] = torch.randn(rows, spec.hidden, device="cuda").bfloat16()
    return made


def time_inductor(points: Sequence[Point], time_left: Any) -> None:
    """Add torch.compile's times to the points it is tried at."""
    by_size = {(point["family"], point["hidden"], point["rows"]): point for point in points}
    for label, mode, name, hidden, rows in _inductor_points():
        if mode != "default" and not time_left():
            return
        point, spec = by_size[name, hidden, rows], FAMILIES[name](hidden)
        count = max(3, -(-(400 << 20) // point["bytes"])) if point["cold"] else 2
        calls = inductor_calls(spec, [_inputs(spec, rows) for _ in range(count)], mode)
        point["times"][label] = 1e6 * time_calls(calls, point["bytes"])
        print(line(point), flush=True)


# Reporting --------------------------------------------------------------------------------------


def line(point: Point) -> str:
    """One point in one line: time, share of the copy bandwidth, and how many times longer each peer takes."""
    times = point["times"]
    fused = times["fused"]
    peers = "  ".join(f"{way} {time_ / fused:.2f}x" for way, time_ in times.items() if way != "fused")
    where = f"{point['family']:24s} {point['rows']:6d} x {point['hidden']:<6d}"
    share = f"{100 * point['floor'] / fused:5.1f}%{' ' if point['cold'] else '*'}"
    return f"{where} {fused:8.2f} us {share} {peers}  {'; '.join(point['problems'])}"


def summary(points: Sequence[Point]) -> Iterator[str]:
    """Geometric means of each peer's time over ours, and where a peer is faster."""
    yield "* in the L2.  Geometric means over ours, of the sizes each was tried at:"
    for way in sorted({way for point in points for way in point["times"]} - {"fused"}):
        ratios = [point["times"][way] / point["times"]["fused"] for point in points if way in point["times"]]
        behind = sum(ratio < 1 for ratio in ratios)
        yield f"  {way:16s} {statistics.geometric_mean(ratios):.2f}x of {len(ratios)}, faster at {behind}"
    wrong = [point for point in points if point["problems"]]
    yield f"{len(points)} sizes, {len(wrong)} wrong"


if __name__ == "__main__":
    sys.exit(main())
