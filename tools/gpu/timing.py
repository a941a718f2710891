"""Times on a CUDA GPU: kernel objects by themselves, anything else that queues work, and a copy.

Everything is captured into a CUDA graph that walks through several sets of tensors, and the median of several
replays is divided by the calls in it.  Where one set is small against the L2 cache the sets stay in it, as
what the kernel before has just written does; larger ones are so many that they leave it behind.  What is
compared takes turns, so that clocks and neighbours change for all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tools.gpu.compare import compare
from tools.gpu.launch import CudaKernel, Launch, inputs_for, kernel_for, outputs_for, reference
from torch import Tensor

from lowering.errors import RunError
from patterns.contracts import RowSpec

ROWS = (1, 16, 128, 1024, 4096, 16384)
_WARM = 15 << 20  # bytes of one set that is left in the L2, which holds 60 MB on an H200
_ROTATED = 400 << 20  # bytes in all sets together of those that are not
_CAPTURED = 300 << 20  # bytes moved by one graph, within
_FEWEST_CALLS, _MOST_CALLS = 12, 100
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


def is_cold(launch: Launch) -> bool:
    """Tell whether the tensors of a launch are taken out of reach of the L2 between calls."""
    return launch.bytes > _WARM


def tensor_sets(launch: Launch) -> list[dict[str, Tensor]]:
    """Inputs and poisoned outputs to walk through: two sets that stay in the L2, or enough to leave it."""
    device = torch.device("cuda")
    count = max(3, -(-_ROTATED // launch.bytes)) if is_cold(launch) else 2
    return [{**inputs_for(launch, device), **outputs_for(launch, device)} for _ in range(count)]


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
    for _ in range(200):  # until the clocks are up
        target.copy_(source)
    seconds = statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(20))
    return 2 * _COPIED / seconds


def time_kernel(launch: Launch, spec: RowSpec, bandwidth: float, *, inductor: bool = True) -> Timing:
    """Time one launch, and ``torch.compile`` of the same rows."""
    sets = tensor_sets(launch)
    return Timing(
        entry=launch.entry,
        rows=launch.rows,
        bytes=launch.bytes,
        kernel=1e6 * time_launch(CudaKernel(launch), launch, sets),
        floor=1e6 * launch.bytes / bandwidth,
        inductor=1e6 * _time_inductor(spec, launch, sets) if inductor else None,
        cold=is_cold(launch),
    )


def time_launch(kernel: CudaKernel, launch: Launch, sets: Sequence[Mapping[str, Tensor]]) -> float:
    """Seconds of one launch."""
    kernel(launch, sets[0])  # warm: the module is loaded at the first launch
    return time_calls([lambda each=each: kernel(launch, each) for each in sets], launch.bytes)


def _time_inductor(spec: RowSpec, launch: Launch, sets: Sequence[Mapping[str, Tensor]]) -> float:
    compiled = inductor_row(spec)
    reads = [binding.name for binding in launch.bindings if binding.access == "read"]
    inputs = [{name: each[name] for name in reads} for each in sets]
    for _ in range(3):
        compiled(inputs[0])
    return time_calls([lambda each=each: compiled(each) for each in inputs], launch.bytes)


def inductor_row(spec: RowSpec, mode: str = "default") -> Callable[[Mapping[str, Tensor]], Any]:
    """The rows of ``spec`` in plain torch operations, through torch.compile."""
    torch._dynamo.reset()
    return torch.compile(lambda inputs: reference(spec, inputs), dynamic=False, fullgraph=True, mode=mode)


def time_calls(calls: Sequence[Callable[[], Any]], moved: int) -> float:
    """Seconds per call, each of which moves ``moved`` bytes, from replays of one graph that holds all."""
    return time_in_turn([calls], moved)[0]


def time_in_turn(ways: Sequence[Sequence[Callable[[], Any]]], moved: int) -> list[float]:
    """Seconds per call of each of several ways to move the same ``moved`` bytes; their replays take turns."""
    captured = [_captured(calls, moved) for calls in ways]
    times = [[] for _ in captured]
    for _ in range(_REPLAYS):
        for (graph, count), found in zip(captured, times, strict=True):
            if moved <= _WARM:
                graph.replay()  # what lies in the L2 afterwards is this way's
            found.append(_seconds(graph.replay) / count)
    return [statistics.median(found) for found in times]


def _captured(calls: Sequence[Callable[[], Any]], moved: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of ``calls`` in rounds, and how many calls it holds."""
    wanted = min(_MOST_CALLS, max(_FEWEST_CALLS, _CAPTURED // moved))
    rounds = max(1, -(-wanted // len(calls)))
    graph, results = torch.cuda.CUDAGraph(), list[Any]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            results.append(call())  # kept, so that no two calls write to the same memory
            if len(results) > len(calls):
                results.pop(0)
    return graph, rounds * len(calls)


def _seconds(call: Callable[[], Any]) -> float:
    """Device time of ``call``, by events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def call_seconds(call: Callable[[], Any], repeat: int = 50) -> float:
    """Median wall time of a call, until its results are there."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        call()
    wait()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
