"""Lay the scales of a quantization out in memory, and show them as they look from outside.

A scale is logically [..., S]; column-major layouts hold it transposed, in columns that may be padded.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from patterns.contracts import ScaleLayout

from .checks import check_choice

SCALE_LAYOUTS: tuple[ScaleLayout, ...] = get_args(ScaleLayout)

# What the rows of a column-major scale are padded to a multiple of.
_ROW_MULTIPLE = {"column": 1, "column_tma": 4, "ue8m0_packed": 4}
# Scales in one int32 of ``ue8m0_packed``, one byte each.
_PACK = 4


def padded_rows(rows: int, layout: str) -> int:
    """The length of a column of scales: M, or Mp = M rounded up to 4."""
    multiple = _ROW_MULTIPLE[layout]
    return (rows + multiple - 1) // multiple * multiple


def packed_words(groups: int) -> int:
    """Count the int32 that hold the scales of a row in ``ue8m0_packed``."""
    return (groups + _PACK - 1) // _PACK


def to_physical(scale: Tensor, layout: str) -> Tensor:
    """The contiguous tensor that holds the logical ``scale`` [..., S] in ``layout``.

    S is Gn, or ceil(Gn/4) for ``ue8m0_packed``.  ``row``: scale itself.  The others: [S, M], M the product
    of the leading dimensions, or [S, Mp] with columns M to Mp zero.
    Source: DeepGEMM's get_mn_major_tma_aligned_tensor.
    """
    if check_layout(layout) == "row":
        return scale
    columns = scale.reshape(-1, scale.shape[-1]).t() if scale.dim() > 1 else scale.unsqueeze(-1)
    # Before the padding: where that adds nothing it keeps the strides.
    columns = columns.contiguous()
    rows = columns.shape[1]
    return torch.nn.functional.pad(columns, (0, padded_rows(rows, layout) - rows))


def physical_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of what ``to_physical`` returns for a scale of ``shape``."""
    if check_layout(layout) == "row":
        return shape
    return shape[-1], padded_rows(math.prod(shape[:-1]), layout)


def from_physical(physical: Tensor, leading: tuple[int, ...] | torch.Size, layout: str) -> Tensor:
    """The logical scale, shape ``leading`` + (S,), as a view of what ``to_physical`` returned."""
    if check_layout(layout) == "row":
        return physical
    return physical.as_strided(*column_geometry(tuple(leading), physical.shape[0], layout))


def column_geometry(
    leading: tuple[int, ...], last: int, layout: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a logical column-major scale; [M, S] has strides (1, M) or (1, Mp)."""
    rows, strides = 1, []
    for size in reversed(leading):
        strides.append(rows)
        rows = rows * size
    return (*leading, last), (*reversed(strides), padded_rows(rows, layout))


def pack_exponents(scale: Tensor) -> Tensor:
    """float32 [..., Gn] to int32 [..., ceil(Gn/4)]: the first exponent in the lowest byte, pad bytes zero."""
    exponent = (scale.view(torch.int32) >> 23) & 0xFF
    groups = exponent.shape[-1]
    words = packed_words(groups)
    padded = torch.nn.functional.pad(exponent, (0, words * _PACK - groups))
    # Not unbind: there is no lowering for what torch.export makes of it.
    first, second, third, fourth = (padded[..., i::_PACK] for i in range(_PACK))
    return first | (second << 8) | (third << 16) | (fourth << 24)


def check_layout(layout: str) -> ScaleLayout:
    """``layout``, if it is one; ValueError if not."""
    check_choice("scale_layout", layout, SCALE_LAYOUTS)
    return layout  # pyright: ignore[reportReturnType]
