"""Decompose fake quantizations, of training aware of quantization: to codes and back, in the tensor's dtype.

The arithmetic is that of PyTorch's CPU kernels: a product with the inverse scale, rounded to even, then the
zero point, then the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


def _fake_quantized(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The values that codes stand for, and where ``x`` is within their range."""
    zero = zero.to(torch.float32)
    code = (x.float() * (1.0 / scale.float())).round() + zero
    within = (code >= low) & (code <= high)
    return ((code.clamp(low, high) - zero) * scale.float()).to(x.dtype), within


def _of_a_tensor(x: Tensor, scale: float, zero: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    scales, zeros = (torch.full((), number, device=x.device) for number in (float(scale), float(zero)))
    return _fake_quantized(x, scales, zeros, low, high)


def _of_a_tensor_given(
    x: Tensor, scale: Tensor, zero: Tensor, enabled: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    made, within = _fake_quantized(x, scale, zero, low, high)
    is_on = enabled.reshape(()) != 0
    return torch.where(is_on, made, x), within | ~is_on


def _of_channels(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    shape = [-1 if number == axis % x.dim() else 1 for number in range(x.dim())]
    return _fake_quantized(x, scale.reshape(shape), zero.reshape(shape), low, high)


RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.fake_quantize_per_tensor_affine_cachemask.default: _of_a_tensor,
    _ATEN._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: _of_a_tensor_given,
    _ATEN.fake_quantize_per_channel_affine_cachemask.default: _of_channels,
}
