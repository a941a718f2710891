"""Decompose what convolutional models use: pools, samples of grids, transposed convolutions.

A function has the signature of its operation and returns NotImplemented for a case that needs no other form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._pytree import tree_map

_ATEN = torch.ops.aten


def _max_pool(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` of a picture without a batch, as a batch of one; with windows that reach over the end padded."""

    def pool(
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Any:
        if x.dim() == 3:
            made = op(x.unsqueeze(0), kernel, stride, padding, dilation, ceil_mode)
            return tree_map(lambda result: result.squeeze(0), made)
        if not ceil_mode or not x.is_floating_point() or not all(isinstance(n, int) for n in x.shape[2:]):
            return NotImplemented
        axes = [
            _reach(
                size,
                *(
                    of[-1] if len(of) < 2 else of[axis]
                    for of in (kernel, stride or kernel, padding, dilation)
                ),
            )
            for axis, size in enumerate(x.shape[2:])
        ]
        (top, bottom), (left, right) = axes
        wide = _ATEN.constant_pad_nd.default(x, [left, right, top, bottom], float("-inf"))
        made = op(wide, kernel, stride, (0, 0), dilation, False)
        if isinstance(made, Tensor):
            return made
        value, place = made
        row, column = place // wide.shape[-1] - top, place % wide.shape[-1] - left
        return value, row * x.shape[-1] + column

    return pool


def _adaptive_max_pool2d(x: Tensor, size: Sequence[int]) -> Any:
    """Of a picture without a batch, as a batch of one."""
    if x.dim() != 3:
        return NotImplemented
    return tree_map(lambda made: made.squeeze(0), _ATEN.adaptive_max_pool2d.default(x.unsqueeze(0), size))


def _reach(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """How much is missing before and behind an axis for its last window, which begins within it."""
    window = dilation * (kernel - 1) + 1
    count = -(-(size + 2 * padding - window) // stride) + 1
    count -= (count - 1) * stride >= size + padding
    return padding, max(padding, (count - 1) * stride + window - size - padding)


# PyTorch's own form.
_SAMPLED = get_decompositions([_ATEN.grid_sampler_2d])[_ATEN.grid_sampler_2d.default]


def _grid_sampler(x: Tensor, grid: Tensor, *modes: int | bool) -> Tensor:
    """Of 16 bits in float32, rounded once."""
    return (
        _SAMPLED(x.float(), grid.float(), *modes).to(x.dtype)
        if x.dtype.itemsize == 2
        else _SAMPLED(x, grid, *modes)
    )


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """One that is transposed as a plain one, of its input with zeros between the elements.

    One of 16 bits with groups in float32, rounded once: IREE's gives other numbers on GPUs.
    """
    if x.dtype in (torch.bfloat16, torch.float16) and groups > 1:
        wide = (x.float(), weight.float(), None if bias is None else bias.float())
        spatial = (stride, padding, dilation, transposed, output_padding, groups)
        return _ATEN.convolution.default(*wide, *spatial).to(x.dtype)
    if not transposed or x.is_complex():
        return NotImplemented
    axes = weight.dim() - 2
    stride, padding, dilation, output_padding = (
        list(of) * (axes if len(of) == 1 else 1) for of in (stride, padding, dilation, output_padding)
    )
    for axis, step in enumerate(stride):
        x = _with_zeros_between(x, x.dim() - axes + axis, step)
    pads: list[int] = []
    for size, pad, step, more in zip(weight.shape[2:], padding, dilation, output_padding, strict=True):
        around = step * (size - 1) - pad
        pads = [around, around + more, *pads]
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    turned = weight.reshape(groups, inputs, outputs, *weight.shape[2:]).transpose(1, 2)
    turned = turned.reshape(groups * outputs, inputs, *weight.shape[2:]).flip(list(range(2, 2 + axes)))
    x = _ATEN.constant_pad_nd.default(x, pads)
    ones, zeros = [1] * axes, [0] * axes
    return _ATEN.convolution.default(x, turned, bias, ones, zeros, dilation, False, zeros, groups)


def _with_zeros_between(x: Tensor, axis: int, step: int) -> Tensor:
    """``step`` - 1 zeros behind each element along ``axis`` but the last."""
    if step == 1:
        return x
    apart = x.unsqueeze(axis + 1)
    apart = torch.cat([apart, torch.zeros_like(apart).repeat_interleave(step - 1, axis + 1)], axis + 1)
    size = x.shape[axis]
    return apart.flatten(axis, axis + 1).narrow(axis, 0, size * step - (step - 1))


RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.max_pool2d.default: _max_pool(_ATEN.max_pool2d.default),
    _ATEN.max_pool2d_with_indices.default: _max_pool(_ATEN.max_pool2d_with_indices.default),
    _ATEN.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    _ATEN.grid_sampler_2d.default: _grid_sampler,
    _ATEN.convolution.default: _convolution,
}
