"""Say what the gfx950 product kernel executes, and what an MI355X would take by that: Markdown tables.

    python -m tools.gfx950.products
    python -m tools.gfx950.products --shapes 1x7168x18432 4096x4096x7168

Each kernel is compiled, one unit of its work is run on the executor and counted; nothing is estimated but the
times, whose assumptions are those of ``ComputeUnit`` and of gfx950_counts' ``Machine``; docs/gemm_gfx950.md
states them.  Shapes are rows x columns x depth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lowering.backends import toolchain
from lowering.families.instance import KernelInstance
from lowering.families.matmul.family import instance
from lowering.families.matmul.hip import ProductTile, default_tile
from lowering.targets import resolve
from patterns.contracts import MatmulSpec
from tools import gfx950
from tools.gfx950.counts import VECTOR, Machine, table

TARGET = resolve("gfx950")
SIDE, FEW_ROWS, BLOCK, WAVES = 16, 64, 128, 4
# What AITER's wheel states for its tuned kernels on an MI350X, in microseconds.
AITER = {
    (64, 7168, 2048): 8.05,
    (64, 4608, 7168): 19.5,
    (128, 7168, 2304): 10.9,
    (1024, 7168, 2048): 27.6,
    (1024, 4608, 7168): 66.7,
}
SHAPES = (
    *((rows, 2048, 7168) for rows in (1, 64, 4096)),
    *((rows, 7168, 18432) for rows in (1, 64, 4096)),
    *((rows, 36864, 7168) for rows in (1, 64, 4096)),
    *AITER,
)


@dataclass(frozen=True)
class ComputeUnit:
    """Hold what one does at best in a cycle."""

    matrix_cycles: int = 32  # of a 16x16x128 product of fp8 on one of its 4 SIMDs
    simds: int = 4
    lds_bytes: int = 128
    cache_bytes: int = 64  # from L2


@dataclass(frozen=True)
class Unit:
    """A unit of work of a product, executed.  ``chain``: loads that wait for each other."""

    rows: int
    columns: int
    kernel: KernelInstance
    resources: gfx950.Kernel
    counts: gfx950.Statistics
    chain: float

    @property
    def lds_bytes(self) -> int:
        """Of all lanes, as if a read by all of one value were many."""
        widths = {"B32": 4, "B64": 8, "B128": 16}
        lanes = self.counts.lanes
        return sum(lanes[name] * widths[name.split("_")[2]] for name in lanes if name.startswith("DS_"))

    @property
    def vector(self) -> int:
        return sum(self.counts.by_work[kind] for kind in VECTOR)


def unit_of(rows: int, columns: int, depth: int) -> Unit:
    """The unit that most of a product of this shape is made of."""
    tile = default_tile(spec(columns, depth), TARGET)
    few = rows <= tile.few_rows
    most = FEW_ROWS if few else tile.rows
    rows, columns = min(rows, most), tile.few_columns if few else tile.columns
    blocks = depth // BLOCK
    # As matmul.hip has it: few rows have 6, 4 or 3 of a wave's blocks on their way, many rows 2 of a.
    ring = {1: 6, 2: 4}.get(-(-rows // SIDE), 3)
    chain = -(-blocks // WAVES) / ring if few else blocks / 2
    return run(rows, columns, depth, replace(tile, few_rows=most if few else 0), chain)


def spec(columns: int, depth: int) -> MatmulSpec:
    """The product of a kernel's codes and a shuffled weight, as programs have it."""
    codes = "float8_e4m3fn"
    return MatmulSpec(
        *(columns, depth, BLOCK, codes, codes, "bfloat16"), b_layout="shuffled_16x16", a_scale_layout="column"
    )


def run(rows: int, columns: int, depth: int, tile: ProductTile, chain: float) -> Unit:
    """Compile a product of one unit and execute it on zeros."""
    kernel = instance(spec(columns, depth), TARGET, tile)
    resources = gfx950.CodeObject(toolchain.compile_kernel(kernel)).kernel(kernel.entry)
    memory, pointers = gfx950.Memory(), []
    for binding in kernel.bindings:
        size = getattr(torch, binding.dtype).itemsize * torch.Size(kernel.shape(binding, rows)).numel()
        data = torch.zeros(size, dtype=torch.uint8).numpy()
        pointers.append(memory.add_array(data, writable=binding.access == "write"))
    counts = gfx950.execute(resources, (1,), kernel.block, [*pointers, rows], memory)
    return Unit(rows, columns, kernel, resources, counts, chain)


def predicted(
    unit: Unit, rows: int, columns: int, depth: int, machine: Machine, compute: ComputeUnit
) -> tuple[float, str]:
    """Seconds for a product made of such units, and what bounds it."""
    units = -(-rows // unit.rows) * -(-columns // unit.columns)
    turns = -(-units // machine.units)  # of the busiest compute unit
    at_once = unit.kernel.grid(1)[0]
    per_unit = {
        "matrix": unit.counts.by_work["matrix"] * compute.matrix_cycles / compute.simds,
        "vector": unit.vector,
        "lds": unit.lds_bytes / compute.lds_bytes + sum(unit.counts.bank_conflicts.values()),
        "cache": unit.counts.bytes_loaded / compute.cache_bytes,
    }
    bounds = {name: turns * cycles / machine.hertz for name, cycles in per_unit.items()}
    moved = columns * depth + rows * (depth + depth // BLOCK * 4 + 2 * columns)
    bounds["memory"] = moved / machine.bytes_per_second
    # Arguments come first, then what waits for each other.
    bounds["latency"] = machine.memory_latency * (1 + -(-units // at_once) * unit.chain)
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound], bound


# -- tables ----------------------------------------------------------------------------------------

_UNIT_HEADER = (
    *("unit", "K", "VGPRs", "SGPRs", "LDS", "scratch", "workgroups/CU", "waves/SIMD", "matrix", "vector"),
    *("LDS bytes", "conflicts", "KiB loaded", "products/byte"),
)


def _unit_row(unit: Unit, depth: int) -> list[object]:
    resources, products = unit.resources, unit.rows * unit.columns * depth
    resident = unit.kernel.grid(1)[0] // TARGET.multiprocessors
    return [
        *(f"{unit.rows} x {unit.columns}", depth, resources.vgprs, resources.sgprs, resources.lds_bytes),
        *(resources.scratch_bytes, resident, resident * WAVES // 4, unit.counts.by_work["matrix"]),
        *(unit.vector, unit.lds_bytes, sum(unit.counts.bank_conflicts.values())),
        *(f"{unit.counts.bytes_loaded / 1024:.0f}", f"{products / unit.counts.bytes_loaded:.1f}"),
    ]


def _time_row(shape: tuple[int, int, int], unit: Unit) -> list[object]:
    rows, columns, depth = shape
    seconds, bound = predicted(unit, rows, columns, depth, Machine(), ComputeUnit())
    memory = (columns * depth + rows * (depth + 2 * columns)) / Machine().bytes_per_second
    rate = 2 * rows * columns * depth / seconds / 1e12
    published = AITER.get(shape, "")
    return [
        *(rows, columns, depth, f"{unit.rows} x {unit.columns}", f"{memory * 1e6:.1f}"),
        *(f"{seconds * 1e6:.1f}", bound, f"{rate:.0f}", published),
    ]


def _shape(text: str) -> tuple[int, int, int]:
    rows, columns, depth = (int(size) for size in text.split("x"))
    return rows, columns, depth


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="MxNxK")
    options = parser.parse_args(arguments)
    units = {shape: unit_of(*shape) for shape in options.shapes}
    different = {(unit.rows, unit.columns, shape[2]): unit for shape, unit in units.items()}
    print(table(_UNIT_HEADER, [_unit_row(unit, key[2]) for key, unit in sorted(different.items())]))
    print("\nMicroseconds on an MI355X, predicted; AITER's are published for an MI350X.\n")
    header = ("M", "N", "K", "unit", "bytes / 8 TB/s", "predicted", "bound", "TFLOP/s", "AITER")
    print(table(header, [_time_row(shape, unit) for shape, unit in units.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
