"""The fused CPU kernel beside torch.compile and eager PyTorch: RMSNorm + group quantization of one tensor.

    python -m tools.bench.cpu
    python -m tools.bench.cpu --shape 1,64,7168 --threads 1

Everything runs in one process on the same tensors: the program (vmfb through the IREE runtime, its
results returned as torch tensors), the kernel object called directly from as many threads, torch.compile of
the same operations, and eager.  Results are compared before anything is timed.  The contenders take turns,
so that a busy moment of the machine meets all of them; the first calls of a turn are not counted, because the
threads of the one before (OpenMP's) still spin for a while.  Medians over all calls are printed.

torch.compile keeps the normed value in float32 where eager and the kernel round it to the model's dtype, so
its results are only held to one fp8 step and one bfloat16 step of the scale.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowering
from patterns.contracts import RowSpec
from tools.command_line import numbers, write_json
from tools.gpu.compare import BF16_STEP, compare, steps
from tools.gpu.launch import CpuKernel, Launch, outputs_for, read_launches, reference

GROUP, EPS = 128, 1e-6
_TURN = 0.05  # seconds of a turn that are counted
_SETTLE = 0.01  # seconds before them

Contender = Callable[[], Any]


class NormQuant(torch.nn.Module):
    """RMSNorm and the group quantization of its result."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter((1.0 + 0.25 * torch.randn(hidden)).to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.lowering.rms_norm(x, self.weight, EPS)
        return torch.ops.lowering.group_quant(y, GROUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    iree_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        contenders, results = prepare(options.shape, getattr(torch, options.dtype), options.threads)
        problems = check(results)
        print("\n".join(problems) or "results agree")
        if problems:
            return 1
        times = measure(contenders, options.rounds)
    show(times, options)
    write_json(options.json, times)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=numbers, default=(4, 512, 1024), help="default: 4,512,1024")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, default=2, help="for torch and IREE (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time to FILE")
    return parser


def iree_threads(threads: int) -> None:
    """As many IREE workers as torch has threads; before the first program is loaded."""
    import iree.runtime

    iree.runtime.flags.parse_flags(f"--task_topology_group_count={threads}")


# What is compared -------------------------------------------------------------------------------


def prepare(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> tuple[dict[str, Contender], dict[str, Sequence[Tensor]]]:
    """Every contender by name, and what each returned once."""
    x = torch.randn(shape).to(dtype)
    model = NormQuant(shape[-1], dtype)
    rows = torch.export.Dim("T", max=1 << 20)
    compiled = lowering.compile(model, (x,), dynamic_shapes=({len(shape) - 2: rows},), target="cpu")
    program = lowering.load(compiled.vmfb)
    (kernel,) = compiled.dispatched.kernels.values()
    with tempfile.TemporaryDirectory() as directory:
        compiled.dump_kernels(directory)
        (launch,) = read_launches(Path(directory))
        direct = Direct(launch, {"x": x, "weight": model.weight}, threads)
    assert isinstance(kernel.spec, RowSpec)
    inductor = inductor_of(kernel.spec, model, x)
    contenders: dict[str, Contender] = {
        "vmfb": lambda: program(x),
        "kernel alone": direct,
        "torch.compile": inductor,
        "eager": lambda: model(x),
    }
    return contenders, {name: [part.clone() for part in call()] for name, call in contenders.items()}


class Direct:
    """The kernel object, its workgroups shared out evenly over threads; the outputs are reused."""

    def __init__(self, launch: Launch, inputs: Mapping[str, Tensor], threads: int) -> None:
        self.kernel, self.launch = CpuKernel(launch), launch
        self.outputs = outputs_for(launch, torch.device("cpu"))
        self.tensors = {**inputs, **self.outputs}
        self.shape = inputs["x"].shape
        self.pool = ThreadPoolExecutor(threads)
        count = launch.grid[0]
        bounds = [count * index // threads for index in range(threads + 1)]
        self.shares = [range(a, b) for a, b in itertools.pairwise(bounds)]

    def __call__(self) -> tuple[Tensor, Tensor]:
        list(self.pool.map(self._work, self.shares))
        q, scale = self.outputs.values()
        return q.view(self.shape), scale.view(*self.shape[:-1], -1)

    def _work(self, share: range) -> None:
        self.kernel.workgroups(self.launch, self.tensors, share)


def inductor_of(spec: RowSpec, model: NormQuant, x: Tensor) -> Contender:
    """torch.compile of the same contract in plain torch operations, fixed shapes."""
    inputs = {"x": x, "weight": model.weight}
    compiled = torch.compile(lambda: tuple(reference(spec, inputs).values()), dynamic=False, fullgraph=True)
    return compiled


def check(results: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """Problems of any contender beside eager."""
    q, scale = results["eager"]
    problems = []
    for contender, (other_q, other_scale) in results.items():
        if contender == "torch.compile":
            apart, relative = (
                steps(other_q, q).max().item(),
                ((other_scale - scale).abs() / scale).max().item(),
            )
            if apart > 1 or relative > BF16_STEP:
                problems.append(f"{contender}: q {apart} steps off, scale {relative:.2g} of its value")
            continue
        found = (compare("q", other_q, q), compare("scale", other_scale, scale))
        problems += [f"{contender}: {one.name}: {one.problem}" for one in found if one.problem]
    return problems


# Times ------------------------------------------------------------------------------------------


def measure(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call that counts, the contenders in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            repeat(call, _SETTLE)
            times[name] += repeat(call, _TURN)
    return times


def repeat(call: Contender, seconds: float) -> list[float]:
    """Call until ``seconds`` have passed, at least once; how long each call took."""
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def show(times: Mapping[str, Sequence[float]], options: argparse.Namespace) -> None:
    """A line per contender: median, fastest, the middle half, and how it stands to torch.compile."""
    sizes = "x".join(map(str, options.shape))
    load = os.getloadavg()[0]
    print(f"{sizes} {options.dtype}, {options.threads} threads, {options.rounds} rounds, load {load:.1f}")
    print(f"{'ms':14s}  median  fastest    middle half   torch.compile/this, median and fastest")
    base = times["torch.compile"]
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(
            f"{name:14s} {1e3 * middle:7.3f}  {1e3 * min(values):7.3f}  {1e3 * low:6.3f}-{1e3 * high:.3f}"
            f"  {statistics.median(base) / middle:6.2f} {min(base) / min(values):6.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
