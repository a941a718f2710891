"""Grouped top-k routing of DeepSeek-V3 beside torch.compile: 256 experts in 8 groups, 4 kept, 8 chosen.

    python -m tools.bench.topk pack DIR --target h200     # where the compilers are; no GPU needed
    python -m tools.bench.topk run DIR                    # where the GPU is: PyTorch and cuda-bindings
    python -m tools.bench.topk pack DIR --target cpu && python -m tools.bench.topk run DIR

``run`` first compares what each kernel object writes over poisoned memory with the reference: the ids must be
equal and the weights too, but for one unit in the last place.  Then it times the object and torch.compile of
the same routing as Hugging Face writes it, in its default mode and with max-autotune, of which the faster
counts.  On a GPU every time is a call inside a CUDA graph, over gating that the L2 still holds, as it does
behind the product that makes it; on the CPU it is a call, of the kernel in one thread.  --json FILE keeps the
table (default: $OUT/bench_topk.json if OUT is set).

Exit codes: 0 all is well, 1 a result is wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowering
from lowering.errors import LoweringError
from lowering.ops.grouped_topk import grouped_topk_reference
from patterns.contracts import GroupedTopk
from tools.command_line import PackAndRun, machine_name, write_json
from tools.gpu.compare import steps
from tools.gpu.launch import Launch, inputs_for, kernel_for, outputs_for, read_launches
from tools.gpu.timing import call_seconds, copy_bandwidth

EXPERTS = 256
ROUTING = GroupedTopk(topk=8, num_expert_group=8, topk_group=4, routed_scaling_factor=2.5, eps=1e-20)
DTYPES = ("float32", "bfloat16")
ROWS = (1, 128, 4096)
MODES = (None, "max-autotune-no-cudagraphs")

_CALLS, _REPLAYS = 100, 15  # in a graph, and of it

Inputs = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One dtype at one number of tokens; times in microseconds.  floor: its bytes at the copy bandwidth."""

    dtype: str
    rows: int
    wrong_ids: int
    weights_apart: int
    kernel: float
    floor: float | None
    inductor: float
    inductor_autotuned: float

    @property
    def right(self) -> bool:
        return self.wrong_ids == 0 and self.weights_apart <= 1

    @property
    def speedup(self) -> float:
        return min(self.inductor, self.inductor_autotuned) / self.kernel

    def __str__(self) -> str:
        floor = f"{self.floor:6.2f}" if self.floor is not None else "     -"
        check = "" if self.right else f"  WRONG: {self.wrong_ids} ids, weights {self.weights_apart} apart"
        return (
            f"{self.dtype:9s} {self.rows:6d} {self.kernel:9.2f} {floor} {self.inductor:9.2f} "
            f"{self.inductor_autotuned:9.2f} {self.speedup:8.1f}x{check}"
        )


class Router(torch.nn.Module):
    """The routing alone, with its bias as an argument, as the kernel has it."""

    def forward(self, gating: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.lowering.grouped_topk(gating, bias, **dataclasses.asdict(ROUTING))


def as_hugging_face_writes_it(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router behind its matrix product, in plain torch operations."""
    groups, size = ROUTING.num_expert_group, EXPERTS // ROUTING.num_expert_group
    scores = inputs["gating"].float().sigmoid()
    choices = scores + inputs["bias"]
    values = choices.view(-1, groups, size).topk(2, dim=-1)[0].sum(dim=-1)
    kept = torch.topk(values, k=ROUTING.topk_group, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(values).scatter(1, kept, 1).unsqueeze(-1).expand(-1, groups, size)
    allowed = choices.masked_fill(~mask.reshape(-1, EXPERTS).bool(), -torch.inf)
    ids = torch.topk(allowed, k=ROUTING.topk, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + ROUTING.eps)
    return weights * ROUTING.routed_scaling_factor, ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = PackAndRun(__doc__, ROWS).parser.parse_args(arguments)
    try:
        return pack(options.directory, options.target) if options.command == "pack" else run(options)
    except (LoweringError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def pack(directory: Path, target: str) -> int:
    """Compile the routing of each dtype and write its kernel object to DIR/dtype."""
    for dtype in DTYPES:
        # So many tokens that the grid tells how many of them a workgroup takes.
        args = (torch.zeros(max(ROWS), EXPERTS, dtype=getattr(torch, dtype)), torch.zeros(EXPERTS))
        shapes = ({0: torch.export.Dim("tokens")}, None)
        compiled = lowering.compile(Router(), args, dynamic_shapes=shapes, target=target)
        compiled.dump_kernels(directory / dtype)
        print(f"{dtype}: {compiled.report.summary()}, {compiled.report.sites[0].kernel}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Check and time everything in DIR; print the table and write it."""
    launches = {dtype: read_launches(options.directory / dtype)[0] for dtype in DTYPES}
    on_cpu = launches[DTYPES[0]].object.suffix == ".o"
    device = torch.device("cpu" if on_cpu else "cuda")
    bandwidth = None if on_cpu else copy_bandwidth()
    machine = machine_name(device)
    print(f"{machine}, torch {torch.__version__}; microseconds")
    print("gating    tokens    kernel  floor  inductor autotuned  speedup")
    table = []
    for dtype, launch in launches.items():
        for rows in options.rows:
            table.append(measure(dtype, launch.resized(rows), device, bandwidth))
            print(table[-1], flush=True)
    file = options.json or (Path(os.environ["OUT"]) / "bench_topk.json" if os.environ.get("OUT") else None)
    record = {"machine": machine, "torch": torch.__version__, "routing": dataclasses.asdict(ROUTING)}
    record["table"] = [{**dataclasses.asdict(item), "speedup": item.speedup} for item in table]
    write_json(file, record)
    return 0 if all(item.right for item in table) else 1


def measure(dtype: str, launch: Launch, device: torch.device, bandwidth: float | None) -> Measured:
    """Check one launch, then time it and torch.compile."""
    wrong, apart = check(launch, device)
    time = _seconds_on_cpu if device.type == "cpu" else _seconds_on_gpu
    kernel, inputs, outputs = (
        kernel_for(launch, device),
        inputs_for(launch, device),
        outputs_for(launch, device),
    )
    seconds = time(lambda: kernel(launch, {**inputs, **outputs}))
    inductor = []
    for mode in MODES:
        compiled = _compiled(mode)
        inductor.append(1e6 * time(lambda compiled=compiled: compiled(inputs)))
    floor = 1e6 * launch.bytes / bandwidth if bandwidth else None
    return Measured(dtype, launch.rows, wrong, apart, 1e6 * seconds, floor, *inductor)


def check(launch: Launch, device: torch.device) -> tuple[int, int]:
    """Tell how many ids are wrong, and how many units in the last place weights are apart at most."""
    inputs, outputs = inputs_for(launch, device), outputs_for(launch, device)
    kernel_for(launch, device)(launch, {**inputs, **outputs})
    if device.type == "cuda":
        torch.cuda.synchronize()
    weights, ids = grouped_topk_reference(inputs["gating"], inputs["bias"], ROUTING)
    return int((outputs["ids"] != ids).sum()), int(steps(outputs["weights"], weights).max())


def _compiled(mode: str | None) -> Callable[[Inputs], Any]:
    torch._dynamo.reset()
    return torch.compile(as_hugging_face_writes_it, mode=mode, dynamic=False, fullgraph=True)


def _seconds_on_gpu(call: Callable[[], Any]) -> float:
    """Device time of one call: the median of several replays of a graph of many."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    times = []
    for _ in range(_REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(times[1:])


def _seconds_on_cpu(call: Callable[[], Any]) -> float:
    return call_seconds(call, repeat=15)


if __name__ == "__main__":
    sys.exit(main())
