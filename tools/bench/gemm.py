"""The block-scaled fp8 product on the CPU beside eager PyTorch's bfloat16 one and IREE's own.

    python -m tools.bench.gemm
    python -m tools.bench.gemm --threads 1 --cpu-time --shape 4096x4096 --rows 1,128

A program multiplies one activation with several weights of one shape, as the layers of a model do, so that
what a call of a program costs is spread over them.  Eager PyTorch does the same with
torch.nn.functional.linear on bfloat16.  The contenders take turns, so that a busy moment of the machine meets
all of them; the first calls of a turn are not counted, because the threads of the one before still spin for a
while.  Printed are microseconds per product, the fastest and the median, and how many times as long the rest
take.  Results are compared with float32 before anything is timed.

With --cpu-time what counts is the processor's time of the thread that worked most during a call: on a busy
machine the only time that means something, for one thread.  IREE's workers compute while the caller's thread
waits, spinning for up to some milliseconds; that is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import lowering
from lowering.ops import block_scaled_matmul_reference
from tools.bench.cpu import Contender, iree_threads
from tools.command_line import numbers, write_json

# N x K: the layers of SmolLM2-135M (hidden 576), and some of DeepSeek's sizes (hidden 7168).
SHAPES = ("576x576:64", "1536x576:64", "576x1536:64", "49152x576:64")
SHAPES = (*SHAPES, "2048x7168:128", "4096x7168:128", "7168x2048:128")
ROWS = (1, 16, 64, 128)
_WEIGHT_BYTES = 4 << 20  # of all weights of a program together, at most if there are several
_MOST_WEIGHTS = 16
_TURN, _SETTLE = 0.05, 0.01  # seconds of a turn that are counted, and before them
_TOLERANCE = 2**-7  # of the largest result: one rounding to bfloat16, and the float32 sums of both

Product = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Shape:
    """``columns`` x ``depth`` weights in blocks of ``group`` squared."""

    columns: int
    depth: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``NxK`` or ``NxK:GROUP``."""
        sizes, _, group = text.partition(":")
        columns, depth = (int(part) for part in sizes.split("x"))
        return cls(columns, depth, int(group or 128))

    @property
    def weights(self) -> int:
        return max(1, min(_MOST_WEIGHTS, _WEIGHT_BYTES // (self.columns * self.depth)))


@dataclass(frozen=True)
class Line:
    """Seconds per product of every call that counted, by contender."""

    shape: Shape
    rows: int
    times: dict[str, list[float]]

    def fastest(self, name: str) -> float:
        return min(self.times[name])

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


class Products(torch.nn.Module):
    """One quantized activation times several quantized weights."""

    def __init__(self, shape: Shape, product: Product) -> None:
        super().__init__()
        self.product, self.count = product, shape.weights
        for number, weight in enumerate(weights(shape)):
            b, b_scale = lowering.nn.quantize_weight(weight, shape.group)
            self.register_buffer(f"b{number}", b)
            self.register_buffer(f"scale{number}", b_scale)

    def forward(self, a: Tensor, a_scale: Tensor) -> tuple[Tensor, ...]:
        pairs = ((getattr(self, f"b{n}"), getattr(self, f"scale{n}")) for n in range(self.count))
        return tuple(self.product(a, b, a_scale, b_scale, torch.bfloat16) for b, b_scale in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    iree_threads(options.threads)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; us per product: fastest (median)")
    print("| N x K, group | M | vmfb | eager bf16 | IREE's own | eager / vmfb | IREE / vmfb |")
    print("|---|---|---|---|---|---|---|")
    lines = []
    with torch.inference_mode():
        for shape in options.shape:
            for line in bench(shape, options):
                lines.append(line)
                print(row(line), flush=True)
    write_json(options.json, [asdict(line) for line in lines])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [Shape.parse(text) for text in SHAPES]
    parser.add_argument(
        "--shape", type=Shape.parse, nargs="+", default=shapes, help=f"default: {' '.join(SHAPES)}"
    )
    parser.add_argument("--rows", type=numbers, default=ROWS, metavar="M,M,...", help="default: 1,16,64,128")
    parser.add_argument("--threads", type=int, default=2, help="for torch and IREE (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="the busiest thread's time instead of the wall's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time to FILE")
    return parser


# What is compared -------------------------------------------------------------------------------


def weights(shape: Shape) -> list[Tensor]:
    """The weights in bfloat16, the same every time."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.columns, shape.depth)
    return [torch.randn(sizes, generator=generator).bfloat16() for _ in range(shape.weights)]


def compiled(shape: Shape, product: Product) -> Callable[..., tuple[Tensor, ...]]:
    """The program for any number of rows."""
    example = quantized(2, shape)
    rows = {0: torch.export.Dim("T", max=1 << 20)}
    program = lowering.compile(Products(shape, product), example, dynamic_shapes=(rows, rows), target="cpu")
    return lowering.load(program.vmfb)


def quantized(rows: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """An activation's codes and scales."""
    x = torch.randn(rows, shape.depth, generator=torch.Generator().manual_seed(rows))
    return torch.ops.lowering.group_quant(x.bfloat16(), shape.group)


def bench(shape: Shape, options: argparse.Namespace) -> Iterator[Line]:
    """A line for each number of rows."""
    programs = {
        "vmfb": compiled(shape, torch.ops.lowering.block_scaled_matmul),
        "IREE": compiled(shape, block_scaled_matmul_reference),
    }
    plain = weights(shape)
    timed = busiest_thread if options.cpu_time else wall
    for count in options.rows:
        a, a_scale = quantized(count, shape)
        check(programs, shape, a, a_scale)
        x = (a.float() * a_scale.repeat_interleave(shape.group, -1)).bfloat16()
        contenders: dict[str, Contender] = {
            name: lambda program=program, a=a, a_scale=a_scale: program(a, a_scale)
            for name, program in programs.items()
        }
        contenders["eager"] = lambda x=x: [torch.nn.functional.linear(x, weight) for weight in plain]
        yield Line(shape, count, measure(contenders, options.rounds, shape.weights, timed))


def check(
    programs: dict[str, Callable[..., tuple[Tensor, ...]]], shape: Shape, a: Tensor, scale: Tensor
) -> None:
    """Every program's first and last result against the reference; SystemExit if one differs."""
    module = Products(shape, block_scaled_matmul_reference)
    expected = module(a, scale)
    for name, program in programs.items():
        for got, wanted in ((program(a, scale)[n].float(), expected[n].float()) for n in (0, -1)):
            if not (got - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
                raise SystemExit(f"{name} is wrong for {shape} and {len(a)} rows")


def measure(
    contenders: dict[str, Contender], rounds: int, products: int, timed: Callable[[Contender], float]
) -> dict[str, list[float]]:
    """Seconds per product of every call that counts, the contenders in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            repeat(call, _SETTLE, timed)
            times[name] += [seconds / products for seconds in repeat(call, _TURN, timed)]
    return times


def repeat(call: Contender, seconds: float, timed: Callable[[Contender], float]) -> list[float]:
    """Call until ``seconds`` have passed, at least once; how long each call took."""
    times: list[float] = []
    while sum(times) < seconds:
        times.append(timed(call))
    return times


def wall(call: Contender) -> float:
    """The seconds a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def busiest_thread(call: Contender) -> float:
    """The processor's seconds of the thread of this process that works most during a call (on Linux)."""
    before = thread_seconds()
    call()
    return max(seconds - before.get(thread, 0.0) for thread, seconds in thread_seconds().items())


def thread_seconds() -> dict[int, float]:
    """The processor's time of every thread of this process so far."""
    threads = [int(directory.name) for directory in Path("/proc/self/task").iterdir()]
    return {thread: time.clock_gettime(_cpu_clock(thread)) for thread in threads}


def _cpu_clock(thread: int) -> int:
    """The clock of a thread's time, as pthread_getcpuclockid makes it: CPUCLOCK_SCHED of one thread."""
    return (~thread << 3) | 2 | 4


def row(line: Line) -> str:
    """A line of the table."""
    shape = line.shape
    cells = [f"{shape.columns} x {shape.depth}, {shape.group}", str(line.rows)]
    for name in ("vmfb", "eager", "IREE"):
        cells.append(f"{1e6 * line.fastest(name):.1f} ({1e6 * line.median(name):.1f})")
    for name in ("eager", "IREE"):
        fastest, median = (of(name) / of("vmfb") for of in (line.fastest, line.median))
        cells.append(f"{fastest:.2f} ({median:.2f})")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
