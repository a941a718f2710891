"""Measures how rows are best laid over lanes on the GPU of this machine, and writes what was found.

    python -m tools.bench.tune lowering/families/tuning/sm_90.json --target h200

Needs a GPU and the compiler of its kernels.  For every family of ``kernel_families`` with a norm and every
hidden size, tiles are compiled, checked and timed in turn at every number of rows.  The tile of many rows is
the fastest at 1024 rows and more; another one of as many threads takes its place up to the number of rows
where both together cost least.  ``lowering/families/row_mapping.py`` reads the file when it compiles for
the target.

Exit codes: 0 written, 1 a tile computed something wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowering.backends import toolchain
from lowering.errors import LoweringError
from lowering.families.instance import KernelInstance
from lowering.families.row import instance
from lowering.families.row_mapping import Mapping as Lanes
from lowering.families.row_mapping import Tile, tuning_key
from lowering.targets import Target, resolve
from patterns.contracts import RowSpec
from tools.bench.float64_check import problems
from tools.gpu.launch import CudaKernel, Launch, inputs_for, launch_of, outputs_for
from tools.gpu.timing import tensor_sets, time_in_turn
from tools.kernel_families import FAMILIES, HIDDEN, ROWS

MANY = 1024  # rows from which on only the tile of many rows counts
_MANY_COUNTS = 3  # times as much as few, in what is chosen: that is where time goes
_CHECKED = (3, 33, 700)
_FEW_FOREVER = 1 << 20
_WORTH = 0.03  # of the cost, that a tile of its own for few rows has to save


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
            usable = list({one.identity: one for one in tried if one.usable}.values())
            wrong += len([one for one in tried if one.problems])
            measure(usable)
            lanes = choose(usable)
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
            if not 420 <= resident * lanes <= 2048:
                continue
            yield Lanes(tile, resident=resident)
            if not copies and vector == 16 and resident * lanes <= 1024:
                looped = Tile(lanes, vectors, vector, blocks=resident * multiprocessors)
                yield Lanes(looped, resident=resident)
        for slices, spread in itertools.product((4, 8), (multiprocessors, multiprocessors // 2)):
            if slices <= vectors * lanes // 32:
                few = Tile(lanes, vectors, vector, slices=slices)
                yield Lanes(tile, few, _FEW_FOREVER, spread)


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

    def calls(self, rows: int, sets: Sequence[Mapping[str, Tensor]]) -> list[Callable[[], None]]:
        launch = self.launch(rows)
        return [lambda each=each: self.loaded(launch, each) for each in sets]

    @property
    def few(self) -> bool:
        return self.lanes.few is not None

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for the same machine code: a cap on registers that caps nothing changes none."""
        return self.lanes.many, self.lanes.few, self.lanes.spread, self.loaded.registers


def measure(tried: Sequence[Tried]) -> None:
    """Time everything at every number of rows that it may be chosen for."""
    for rows in ROWS:
        launch = tried[0].launch(rows)
        sets = tensor_sets(launch)
        timed = [one for one in tried if rows < MANY or not one.few]
        times = time_in_turn([one.calls(rows, sets) for one in timed], launch.bytes)
        for one, seconds in zip(timed, times, strict=True):
            one.times[rows] = 1e6 * seconds


def choose(tried: Sequence[Measured]) -> Lanes:
    """The tiles of many and of few rows, of as many threads each, that cost least together."""
    threads = {one.lanes.threads for one in tried}
    mappings = itertools.chain.from_iterable(_mappings(tried, count) for count in threads)
    return min(mappings, key=lambda mapping: mapping[0])[1]


def _mappings(tried: Sequence[Measured], threads: int) -> Iterator[tuple[float, Lanes]]:
    """(cost, mapping) of the best tile of many rows with so many threads, alone and with each of few rows."""
    those = [one for one in tried if one.lanes.threads == threads]
    wholes = [one for one in those if not one.few]
    if not wholes:
        return
    many = min(wholes, key=lambda one: _cost(one.times, [rows for rows in ROWS if rows >= MANY]))
    yield _cost(many.times, ROWS), many.lanes
    for few, most in itertools.product(those, [rows for rows in ROWS if rows < MANY]):
        tile = few.lanes.few or few.lanes.many
        if tile != many.lanes.many and tile.blocks == 0:
            times = {rows: (few if rows <= most else many).times[rows] for rows in ROWS}
            lanes = Lanes(many.lanes.many, tile, most, few.lanes.spread, many.lanes.resident)
            yield _cost(times, ROWS) + _WORTH, lanes


def _cost(times: Mapping[int, float], rows: Sequence[int]) -> float:
    """Of logarithms, so that a percent counts the same whatever it is of."""
    return sum(math.log(times[count]) * (_MANY_COUNTS if count >= MANY else 1) for count in rows)


if __name__ == "__main__":
    sys.exit(main())
