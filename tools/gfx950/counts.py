"""Say what the gfx950 kernels execute per element, and what an MI355X would take by that: Markdown tables.

    python -m tools.gfx950.counts
    python -m tools.gfx950.counts --hidden 1536 7168 --tokens 1 16384

Each instance is compiled, run on the executor, and its instructions counted; nothing is estimated but the
times, whose assumptions are those of ``Machine`` and are stated in docs/gfx950.md.  "Vector" are the
lane-instructions that take a slot of the vector units: a wave instruction counts 64, whether its lanes are
active or not, a transcendental one four times that, since they run at a quarter of the rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lowering.backends import toolchain
from lowering.families.instance import KernelInstance
from lowering.families.row import instance
from lowering.targets import resolve
from patterns.contracts import GatedActivation, Norm, Quantization, RowSpec
from tools import gfx950

HIDDEN = (1536, 2048, 3072, 4096, 5120, 7168, 8192, 12288, 16384)
TOKENS = (1, 16, 128, 1024, 4096, 16384)
WAVE = 64
GROUPS = 8  # workgroups that are run and counted
_QUARTER_RATE = 4  # cycles of a transcendental beside those of another instruction

# Which kinds of work take slots of the vector units.
VECTOR = ("valu", "packed", "convert", "transcendental", "cross_lane")
MEMORY = ("load", "store", "lds", "smem_load")
SCALAR = ("salu", "branch", "sync")


@dataclass(frozen=True)
class Machine:
    """An MI355X: what it can do at best, and how long one thing after another takes."""

    units: int = 256
    hertz: float = 2.4e9
    bytes_per_second: float = 8e12
    memory_latency: float = 0.8e-6  # of one load, first byte asked for to last byte there
    cycles_per_instruction: float = 8.0  # of a wave that runs alone, each waiting for the one before


def specs(hidden: int) -> dict[str, tuple[RowSpec, float | None]]:
    """The instances of interest with the most vector instructions per element they may take."""
    quant = (Quantization(128),)
    norm = {"weight_dtype": "bfloat16", "quantizations": quant}
    once, add = Norm(1e-6), Norm(1e-6, residual="exact")
    return {
        "norm + quant": (RowSpec(hidden, "bfloat16", once, **norm), 9.0),
        "norm (unrounded) + quant": (RowSpec(hidden, "bfloat16", Norm(1e-6, "none"), **norm), 9.0),
        "add + norm + quant + bf16": (
            RowSpec(hidden, "bfloat16", add, writes_sum=True, writes_y=True, **norm),
            16.0,
        ),
        "quant": (RowSpec(hidden, "bfloat16", quantizations=quant), None),
        "silu * up + quant": (
            RowSpec(hidden, "bfloat16", gate=GatedActivation("silu"), quantizations=quant),
            None,
        ),
    }


@dataclass(frozen=True)
class Counts:
    """One instance: its resources, and what ``rows`` rows of ``hidden`` elements executed."""

    kernel: KernelInstance
    resources: gfx950.Kernel
    rows: int
    by_work: Mapping[str, int]
    bytes_moved: int

    @property
    def hidden(self) -> int:
        assert isinstance(self.kernel.spec, RowSpec)
        return self.kernel.spec.hidden

    @property
    def elements(self) -> int:
        return self.rows * self.hidden

    def per_element(self, kinds: Sequence[str]) -> float:
        """Lane-instructions of these kinds, each one slot."""
        return sum(self.by_work[kind] for kind in kinds) * WAVE / self.elements

    @property
    def vector(self) -> float:
        extra = (_QUARTER_RATE - 1) * self.by_work["transcendental"] * WAVE / self.elements
        return self.per_element(VECTOR) + extra

    @property
    def per_wave(self) -> float:
        """Instructions of one wave."""
        waves = GROUPS * self.kernel.block[0] / WAVE
        return sum(self.by_work.values()) / waves

    def compulsory_bytes(self, rows: int) -> int:
        """Every tensor once."""
        return sum(
            self.kernel.elements(b, rows) * getattr(torch, b.dtype).itemsize for b in self.kernel.bindings
        )


def count(spec: RowSpec) -> Counts:
    """Compile ``spec`` for gfx950 and run a few full workgroups of random rows."""
    kernel = instance(spec, resolve("gfx950"))
    resources = gfx950.CodeObject(toolchain.compile_kernel(kernel)).kernel(kernel.entry)
    rows = GROUPS * kernel.grid_rule.rows
    memory, generator = gfx950.Memory(), torch.Generator().manual_seed(0)
    pointers = []
    for binding in kernel.bindings:
        shape, dtype = kernel.shape(binding, rows), getattr(torch, binding.dtype)
        if binding.access == "read":
            values = torch.randn(shape, generator=generator).to(dtype)
            data = values.reshape(-1).view(torch.uint8).numpy()
        else:
            data = np.zeros(torch.Size(shape).numel() * dtype.itemsize, np.uint8)
        pointers.append(
            memory.add_array(data, writable=binding.access != "read", defined=binding.access == "read")
        )
    statistics = gfx950.execute(resources, kernel.grid(rows), kernel.block, [*pointers, rows], memory)
    moved = statistics.bytes_loaded + statistics.bytes_stored
    return Counts(kernel, resources, rows, statistics.by_work, moved)


def predicted(counts: Counts, tokens: int, machine: Machine) -> tuple[float, str]:
    """Seconds for ``tokens`` rows and their bound: memory, vector instructions, or one wave's latency."""
    workgroups = counts.kernel.grid(tokens)[0]
    turns = -(-workgroups // machine.units)  # of the busiest compute unit
    slots = counts.vector * counts.hidden * counts.kernel.grid_rule.rows / WAVE
    bounds = {
        "memory": counts.compulsory_bytes(tokens) / machine.bytes_per_second,
        "vector": turns * slots / machine.hertz,
        "latency": 2 * machine.memory_latency
        + counts.per_wave * machine.cycles_per_instruction / machine.hertz,
    }
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound], bound


# -- tables ----------------------------------------------------------------------------------------


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    return "\n".join([_row(header), _row(["---"] * len(header)), *map(_row, rows)])


_COUNT_HEADER = (
    *("instance", "H", "VGPRs", "SGPRs", "LDS", "scratch", "lanes", "plain", "packed", "convert", "trans."),
    *("cross-lane", "vector", "goal", "memory", "scalar", "bytes/element"),
)


def _count_row(name: str, goal: float | None, counts: Counts) -> list[object]:
    resources = counts.resources
    vector = [f"{counts.per_element([kind]):.2f}" for kind in VECTOR]
    met = "" if goal is None else f"{goal:g}" if counts.vector <= goal else f"{goal:g} missed"
    return [
        *(name, counts.hidden, resources.vgprs, resources.sgprs, resources.lds_bytes),
        *(resources.scratch_bytes, counts.kernel.block[0], *vector, f"{counts.vector:.2f}", met),
        *(f"{counts.per_element(MEMORY):.2f}", f"{counts.per_element(SCALAR):.2f}"),
        f"{counts.compulsory_bytes(4096) / 4096 / counts.hidden:.2f}",
    ]


def _time_row(name: str, counts: Counts, tokens: Sequence[int]) -> list[object]:
    cells: list[object] = [name, counts.hidden]
    for rows in tokens:
        seconds, bound = predicted(counts, rows, Machine())
        cells.append(f"{seconds * 1e6:.1f} {bound[0]}")
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, metavar="H")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="T")
    options = parser.parse_args(arguments)
    counted = [
        (name, goal, count(spec)) for hidden in options.hidden for name, (spec, goal) in specs(hidden).items()
    ]
    counted.sort(key=lambda item: item[0])
    print(table(_COUNT_HEADER, [_count_row(*item) for item in counted]))
    print("\nMicroseconds on an MI355X, and their bound: (m)emory, (v)ector instructions, (l)atency.\n")
    header = ["instance", "H", *(f"T {rows}" for rows in options.tokens)]
    print(table(header, [_time_row(name, counts, options.tokens) for name, _, counts in counted]))
    missed = [name for name, goal, counts in counted if goal is not None and counts.vector > goal]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
