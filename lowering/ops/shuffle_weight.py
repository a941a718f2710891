"""Lay a weight's bytes out for a product kernel: ``torch.ops.lowering.shuffle_weight``, and its inverse.

The formulas of the layouts are in ``patterns.contracts``.  A shuffle moves bytes and computes nothing, so it
is a view, a permutation of axes and, for ``swizzled_128``, one of chunks.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from patterns.contracts import DEPTH_MULTIPLE, ROW_MULTIPLE, WeightLayout, stored_rows

from .checks import QUANTIZED_DTYPES, check_choice, check_dtype, shape_text

WEIGHT_LAYOUTS: tuple[WeightLayout, ...] = get_args(WeightLayout)
_CHUNK = 16  # bytes that stay together in every layout
_CHUNKS = 8  # of a row of a swizzled tile
# Bytes of a weight that the eager operations move at a time: of some megabytes all stays in a cache.
_PIECE = 4 << 20


def shuffle_weight_reference(w: Tensor, layout: WeightLayout) -> Tensor:
    """The bytes of w [N, K] in ``layout``, as a tensor [N', K]: N' is N rounded up, padding rows zero.

    Source: AITER's shuffle_weight(w, (16, 16)); the 128-byte swizzle of Hopper's shared memory.
    """
    rows, depth = w.shape
    padding = stored_rows(rows, layout) - rows
    if padding:
        w = torch.cat([w, w.new_zeros((padding, depth))])
    tiles = _tiles_of_rows(w, layout)
    return (_swizzled(tiles) if layout == "swizzled_128" else tiles).contiguous().view(w.shape)


def unshuffle_weight_reference(stored: Tensor, layout: WeightLayout) -> Tensor:
    """The weight [N', K], padding rows included, whose bytes in ``layout`` are ``stored``."""
    tiles = _tiles_stored(stored, layout)
    rows = (_swizzled(tiles) if layout == "swizzled_128" else tiles).permute(_BACK[layout])
    return rows.contiguous().view(stored.shape)


def _tiles_of_rows(w: Tensor, layout: WeightLayout) -> Tensor:
    """[N, K] as a view whose axes are those of ``_tiles_stored``."""
    rows, depth = w.shape
    if layout == "shuffled_16x16":
        return w.view(rows // 16, 16, depth // _CHUNK, _CHUNK).permute(0, 2, 1, 3)
    if layout == "swizzled_128":
        return w.view(rows // 128, 16, _CHUNKS, depth // 128, _CHUNKS, _CHUNK).permute(0, 3, 1, 2, 4, 5)
    return w


def _tiles_stored(stored: Tensor, layout: WeightLayout) -> Tensor:
    """[N', K] as a view: [tile, place along K, row, (chunk,) byte]; rows of swizzled tiles are two axes."""
    rows, depth = stored.shape
    if layout == "shuffled_16x16":
        return stored.view(rows // 16, depth // _CHUNK, 16, _CHUNK)
    if layout == "swizzled_128":
        return stored.view(rows // 128, depth // 128, 16, _CHUNKS, _CHUNKS, _CHUNK)
    return stored


# The axes of tiles in the order of rows, by layout.
_BACK: dict[WeightLayout, tuple[int, ...]] = {
    "row": (0, 1),
    "shuffled_16x16": (0, 2, 1, 3),
    "swizzled_128": (0, 2, 3, 1, 4, 5),
}


def _swizzled(tiles: Tensor) -> Tensor:
    """[.., row, chunk, byte]: chunk c of row r moved to place c ^ r, which is its own inverse."""
    rows = [
        torch.cat([tiles[..., row, chunk ^ row, :].unsqueeze(-2) for chunk in range(_CHUNKS)], dim=-2)
        for row in range(_CHUNKS)
    ]
    return torch.stack(rows, dim=-3)


def _move(rows: Tensor, stored: Tensor, layout: WeightLayout, *, back: bool) -> None:
    """Copy ``rows`` [N, K] to ``stored``, or back: whole tiles, on the CPU, in no memory but theirs.

    By numpy, which moves 16 bytes at once and starts no threads: weights are folded several at a time.
    """
    tile = max(ROW_MULTIPLE.values())
    step = max(1, _PIECE // max(1, rows.shape[1] * tile)) * tile
    for first in range(0, rows.shape[0], step):
        piece = slice(first, first + step)
        a, b = _chunks(_tiles_of_rows(rows[piece], layout)), _chunks(_tiles_stored(stored[piece], layout))
        pairs = [(a, b)]
        if layout == "swizzled_128":
            places = [(row, chunk) for row in range(_CHUNKS) for chunk in range(_CHUNKS)]
            pairs = [(a[..., row, chunk], b[..., row, chunk ^ row]) for row, chunk in places]
        for source, target in ((b, a) if back else (a, b) for a, b in pairs):
            target[...] = source


def _chunks(tiles: Tensor) -> np.ndarray:
    """[.., 16 bytes] as an array of chunks that shares its memory."""
    return tiles.view(torch.uint8).numpy().view(np.dtype((np.void, _CHUNK)))[..., 0]


@torch.library.custom_op(
    "lowering::shuffle_weight", mutates_args=(), schema="(Tensor w, str layout) -> Tensor"
)
def shuffle_weight(w: Tensor, layout: str) -> Tensor:
    """A weight as a product kernel reads it: the bytes of w [N, K] in ``layout``, as a tensor [N', K].

    w: [N, K] of an 8-bit dtype, or of bytes that hold several codes each.  layout ``shuffled_16x16``: K a
    multiple of 32, N' = N rounded up to 16; ``swizzled_128``: K a multiple of 128, N' = N rounded up to 128;
    ``row``: as it is.  Added rows are zeros.
    ``block_scaled_matmul`` takes the result with ``b_layout``.  Raises ValueError naming the argument that
    does not fit.
    Source: AITER's shuffle_weight(w, (16, 16)); the 128-byte swizzle of Hopper's shared memory.
    """
    checked = _checked(w, layout)
    if layout == "row" or not w.is_cpu:
        return shuffle_weight_reference(w, checked).clone()
    result = w.new_empty((stored_rows(w.shape[0], checked), w.shape[1]))
    whole = w.shape[0] // ROW_MULTIPLE[checked] * ROW_MULTIPLE[checked]
    _move(w[:whole].contiguous(), result[:whole], checked, back=False)
    if whole < w.shape[0]:
        result[whole:] = shuffle_weight_reference(w[whole:].contiguous(), checked)
    return result


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
    checked = check_stored("stored", stored, "layout", layout)
    if layout == "row" or not stored.is_cpu:
        return unshuffle_weight_reference(stored, checked).clone()
    result = stored.new_empty(stored.shape)
    _move(result, stored.contiguous(), checked, back=True)
    return result


@unshuffle_weight.register_fake
def _(stored: Tensor, layout: str) -> Tensor:
    check_stored("stored", stored, "layout", layout)
    return stored.new_empty(stored.shape)


def check_stored(name: str, stored: Tensor, layout_name: str, layout: str) -> WeightLayout:
    """The layout, if ``stored`` can be a weight in it.  Raises ValueError naming the argument if not."""
    checked = _checked(stored, layout, name, layout_name)
    multiple = ROW_MULTIPLE[checked]
    if stored.shape[0] % multiple:
        text = shape_text(stored)
        raise ValueError(f"{name}: layout {layout!r} has a multiple of {multiple} rows, and this is {text}")
    return checked


def _checked(w: Tensor, layout: str, name: str = "w", layout_name: str = "layout") -> WeightLayout:
    """The layout, if there can be a weight like ``w`` in it, up to its padding."""
    check_choice(layout_name, layout, WEIGHT_LAYOUTS)
    check_dtype(name, w, (*QUANTIZED_DTYPES, torch.uint8))
    if w.dim() != 2:
        raise ValueError(f"{name}: expected a weight [N, K], got {shape_text(w)}")
    multiple = DEPTH_MULTIPLE[layout]  # pyright: ignore[reportArgumentType]
    if w.shape[1] % multiple:
        text = shape_text(w)
        raise ValueError(
            f"{name}: layout {layout!r} has rows of a multiple of {multiple}, and this is {text}"
        )
    return layout  # pyright: ignore[reportReturnType]
