"""Specialise the block-scaled product of ``kernels/matmul.c``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


MATMUL_C = {"matmul.c": ("cpu.h", "vectors.h", "lanes.h", "float8.h", "plain.h")}

# From so many workgroups for each worker on, IREE's task system hands out as many at a time.
_AT_ONCE = 8
# Columns are shared out in sixteens; a tile has up to six, and takes a quarter of the time of one more.
_UNIT, _WHOLE, _EACH_TILE = 16, 6, 0.25


def tile_defines(columns: int, tile: ProductTile) -> tuple[dict[str, int], GridRule]:
    """The constants and the grid of ``columns`` columns in such tiles.

    A workgroup takes ``SHARE`` columns: a whole tile where there are so many that eight at a time are equal
    shares, else what lets the busiest worker be done first, in the most workgroups that are handed out one
    by one.  There are as many workers as torch has threads.
    """
    workers, units = torch.get_num_threads(), -(-columns // _UNIT)
    share = _WHOLE
    if units < _WHOLE * _AT_ONCE**2 * workers:
        shares = [-(-units // (workers * turns)) for turns in range(1, _AT_ONCE)]
        share = min(shares, key=lambda share: (_busiest(units, workers, share), share))
    values = {"ROWS": tile.rows, "FEW_ROWS": tile.few_rows, "SHARE": share * _UNIT}
    return values, GridRule(tile.rows, columns=-(-units // share))


def _busiest(units: int, workers: int, share: int) -> float:
    """Predict, in units, the time of the worker with the most workgroups of ``share`` units."""
    turns = -(-units // (workers * share))
    return turns * (share + _EACH_TILE * -(-share // _WHOLE))


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    if spec.group not in GROUPS:
        return f"The product kernel knows groups of {', '.join(map(str, GROUPS))}, not {spec.group}."
    return None


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    tile = tile if isinstance(tile, ProductTile) else ProductTile()
    values, grid_rule = tile_defines(spec.columns, tile)
    return Specialised(texts({**common_defines(spec), **values}), grid_rule)


VARIANT = Variant("matmul.c", ("row",), ("row", "column_tma", "column"), _why_unsupported, _specialise)
