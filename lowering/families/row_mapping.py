"""Lay the rows of a kernel over the lanes, workgroups and multiprocessors of a machine.

What a kernel computes is ``row``'s business; nothing here changes a bit of any result.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patterns.contracts import Quantization, RowSpec

from ..targets import Target
from .instance import GridRule

GROUPS = (32, 64, 128)

# Lanes of the largest workgroup.
_MAX_LANES = 512
# Vectors a lane may hold before a row is spread over several waves.
_WITHIN_WAVE = 3
# Elements of x that one CPU workgroup takes: some ten microseconds, well above the cost of handing it out.
_CPU_ELEMENTS = 16384

# What was measured on an H200 is the rule for these.
_LIKE_H200 = ("sm_90", "sm_100")
# Rows from so many elements on have a mapping of their own on NVIDIA GPUs, from so many slices when few.
_LONG, _SLICED = 1280, 6144


@dataclass(frozen=True)
class Tile:
    """Say how rows are laid over lanes.

    ``lanes`` work on one row, each on ``vectors`` vectors of ``vector`` elements at once, ``batches`` times;
    a workgroup takes ``rows``.  With ``blocks`` there are at most so many workgroups, which go through the
    rows in steps of all of them and read the next row ahead.  With ``slices``, a power of two, up to so many
    workgroups read the same row and each writes a part of it.
    """

    lanes: int
    vectors: int
    vector: int
    rows: int = 1
    batches: int = 1
    blocks: int = 0
    slices: int = 1

    @property
    def threads(self) -> int:
        return self.lanes * self.rows


@dataclass(frozen=True)
class Mapping:
    """The tiles of a kernel: ``few`` for up to ``few_rows`` rows, ``many`` for more.

    Both have the same number of threads, so that one workgroup size serves and the grid alone depends on the
    rows.  A multiprocessor is to hold ``resident`` workgroups at once, which caps their registers (CUDA).
    ``spread`` is how many workgroups the slices of few rows may add up to.
    """

    many: Tile
    few: Tile | None = None
    few_rows: int = 0
    spread: int = 0
    resident: int = 1

    @property
    def threads(self) -> int:
        return self.many.threads

    @property
    def grid_rule(self) -> GridRule:
        few: list[tuple[int, int]] = []
        if self.few:
            powers = (1 << k for k in reversed(range(1, self.few.slices.bit_length())))
            few = [(min(self.spread // slices, self.few_rows), slices) for slices in powers]
            few.append((self.few_rows, 1))
        return GridRule(self.many.rows, self.many.blocks or None, tuple(few))


def choose_mapping(spec: RowSpec, target: Target) -> Mapping:
    """The mapping of rows to lanes: what was measured on the target for rows like these, else a rule."""
    if measured := _measured(target.name).get(tuning_key(spec)):
        return _with_room(measured, spec)
    if target.name in _LIKE_H200 and tuning_key(spec) and spec.hidden >= _LONG:
        return _with_room(_long_rows(spec, target), spec)
    return Mapping(_default_tile(spec, target))


def _with_room(mapping: Mapping, spec: RowSpec) -> Mapping:
    """Let a multiprocessor hold fewer workgroups that go through the rows where each keeps a bias too."""
    resident = -(-mapping.resident * 2 // 3)
    if spec.bias_dtype is None or not mapping.many.blocks or mapping.resident <= 2:
        return mapping
    blocks = mapping.many.blocks * resident // mapping.resident
    return replace(mapping, many=replace(mapping.many, blocks=blocks), resident=resident)


def _long_rows(spec: RowSpec, target: Target) -> Mapping:
    """Apply what was measured on an H200 to lengths and NVIDIA GPUs that were not.

    Where 16-bit values are written, one workgroup a row, since rows that are worked on in order are near to
    each other in memory; and vectors of 8, since their stores then cover whole sectors, which those of 16 do
    where a store has 32 bytes (sm_100).  Where only codes are, instructions are the limit: vectors of 16, and
    workgroups that keep the weight and read a row ahead, from half as many rows on as there are of those.
    """
    multiprocessors, copies = target.multiprocessors, spec.writes_sum or spec.writes_y
    vector = 8 if spec.hidden % 16 or (copies and target.name == "sm_90") else 16
    count = -(-spec.hidden // vector)
    vectors = min(2, -(-count // 256)) if vector == 16 else -(-count // _MAX_LANES)
    lanes = -(-count // (32 * vectors)) * 32
    resident = max(1, (1024 if vectors == 1 else 512) // lanes)
    many = Tile(lanes, vectors, vector, blocks=0 if copies else resident * multiprocessors)
    resident = 1 if copies else resident
    if copies and spec.hidden < _SLICED:
        return Mapping(many)
    few = Tile(lanes, vectors, vector, slices=8 if spec.hidden >= _SLICED else 1)
    few_rows = multiprocessors // 8 if copies else many.blocks // 2
    return Mapping(many, few, few_rows, multiprocessors // 2, resident)


def tuning_key(spec: RowSpec) -> str:
    """Name what the best mapping depends on: the length of a row and what is read and written of it.

    Empty where nothing was measured: rows of float32, norms that are gated, and rows without a norm, which
    need no barrier.
    """
    if spec.norm is None or spec.gate is not None or spec.dtype == "float32":
        return ""
    inputs, copies = 1 + bool(spec.norm.residual), spec.writes_sum + spec.writes_y
    return f"{spec.hidden}: {inputs} read, {copies} copied, {min(3, len(spec.quantizations))} quantized"


@functools.cache
def _measured(target: str) -> dict[str, Mapping]:
    """Read what tools/bench/tune.py wrote for ``target``, by ``tuning_key``."""
    path = Path(__file__).with_name("tuning") / f"{target}.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["mappings"]
    return {key: _mapping(fields) for key, fields in found.items()}


def _mapping(fields: dict[str, Any]) -> Mapping:
    tiles = {name: Tile(**fields[name]) for name in ("many", "few") if name in fields}
    return Mapping(**{**fields, **tiles})


def _default_tile(spec: RowSpec, target: Target) -> Tile:
    """Lay rows over lanes by a rule, where nothing was measured.

    Short rows stay inside a wave or a part of it, so no barrier is needed; longer ones take whole
    waves, of two vectors a lane where possible: what every lane computes for itself (the reduction,
    1/rms) costs as much as half a vector, while more vectors would make a single row slow.  Without
    a norm there is no such cost, and one vector a lane is enough; where nothing at all depends on the
    whole row, one of any length is taken in batches.
    """
    if not target.is_gpu:
        return Tile(lanes=1, vectors=1, vector=1, rows=max(1, _CPU_ELEMENTS // spec.hidden))
    vector = 8 if spec.hidden % 16 == 8 and not spec.quantizations else 16
    count = -(-spec.hidden // vector)
    # What lanes of one wave cannot fold is shared by a barrier, which is for one row.
    grouped = spec.norm is not None and spec.norm.group is not None
    if count <= _WITHIN_WAVE * target.wave and not grouped:
        lanes, vectors = _lanes_within_wave(count, target.wave, _fewest_lanes(spec, vector))
        return Tile(lanes, vectors, vector, rows=max(4, 2 * target.wave // lanes))
    if not needs_whole_row(spec):
        return _batched_tile(count, target.wave, vector, at_most=1 if spec.gate else 2)
    per_lane = 2 if spec.norm else 1
    waves = min(-(-count // (per_lane * target.wave)), _MAX_LANES // target.wave)
    lanes = waves * target.wave
    return Tile(lanes, -(-count // lanes), vector, rows=1)


def _batched_tile(count: int, wave: int, vector: int, at_most: int) -> Tile:
    """A block for a row of ``count`` vectors: one a lane, in longer rows ``at_most``, then in batches."""
    vectors = min(at_most, -(-count // _MAX_LANES))
    batches = -(-count // (_MAX_LANES * vectors))
    lanes = -(-count // (batches * vectors * wave)) * wave
    return Tile(lanes, vectors, vector, rows=1, batches=batches)


def needs_whole_row(spec: RowSpec) -> bool:
    """Tell whether something depends on all elements of a row."""
    return spec.norm is not None or has_row_scale(spec)


def has_row_scale(spec: RowSpec) -> bool:
    """Tell whether a group is a whole row, of no length the kernel knows as a group."""
    return any(
        group_of(quantization, spec) == 0 for quantization in spec.quantizations if not quantization.static
    )


def group_of(quantization: Quantization, spec: RowSpec) -> int:
    """Elements of a group; 0 for a whole row that is of no length the kernel knows as a group."""
    if quantization.group is None:
        return spec.hidden if spec.hidden in GROUPS else 0
    return quantization.group


def _lanes_within_wave(count: int, wave: int, fewest: int) -> tuple[int, int]:
    """(lanes, vectors): a power of two of lanes and few vectors each; the least idle, then the widest."""
    powers = [1 << k for k in range(int(math.log2(wave)) + 1) if 1 << k >= fewest]
    choices = [(lanes, -(-count // lanes)) for lanes in powers if lanes * _WITHIN_WAVE >= count]
    return min(choices, key=lambda choice: (choice[0] * choice[1], -choice[0]))


def _fewest_lanes(spec: RowSpec, vector: int) -> int:
    """Lanes over which the widest group of ``spec`` is spread: a row cannot have fewer."""
    grouped = (quantization for quantization in spec.quantizations if not quantization.static)
    return max([1, *(group_of(quantization, spec) // vector for quantization in grouped)])
