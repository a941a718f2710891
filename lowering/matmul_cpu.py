"""The block-scaled product of ``kernels/matmul.c``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patterns.contracts import MatmulSpec

from .mapping import GROUPS, GridRule
from .matmul_variant import Specialised, Variant, common_defines, texts
from .targets import Target


@dataclass(frozen=True)
class ProductTile:
    """What one workgroup computes: ``rows`` x ``columns`` of the result.

    Up to ``few_rows`` rows the weights stream past one row after another; with more, a tile of them is
    decoded and multiplied with all rows.  96 columns are whole panels of every vector width; rows * columns
    sums lie on the stack of a worker, which has 128 KiB.
    """

    rows: int = 128
    columns: int = 96
    few_rows: int = 1


# From so many workgroups for each worker on, IREE's task system hands out as many at a time.
_AT_ONCE = 8


def tile_defines(columns: int, tile: ProductTile) -> tuple[dict[str, int], GridRule]:
    """The constants and the grid of ``columns`` columns in such tiles.

    Where there is one row of tiles, and so few that eight at a time are no equal shares, a workgroup takes
    ``TILES`` of them: as many as leave every worker as much, in the most workgroups that are handed out one
    by one.  There are as many workers as torch has threads.
    """
    tiles, workers = -(-columns // tile.columns), torch.get_num_threads()
    each = 1
    if _AT_ONCE * workers <= tiles < _AT_ONCE**2 * workers:
        shares = [-(-tiles // (workers * turns)) for turns in range(1, _AT_ONCE)]
        each = min(shares, key=lambda share: (-(-tiles // (workers * share)) * share, share))
    values = {"ROWS": tile.rows, "COLUMNS": tile.columns, "FEW_ROWS": tile.few_rows, "TILES": each}
    return values, GridRule(tile.rows, columns=tiles, one=-(-tiles // each) if each > 1 else None)


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    if spec.group not in GROUPS:
        return f"The product kernel knows groups of {', '.join(map(str, GROUPS))}, not {spec.group}."
    return None


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    tile = tile if isinstance(tile, ProductTile) else ProductTile()
    values, grid_rule = tile_defines(spec.columns, tile)
    return Specialised(texts({**common_defines(spec), **values}), grid_rule)


VARIANT = Variant("matmul.c", ("row",), ("row", "column_tma", "column"), _why_unsupported, _specialise)
