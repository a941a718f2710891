"""Measures how rows are best laid over lanes on the GPU of this machine, and writes what was found.

    python tools/tune.py lowering/tuning/sm_90.json --target h200

Needs a GPU and the compiler of its kernels.  For every family of ``kernel_families`` with a norm and every
hidden size, tiles are compiled, checked and timed at every number of rows.  The tile of many rows is the
fastest at 1024 rows and more, that of few rows the fastest up to 128 among those of as many threads; few rows
end where the tile of many rows overtakes it.  ``lowering/mapping.py`` reads the file when it compiles for the
target.

Exit codes: 0 written, 1 a tile computed something wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from float64_check import problems
from gpu_timing import tensor_sets, time_launch
from kernel_families import FAMILIES, HIDDEN
from kernel_families import ROWS as EVERY_ROWS
from kernel_launch import CudaKernel, Launch, inputs_for, launch_of, outputs_for

from lowering import toolchain
from lowering.errors import LoweringError
from lowering.kernel import KernelInstance, instance
from lowering.mapping import Mapping as Lanes
from lowering.mapping import Tile, tuning_key
from lowering.targets import Target, resolve
from patterns.contracts import RowSpec

# Not 512: whether the last wave of workgroups is full decides there, and little else.
ROWS = tuple(rows for rows in EVERY_ROWS if rows != 512)
MANY = 1024  # rows from which on only the tile of many rows counts
_MANY_COUNTS = 3  # times as much as few, in what is chosen: that is where time goes
_CHECKED = (3, 33, 700)
_FEW_FOREVER = 1 << 20
_CLEARLY = 1.02


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        target = resolve(options.target)
    except LoweringError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    specs = _specs(options.hidden or HIDDEN)
    found, wrong = tune(specs, target)
    document = {"gpu": torch.cuda.get_device_name(), "date": str(datetime.date.today()), "mappings": found}
    options.file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{options.file}: {len(found)} mappings, {wrong} tiles were wrong")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--target", default="h200", help="what this machine's GPU is (default: %(default)s)")
    parser.add_argument("--hidden", type=int, action="append", help="only this hidden size (repeatable)")
    return parser


def _specs(hidden: Sequence[int]) -> list[RowSpec]:
    """One spec for every key that the families have."""
    specs = [family(size) for size in hidden for family in FAMILIES.values()]
    return list({tuning_key(spec): spec for spec in specs if spec.norm}.values())


def tune(specs: Sequence[RowSpec], target: Target) -> tuple[dict[str, Any], int]:
    """The mapping of every spec, as its fields, by key; and how many tiles computed something wrong."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    found, wrong = {}, 0
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor() as pool:
        jobs = [
            [
                pool.submit(_compile, spec, target, lanes, directory)
                for lanes in candidates(spec, multiprocessors)
            ]
            for spec in specs
        ]
        for spec, each in zip(specs, jobs, strict=True):
            tried = [Tried(spec, *job.result()) for job in each]
            usable = [one for one in tried if one.usable]
            wrong += len([one for one in tried if one.problems])
            measure(usable)
            lanes = choose(usable, multiprocessors)
            found[tuning_key(spec)] = {
                key: value for key, value in asdict(lanes).items() if value is not None
            }
            print(tuning_key(spec), lanes, flush=True)
    return found, wrong


def candidates(spec: RowSpec, multiprocessors: int) -> Iterator[Lanes]:
    """Mappings that try one tile each: for many rows, and for any number of rows as if they were few."""
    copies = spec.writes_sum + spec.writes_y
    for vector, vectors, lanes in _layouts(spec.hidden):
        tile = Tile(lanes, vectors, vector)
        yield Lanes(tile)
        for resident in range(2, 17):
            if not 420 <= resident * lanes <= 1024:
                continue
            yield Lanes(tile, resident=resident)
            if not copies and vector == 16:
                looped = Tile(lanes, vectors, vector, blocks=resident * multiprocessors)
                yield Lanes(looped, resident=resident)
        for slices in (4, 8):
            if slices <= vectors * lanes // 32:
                few = Tile(lanes, vectors, vector, slices=slices)
                yield Lanes(tile, few, _FEW_FOREVER, multiprocessors)


def _layouts(hidden: int) -> Iterator[tuple[int, int, int]]:
    """(vector, vectors, lanes) of whole waves with few lanes idle."""
    for vector, vectors in ((8, 1), (8, 2), (8, 3), (8, 4), (8, 6), (16, 1), (16, 2), (16, 3), (16, 4)):
        lanes = -(-hidden // (vector * vectors * 32)) * 32
        if 64 <= lanes <= 1024 and lanes * vectors * vector <= 1.15 * hidden:
            yield vector, vectors, lanes


def _compile(
    spec: RowSpec, target: Target, lanes: Lanes, directory: str
) -> tuple[Lanes, KernelInstance, Path]:
    kernel = instance(spec, target, lanes)
    path = Path(directory) / f"{kernel.entry}.cubin"
    path.write_bytes(toolchain.compile_kernel(kernel))
    return lanes, kernel, path


class Measured(Protocol):
    """A candidate and its microseconds by number of rows."""

    lanes: Lanes
    times: dict[int, float]

    @property
    def few(self) -> bool: ...


@dataclass
class Tried:
    """One candidate on the GPU: its problems and its times."""

    spec: RowSpec
    lanes: Lanes
    kernel: KernelInstance
    path: Path

    def __post_init__(self) -> None:
        self.times = dict[int, float]()
        self.loaded = CudaKernel(self.launch(1))
        spills = self.loaded.spilled > 0
        self.problems = [] if spills else [found for rows in _CHECKED for found in self._check(rows)]
        self.usable = not spills and not self.problems
        if self.problems:
            print(f"WRONG {self.lanes}: {'; '.join(self.problems)}")

    def _check(self, rows: int) -> list[str]:
        launch, device = self.launch(rows), torch.device("cuda")
        tensors = {**inputs_for(launch, device), **outputs_for(launch, device)}
        self.loaded(launch, tensors)
        return problems(self.spec, tensors)

    def launch(self, rows: int) -> Launch:
        return launch_of(self.kernel, self.path, rows)

    @property
    def few(self) -> bool:
        return self.lanes.few is not None


def measure(tried: Sequence[Tried]) -> None:
    """Time everything at every number of rows that it may be chosen for."""
    for rows in ROWS:
        sets = tensor_sets(tried[0].launch(rows))
        for one in tried:
            if rows < MANY or not one.few:
                one.times[rows] = 1e6 * time_launch(one.loaded, one.launch(rows), sets)


def choose(tried: Sequence[Measured], multiprocessors: int) -> Lanes:
    """The best tile of many and of few rows together."""
    threads = {one.lanes.threads for one in tried}
    pairs = [pair for count in threads if (pair := _best_pair(tried, count))]
    _, many, few = min(pairs, key=lambda pair: pair[0])
    return _joined(many, few, multiprocessors)


def _best_pair(tried: Sequence[Measured], threads: int) -> tuple[float, Measured, Measured] | None:
    """(cost, tile of many rows, tile of few) with so many threads."""
    those = [one for one in tried if one.lanes.threads == threads]
    wholes = [one for one in those if not one.few]
    if not wholes:
        return None
    many = min(wholes, key=lambda one: _cost(one.times, [rows for rows in ROWS if rows >= MANY]))
    few = min(those, key=lambda one: _cost(one.times, [rows for rows in ROWS if rows < MANY]))
    best = {rows: min(many.times[rows], few.times.get(rows, math.inf)) for rows in ROWS}
    return _cost(best, ROWS), many, few


def _cost(times: Mapping[int, float], rows: Sequence[int]) -> float:
    """Of logarithms, so that a percent counts the same whatever it is of."""
    return sum(math.log(times[count]) * (_MANY_COUNTS if count >= MANY else 1) for count in rows)


def _joined(many: Measured, few: Measured, multiprocessors: int) -> Lanes:
    """One mapping of both; the tile of few rows only as far as it is clearly faster."""
    lanes, tile = many.lanes, few.lanes.few or few.lanes.many
    faster = [rows for rows in few.times if rows < MANY and few.times[rows] * _CLEARLY < many.times[rows]]
    plain = Tile(tile.lanes, tile.vectors, tile.vector, slices=tile.slices)
    if not faster or plain == Tile(lanes.many.lanes, lanes.many.vectors, lanes.many.vector):
        return lanes
    return Lanes(lanes.many, plain, max(faster), multiprocessors, lanes.resident)


if __name__ == "__main__":
    sys.exit(main())
