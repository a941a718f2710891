"""The block-scaled product of ``kernels/matmul.c``."""

from __future__ import annotations

from dataclasses import dataclass

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


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    if spec.group not in GROUPS:
        return f"The product kernel knows groups of {', '.join(map(str, GROUPS))}, not {spec.group}."
    return None


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    tile = tile if isinstance(tile, ProductTile) else ProductTile()
    values = {"ROWS": tile.rows, "COLUMNS": tile.columns, "FEW_ROWS": tile.few_rows}
    grid_rule = GridRule(tile.rows, columns=-(-spec.columns // tile.columns))
    return Specialised(texts({**common_defines(spec), **values}), grid_rule)


VARIANT = Variant("matmul.c", ("row",), ("row", "column_tma", "column"), _why_unsupported, _specialise)
