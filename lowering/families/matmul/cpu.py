"""Specialise the block-scaled product of ``kernels/matmul.c``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from patterns.contracts import MatmulSpec

from ...targets import Target
from ..instance import GridRule
from ..row_mapping import GROUPS
from .variant import Specialised, Variant, common_defines, texts


@dataclass(frozen=True)
class ProductTile:
    """Say what is computed at once: ``rows`` x up to 96 columns of the result.

    Up to ``few_rows`` rows the weights stream past one row after another; with more, a tile of them is
    decoded and multiplied with all rows.  96 columns are whole panels of every vector width; rows times
    columns sums lie on the stack of a worker, which has 128 KiB.
    """

    rows: int = 128
    few_rows: int = 1


DEPTH_MULTIPLE = 64  # of what is decoded along K at once, for every dtype and vector width

MATMUL_C = {"matmul.c": ("cpu.h", "vectors.h", "lanes.h", "float8.h", "int8.h", "plain.h")}

# From so many workgroups for each worker on, IREE's task system hands out as many at a time.
_AT_ONCE = 8
# Columns are shared out in sixteens; a tile has up to six, and takes a quarter of the time of one more.
_UNIT, _WHOLE, _EACH_TILE = 16, 6, 0.25
# The workers of the hosts that a program may come to: it is the same on all of them.
_HOSTS = (1, 2, 4, 8, 16, 32)


def tile_defines(columns: int, tile: ProductTile) -> tuple[dict[str, int], GridRule]:
    """The constants and the grid of ``columns`` columns in tiles; a workgroup takes ``SHARE`` columns."""
    units = -(-columns // _UNIT)
    share = _share(units)
    values = {"ROWS": tile.rows, "FEW_ROWS": tile.few_rows, "SHARE": share * _UNIT}
    return values, GridRule(tile.rows, columns=-(-units // share))


@functools.cache
def _share(units: int) -> int:
    """The units of a workgroup that lose the hosts least, together, against what would be best for each."""
    turns = [workers * turn for workers in _HOSTS for turn in range(1, _AT_ONCE + 1)]
    shares = sorted({_WHOLE} | {-(-units // count) for count in turns})
    best = {workers: min(busiest(units, workers, share) for share in shares) for workers in _HOSTS}

    def loss(share: int) -> float:
        return sum(busiest(units, workers, share) / best[workers] for workers in _HOSTS)

    return min(shares, key=loss)


def busiest(units: int, workers: int, share: int) -> float:
    """Predict, in units, the time of the worker with the most workgroups of ``share`` units."""
    workgroups = -(-units // share)
    at_once = _AT_ONCE if workgroups >= _AT_ONCE * workers else 1
    rounds, rest = divmod(workgroups, at_once * workers)
    return (rounds * at_once + min(rest, at_once)) * (share + _EACH_TILE * -(-share // _WHOLE))


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    if spec.group in GROUPS or (spec.whole and spec.depth % DEPTH_MULTIPLE == 0):
        return None
    if spec.whole:
        return f"The product kernel takes rows of whole {DEPTH_MULTIPLE} elements, not of {spec.depth}."
    return f"The product kernel knows groups of {', '.join(map(str, GROUPS))}, not {spec.group}."


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    tile = tile if isinstance(tile, ProductTile) else ProductTile()
    values, grid_rule = tile_defines(spec.columns, tile)
    return Specialised(texts({**common_defines(spec), **values}), grid_rule)


VARIANT = Variant("matmul.c", ("row",), ("row", "column_tma", "column"), _why_unsupported, _specialise)
