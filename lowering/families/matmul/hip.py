"""Specialise the block-scaled product of ``kernels/matmul.hip``."""

from __future__ import annotations

from dataclasses import dataclass

from patterns.contracts import MatmulSpec

from ...targets import Target
from ..instance import GridRule
from .variant import Specialised, Variant, common_defines, texts

_BLOCK = 128
_THREADS = 256
# Rows of a unit of few rows.
_FEW = 64
# The codes that the matrix instructions of a target multiply.
_CODES = {"gfx950": "float8_e4m3fn", "gfx942": "float8_e4m3fnuz"}
# Workgroups that a compute unit has room for at once: their registers leave it to two, on gfx942 LDS to one.
_RESIDENT = {"gfx950": 2, "gfx942": 1}


@dataclass(frozen=True)
class ProductTile:
    """Say how a product is divided among workgroups.

    Up to ``few_rows`` rows a unit of work is 64 rows by ``few_columns`` columns, whose K the waves share;
    with more it is ``rows`` by ``columns``, whose columns they share.
    """

    few_rows: int
    few_columns: int = 16
    rows: int = 128
    columns: int = 128


def default_tile(spec: MatmulSpec, target: Target) -> ProductTile:
    """Larger units once there is one for every second compute unit.  A rule: nothing was measured."""
    tile, enough = ProductTile(0), target.multiprocessors // 2
    fewest = -(-enough // -(-spec.columns // tile.columns))
    width = 2 if spec.columns >= 2 * tile.few_columns * enough else 1
    return ProductTile(max(_FEW, (fewest - 1) * tile.rows), width * tile.few_columns)


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    codes = _CODES[target.name]
    if spec.group != _BLOCK and not (spec.whole and spec.depth % _BLOCK == 0):
        of = f"rows of {spec.depth}" if spec.whole else str(spec.group)
        return (
            f"The product kernel of {target.name} knows groups of {_BLOCK} and rows of whole ones, not {of}."
        )
    if {spec.a_dtype, spec.b_dtype} not in ({codes}, {"int8"}):
        given = f"{spec.a_dtype} and {spec.b_dtype}"
        return f"The product kernel of {target.name} multiplies {codes} or int8, not {given}."
    return None


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    tile = tile if isinstance(tile, ProductTile) else default_tile(spec, target)
    resident = _RESIDENT[target.name]
    workgroups = target.multiprocessors * resident
    values = {
        "FEW_ROWS": tile.few_rows,
        "FEW_COLUMNS": tile.few_columns,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "THREADS": _THREADS,
        "RESIDENT": resident,
        "WORKGROUPS": workgroups,
    }
    grid_rule = GridRule(1, most=1, columns=workgroups)
    return Specialised(texts({**common_defines(spec), **values}), grid_rule, _THREADS)


VARIANT = Variant(
    "matmul.hip", ("shuffled_16x16",), ("column", "column_tma", "row"), _why_unsupported, _specialise
)
