"""How a weight's bytes are laid out for a product kernel: ``torch.ops.lowering.shuffle_weight``, its inverse.

The formulas of the layouts are in ``patterns.contracts``.  A shuffle moves bytes and computes nothing, so it
is a view, a permutation of axes and, for ``swizzled_128``, one of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from patterns.contracts import DEPTH_MULTIPLE, LARGEST_FINITE, ROW_MULTIPLE, WeightLayout, stored_rows

from .checks import check_choice, check_dtype, shape_text

WEIGHT_LAYOUTS: tuple[WeightLayout, ...] = get_args(WeightLayout)
_DTYPES = tuple(getattr(torch, name) for name in LARGEST_FINITE)
_CHUNK = 16  # bytes that stay together in every layout
_CHUNKS = 8  # of a row of a swizzled tile
_MOST_ROWS = max(ROW_MULTIPLE.values())
# Bytes of a weight that the eager operations move at a time.
_PIECE = 8 << 20


def shuffle_weight_reference(w: Tensor, layout: WeightLayout) -> Tensor:
    """The bytes of w [N, K] in ``layout``, as a tensor [N', K]: N' is N rounded up, padding rows zero.

    Source: AITER's shuffle_weight(w, (16, 16)); the 128-byte swizzle of Hopper's shared memory.
    """
    rows, depth = w.shape
    padding = stored_rows(rows, layout) - rows
    if padding:
        w = torch.cat([w, w.new_zeros((padding, depth))])
    return _TO[layout](w).contiguous().view(rows + padding, depth)


def unshuffle_weight_reference(stored: Tensor, layout: WeightLayout) -> Tensor:
    """The weight [N', K], padding rows included, whose bytes in ``layout`` are ``stored``."""
    return _FROM[layout](stored).contiguous().view(stored.shape)


def _to_shuffled(w: Tensor) -> Tensor:
    return w.view(w.shape[0] // 16, 16, w.shape[1] // _CHUNK, _CHUNK).permute(0, 2, 1, 3)


def _from_shuffled(stored: Tensor) -> Tensor:
    return stored.view(stored.shape[0] // 16, stored.shape[1] // _CHUNK, 16, _CHUNK).permute(0, 2, 1, 3)


def _to_swizzled(w: Tensor) -> Tensor:
    tiles = w.view(w.shape[0] // 128, 128 // _CHUNKS, _CHUNKS, w.shape[1] // 128, _CHUNKS, _CHUNK)
    return _swizzled(tiles.permute(0, 3, 1, 2, 4, 5))


def _from_swizzled(stored: Tensor) -> Tensor:
    rows, depth = stored.shape
    tiles = stored.view(rows // 128, depth // 128, 128 // _CHUNKS, _CHUNKS, _CHUNKS, _CHUNK)
    return _swizzled(tiles).permute(0, 2, 3, 1, 4, 5)


def _swizzled(tiles: Tensor) -> Tensor:
    """[.., row, chunk, byte]: chunk c of row r moved to place c ^ r, which is its own inverse."""
    rows = [
        torch.cat([tiles[..., row, chunk ^ row, :].unsqueeze(-2) for chunk in range(_CHUNKS)], dim=-2)
        for row in range(_CHUNKS)
    ]
    return torch.stack(rows, dim=-3)


_Move = Callable[[Tensor], Tensor]
_TO: dict[WeightLayout, _Move] = {
    "row": lambda w: w,
    "shuffled_16x16": _to_shuffled,
    "swizzled_128": _to_swizzled,
}
_FROM: dict[WeightLayout, _Move] = {
    "row": lambda stored: stored,
    "shuffled_16x16": _from_shuffled,
    "swizzled_128": _from_swizzled,
}


@torch.library.custom_op(
    "lowering::shuffle_weight", mutates_args=(), schema="(Tensor w, str layout) -> Tensor"
)
def shuffle_weight(w: Tensor, layout: str) -> Tensor:
    """A weight as a product kernel reads it: the bytes of w [N, K] in ``layout``, as a tensor [N', K].

    w: [N, K] of an 8-bit dtype.  layout ``shuffled_16x16``: K a multiple of 32, N' = N rounded up to 16;
    ``swizzled_128``: K a multiple of 128, N' = N rounded up to 128; ``row``: as it is.  Added rows are zeros.
    ``block_scaled_matmul`` takes the result with ``b_layout``.  Raises ValueError naming the argument that
    does not fit.
    Source: AITER's shuffle_weight(w, (16, 16)); the 128-byte swizzle of Hopper's shared memory.
    """
    return _moved(w, stored_rows(w.shape[0], _checked(w, layout)), layout, shuffle_weight_reference)


@shuffle_weight.register_fake
def _(w: Tensor, layout: str) -> Tensor:
    return w.new_empty((stored_rows(w.shape[0], _checked(w, layout)), w.shape[1]))


@torch.library.custom_op(
    "lowering::unshuffle_weight", mutates_args=(), schema="(Tensor stored, str layout) -> Tensor"
)
def unshuffle_weight(stored: Tensor, layout: str) -> Tensor:
    """The weight [N', K], padding rows included, that ``shuffle_weight`` made ``stored`` of.

    Raises ValueError naming the argument that does not fit.
    """
    check_stored("stored", stored, "layout", layout)
    return _moved(stored, stored.shape[0], layout, unshuffle_weight_reference)


@unshuffle_weight.register_fake
def _(stored: Tensor, layout: str) -> Tensor:
    check_stored("stored", stored, "layout", layout)
    return stored.new_empty(stored.shape)


def _moved(source: Tensor, rows: int, layout: str, move: Callable[[Tensor, WeightLayout], Tensor]) -> Tensor:
    """``move`` of ``source``, piece after piece: beside the result it takes the memory of one piece."""
    result = source.new_empty((rows, source.shape[1]))
    step = max(1, _PIECE // max(1, source.shape[1] * _MOST_ROWS)) * _MOST_ROWS
    for first in range(0, rows, step):
        piece = move(source[first : first + step].contiguous(), layout)  # pyright: ignore[reportArgumentType]
        result[first : first + step] = piece
    return result


def check_stored(name: str, stored: Tensor, layout_name: str, layout: str) -> None:
    """That ``stored`` can be a weight in ``layout``.  Raises ValueError naming the argument if not."""
    multiple = ROW_MULTIPLE[_checked(stored, layout, name, layout_name)]
    if stored.shape[0] % multiple:
        text = shape_text(stored)
        raise ValueError(f"{name}: layout {layout!r} has a multiple of {multiple} rows, and this is {text}")


def _checked(w: Tensor, layout: str, name: str = "w", layout_name: str = "layout") -> WeightLayout:
    """The layout, if there can be a weight like ``w`` in it, up to its padding."""
    check_choice(layout_name, layout, WEIGHT_LAYOUTS)
    check_dtype(name, w, _DTYPES)
    if w.dim() != 2:
        raise ValueError(f"{name}: expected a weight [N, K], got {shape_text(w)}")
    multiple = DEPTH_MULTIPLE[layout]  # pyright: ignore[reportArgumentType]
    if w.shape[1] % multiple:
        text = shape_text(w)
        raise ValueError(
            f"{name}: layout {layout!r} has rows of a multiple of {multiple}, and this is {text}"
        )
    return layout  # pyright: ignore[reportReturnType]
