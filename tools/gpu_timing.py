"""Times on a CUDA GPU: kernel objects by themselves, Inductor's kernels for the same rows, and a copy.

Everything is captured into a CUDA graph that walks through enough input and output sets to leave the L2
cache behind; the median of several replays is divided by the launches in it.  Outputs are poisoned and
checked once before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_compare import compare
from kernel_launch import CudaKernel, Launch, inputs_for, kernel_for, outputs_for, reference
from torch import Tensor

from lowering.errors import RunError
from patterns.contracts import RowSpec

ROWS = (1, 16, 128, 1024, 4096, 16384)
_ROTATED = 512 << 20  # bytes in all input and output sets together; the L2 of an H200 holds 60 MB
_MOST_SETS = 512
_FEWEST_LAUNCHES = 20
_REPLAYS = 15
_COPIED = 2 << 30


@dataclass(frozen=True)
class Timing:
    """One kernel at one number of rows; times in microseconds.

    floor: what moving its bytes takes at the copy bandwidth.  cold: whether the sets together exceed the L2.
    """

    entry: str
    rows: int
    bytes: int
    kernel: float
    floor: float
    inductor: float | None
    cold: bool

    @property
    def fraction(self) -> float:
        return self.floor / self.kernel


def check_kernel(launch: Launch, spec: RowSpec, device: torch.device) -> list[str]:
    """Launch once over poisoned outputs and compare; the problems, none when all is well."""
    inputs, outputs = inputs_for(launch, device), outputs_for(launch, device)
    kernel_for(launch, device)(launch, {**inputs, **outputs})
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = [compare(name, outputs[name], expected) for name, expected in reference(spec, inputs).items()]
    if {difference.name for difference in found} != set(outputs):
        raise RunError(f"{launch.entry} writes {sorted(outputs)}, its spec says otherwise")
    return [f"{difference.name}: {difference.problem}" for difference in found if difference.problem]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large device-to-device copy: the median of 20."""
    source = torch.randint(0, 255, (_COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), 20)
    return 2 * _COPIED / seconds


def time_kernel(launch: Launch, spec: RowSpec, bandwidth: float, *, inductor: bool = True) -> Timing:
    """Time one launch, and ``torch.compile`` of the same rows."""
    sets = max(3, min(_MOST_SETS, -(-_ROTATED // launch.bytes)))
    inputs = [inputs_for(launch, torch.device("cuda")) for _ in range(sets)]
    return Timing(
        entry=launch.entry,
        rows=launch.rows,
        bytes=launch.bytes,
        kernel=1e6 * _time_object(launch, inputs),
        floor=1e6 * launch.bytes / bandwidth,
        inductor=1e6 * _time_inductor(spec, inputs) if inductor else None,
        cold=sets * launch.bytes >= _ROTATED,
    )


def _time_object(launch: Launch, inputs: Sequence[Mapping[str, Tensor]]) -> float:
    kernel = CudaKernel(launch)
    outputs = [outputs_for(launch, torch.device("cuda")) for _ in inputs]
    tensors = [{**read, **written} for read, written in zip(inputs, outputs, strict=True)]
    kernel(launch, tensors[0])  # warm: the module is loaded at the first launch
    return _time_captured([lambda each=each: kernel(launch, each) for each in tensors])


def _time_inductor(spec: RowSpec, inputs: Sequence[Mapping[str, Tensor]]) -> float:
    compiled = inductor_row(spec)
    for _ in range(3):
        compiled(inputs[0])
    return _time_captured([lambda each=each: compiled(each) for each in inputs])


def inductor_row(spec: RowSpec) -> Callable[[Mapping[str, Tensor]], Any]:
    """The rows of ``spec`` in plain torch operations, through torch.compile."""
    torch._dynamo.reset()
    return torch.compile(lambda inputs: reference(spec, inputs), dynamic=False, fullgraph=True)


def _time_captured(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds per call, from replays of one graph that holds every call, several rounds if they are few."""
    rounds = max(1, -(-_FEWEST_LAUNCHES // len(calls)))
    graph, results = torch.cuda.CUDAGraph(), list[Any]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            results.append(call())  # kept, so that no two calls write to the same memory
            if len(results) > len(calls):
                results.pop(0)
    graph.replay()
    return _median_seconds(graph.replay, _REPLAYS) / (rounds * len(calls))


def _median_seconds(call: Callable[[], Any], repeat: int) -> float:
    """Median device time of ``call``, by events."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def call_seconds(call: Callable[[], Any], repeat: int = 50) -> float:
    """Median wall time of a call that returns when its results are there."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
