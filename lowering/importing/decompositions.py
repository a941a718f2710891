"""Decompose, when importing, operations that the torch dialect has no form of, or a wrong one.

PyTorch's own decompositions where it has one, and functions of the same signature where it has none.  A
function returns NotImplemented for a case that needs no other form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.utils._pytree import tree_map

from . import fake_quantized, indexed, pictures

_ATEN = torch.ops.aten
Number = int | float | bool

# PyTorch's rules for what it counts among its core operations, but the torch dialect lowers not, or badly.
_BROKEN_UP = (
    _ATEN.squeeze.dims,
    _ATEN._native_batch_norm_legit_no_training,
    _ATEN._native_batch_norm_legit,
    _ATEN._native_batch_norm_legit_functional,
    _ATEN._native_batch_norm_legit.no_stats,
    _ATEN.native_batch_norm,
    _ATEN.upsample_linear1d,
    _ATEN.upsample_bilinear2d,
    _ATEN.upsample_trilinear3d,
    _ATEN.upsample_bicubic2d,
    _ATEN._adaptive_avg_pool2d,
    _ATEN.addmv,
    _ATEN.dist,
    _ATEN.narrow_copy,
    _ATEN.permute_copy,
    _ATEN.view_copy,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The rules of this file, by operation."""
    rules = {**get_decompositions(_BROKEN_UP), **_RULES}
    # That of transformers, where it is imported: what its mixtures of experts call off bfloat16.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return rules if fallback is None else {**rules, fallback.default: _grouped_product}


def _empty_permuted(size: Sequence[int], order: Sequence[int], **options: Any) -> Tensor:
    """An uninitialised tensor of other strides, as ``zeros_like`` of a transposed one begins."""
    return torch.empty(size, dtype=options.get("dtype"), device=options.get("device"))


def _grouped_product(
    x: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply each row of ``x`` [S, K] by the matrix of its group, of ``weights`` [E, K, N].

    Group e ends before row ``offs[e]``; rows behind the last group are zero.  Every group's product of all
    rows is computed and one of them kept: right for any offsets, and E times the work.
    """
    if offs is None or x.dim() != 2 or weights.dim() != 3 or bias is not None:
        return NotImplemented
    rows, groups = torch.arange(x.shape[0], device=x.device), weights.shape[0]
    group = (rows.unsqueeze(-1) >= offs).sum(-1)
    kept = torch.matmul(x, weights)[group.clamp(max=groups - 1), rows]
    kept = torch.where((group < groups).unsqueeze(-1), kept, torch.zeros_like(kept))
    return kept if out_dtype is None else kept.to(out_dtype)


def _scaled_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    result_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """The product of fp8 that ``torch.ops.lowering.block_scaled_matmul`` defines, of b [K, N].

    A scale is of a whole tensor, of each row of a and column of b, or of 128 along K, of b in squares.
    """
    dtype, a_rows = out_dtype or a.dtype, a_scale.shape[:1] if a_scale.dim() == 2 else ()
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or a_scale.dtype != torch.float32:
        return NotImplemented
    if a_rows in ((), (1,)) and guard_or_false(a_scale.numel() == 1):
        a_scale = a_scale.reshape(1)
    elif not guard_or_false(a_scale.shape[0] == a.shape[0]):
        return NotImplemented  # squares of a
    b_scale = b_scale.t() if b_scale.dim() == 2 else b_scale.reshape(1, 1)
    product = torch.ops.lowering.block_scaled_matmul
    if bias is None or bias.dtype == dtype:
        return product(a, b.t(), a_scale, b_scale, dtype, bias)
    return (product(a, b.t(), a_scale, b_scale, torch.float32) + bias.float()).to(dtype)


def _histc(x: Tensor, bins: int = 100, min: Number = 0, max: Number = 0) -> Tensor:
    """Count the elements that lie in each of ``bins`` equal parts of a range, its end included.

    Without a range it is that of the elements, and one around them where they are all equal.
    """
    flat = x.flatten()
    low, high = flat.new_full((), min), flat.new_full((), max)
    if min == max:
        low, high = flat.amin(), flat.amax()
        equal = low == high
        low, high = torch.where(equal, low - 1, low), torch.where(equal, high + 1, high)
    inside = (flat >= low) & (flat <= high)
    place = ((flat - low) / (high - low) * bins).floor().clamp(0, bins - 1)
    parts = torch.arange(bins, device=x.device, dtype=place.dtype)
    return ((place.unsqueeze(-1) == parts) & inside.unsqueeze(-1)).sum(0).to(x.dtype)


def _with_tensor(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Number], Tensor]:
    """``op`` of a tensor and a number, which takes the tensor's dtype."""
    return lambda x, number: op(
        x, torch.full((), number, dtype=torch.result_type(x, number), device=x.device)
    )


def _mul(x: Tensor, y: Tensor | Number) -> Tensor:
    """A complex tensor times a real one, or a number: both parts of it."""
    if isinstance(y, Tensor) and y.is_complex() and not (isinstance(x, Tensor) and x.is_complex()):
        x, y = y, x
    if not x.is_complex() or isinstance(y, complex) or (isinstance(y, Tensor) and y.is_complex()):
        return NotImplemented
    factor = y.unsqueeze(-1) if isinstance(y, Tensor) else y
    return torch.view_as_complex((torch.view_as_real(x) * factor).contiguous())


def _pad(x: Tensor, pad: Sequence[int], value: Number = 0) -> Tensor:
    """Padding by less than nothing, which cuts."""
    if not any(isinstance(size, int) and size < 0 for size in pad):
        return NotImplemented
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = x.dim() - 1 - number
        cut, left = max(0, -before), x.shape[axis] - max(0, -before) - max(0, -after)
        x = x.narrow(axis, cut, left)
    return _ATEN.constant_pad_nd.default(x, [max(0, size) for size in pad], value)


def _abs(x: Tensor) -> Tensor:
    """The magnitude of complex numbers."""
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_real(x).square().sum(-1).sqrt()


def _std(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: Number | None = None, keepdim: bool = False
) -> Tensor:
    """The root of a variance that may be too large for the type that its root is of."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return NotImplemented
    variance = _ATEN.var.correction(x.double(), dim, correction=correction, keepdim=keepdim)
    return variance.sqrt().to(x.dtype)


def _running(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``op``, a running sum or product, of float32 in float64, as PyTorch computes it on the CPU."""
    along = _of_three_axes(op)

    def wide(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
        if (dtype or x.dtype) != torch.float32:
            return along(x, dim, dtype=dtype)
        return op(x.to(torch.float32).double(), dim).to(torch.float32)

    return wide


def _of_three_axes(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``op`` along one axis of many, the axes before it joined, and those behind it.

    IREE keeps a tile of the other axes on the stack, and of many it takes too large a one.
    """

    def along(x: Tensor, dim: int | None = None, *others: Any, **named: Any) -> Tensor:
        if dim is None or x.dim() <= 3:
            return NotImplemented
        dim %= x.dim()
        before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
        made = op(x.reshape(before, x.shape[dim], after), 1, *others, **named)
        return made.reshape(*x.shape[:dim], *made.shape[1:-1], *x.shape[dim + 1 :])

    return along


def _of_a_vector(op: Callable[..., Any], otherwise: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``op`` along the axis that a tensor without axes does not have: that of a vector of one element."""

    def along(x: Tensor, *others: Any, **named: Any) -> Any:
        if x.dim():
            return otherwise(x, *others, **named) if otherwise else NotImplemented
        return tree_map(lambda made: made.reshape(()), op(x.reshape(1), *others, **named))

    return along


def _place_of(op: Callable[..., Any]) -> Callable[..., Tensor]:
    """The place of an extreme, of which ``op`` gives the value too.

    Of the place alone IREE keeps a tile of elements, widened, on the stack, as large as a dynamic axis.
    """

    def place(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        of = _of_a_vector(op) if x.dim() == 0 else op
        if dim is not None:
            return of(x, dim, keepdim)[1]
        found = op(x.reshape(-1), 0)[1]
        return found.reshape([1] * x.dim()) if keepdim else found

    return place


def _leaky_relu(x: Tensor, slope: Number = 0.01) -> Tensor:
    """A choice, which keeps the sign of a zero; a sum of both halves does not."""
    return torch.where(x > 0, x, x * slope)


def _signbit(x: Tensor) -> Tensor:
    """Tell where the sign is set, of a zero and of a NaN too."""
    if not x.is_floating_point():
        return x < 0
    as_integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.dtype.itemsize]
    return x.view(as_integer) < 0


def _copysign(x: Tensor, y: Tensor) -> Tensor:
    """The magnitude of ``x`` with the sign of ``y``."""
    dtype = torch.result_type(x, y)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    magnitude = x.to(dtype).abs()
    return torch.where(_signbit(y), -magnitude, magnitude)


def _angle(x: Tensor) -> Tensor:
    """Zero or pi, of a real number."""
    if x.is_complex() or not x.is_floating_point():
        return NotImplemented
    made = torch.where(x < 0, torch.full_like(x, math.pi), torch.zeros_like(x))
    return torch.where(x.isnan(), x, made)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of the two in the middle, or a NaN if there is one, and where it is."""
    if not x.dim():
        return x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    found = _ATEN.kthvalue.default(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    if not x.is_floating_point():
        return found
    largest, first = x.max(dim, keepdim)  # a NaN, if there is one
    return torch.where(largest.isnan(), largest, found[0]), torch.where(largest.isnan(), first, found[1])


def _median_of_numbers(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of the two in the middle of those that are no NaN, and where it is."""
    if not x.is_floating_point() or not x.dim():
        return _median(x, dim, keepdim)
    ordered, places = x.sort(dim)  # NaN behind all others
    middle = ((~x.isnan()).sum(dim, keepdim=True) - 1).clamp(min=0) // 2
    value, place = ordered.gather(dim, middle), places.gather(dim, middle)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


def _of_all(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """The value that ``op`` gives of all elements in a row."""
    return lambda x: op(x.reshape(-1), 0)[0]


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """A logarithm of a sum for each number of elements: one running sum would overflow."""
    if x.is_complex():
        return NotImplemented
    if not x.dim():
        return x.clone()
    x = x.movedim(dim, -1)
    size = x.shape[-1]
    so_far = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    made = torch.where(so_far, x.unsqueeze(-2), float("-inf")).logsumexp(-1)
    return made.movedim(-1, dim)


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    """The root of two squares, which may be too large for the type that it is of."""
    dtype = torch.result_type(x, y)
    return (x.double().square() + y.double().square()).sqrt().to(dtype)


def _larger(x: Tensor, y: Tensor) -> Tensor:
    """The larger element, a number where the other is NaN."""
    return torch.where(torch.isnan(y), x, torch.where(torch.isnan(x), y, torch.maximum(x, y)))


def _smaller(x: Tensor, y: Tensor) -> Tensor:
    """The smaller element, a number where the other is NaN."""
    return torch.where(torch.isnan(y), x, torch.where(torch.isnan(x), y, torch.minimum(x, y)))


_SHIFTS_AND_BITS = {
    "__lshift__": torch.bitwise_left_shift,
    "__rshift__": torch.bitwise_right_shift,
    "__and__": torch.bitwise_and,
    "__or__": torch.bitwise_or,
    "__xor__": torch.bitwise_xor,
}
_WITH_NUMBER = {
    _ATEN.bitwise_left_shift.Tensor_Scalar: torch.bitwise_left_shift,
    _ATEN.bitwise_right_shift.Tensor_Scalar: torch.bitwise_right_shift,
    _ATEN.bitwise_and.Scalar: torch.bitwise_and,
    _ATEN.bitwise_or.Scalar: torch.bitwise_or,
    _ATEN.bitwise_xor.Scalar: torch.bitwise_xor,
}

_OF_AN_AXIS = (
    *(_ATEN.amax.default, _ATEN.amin.default, _ATEN.max.dim, _ATEN.min.dim, _ATEN.any.dim),
    *(
        _ATEN.view.dtype,
        _ATEN.prod.dim_int,
        _ATEN.var.correction,
        _ATEN._softmax.default,
        _ATEN._log_softmax.default,
    ),
)

_RULES: dict[Any, Callable[..., Any]] = {
    **indexed.RULES,
    **pictures.RULES,
    **fake_quantized.RULES,
    _ATEN.histc.default: _histc,
    _ATEN.empty_permuted.default: _empty_permuted,
    _ATEN._grouped_mm.default: _grouped_product,
    _ATEN._scaled_mm.default: _scaled_product,
    _ATEN.mul.Tensor: _mul,
    _ATEN.mul.Scalar: _mul,
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.abs.default: _abs,
    _ATEN.std.correction: _std,
    **{op: _running(op) for op in (_ATEN.cumsum.default, _ATEN.cumprod.default)},
    _ATEN.argmax.default: _place_of(_ATEN.max.dim),
    _ATEN.argmin.default: _place_of(_ATEN.min.dim),
    **{op: _of_a_vector(op) for op in _OF_AN_AXIS},
    _ATEN.leaky_relu.default: _leaky_relu,
    _ATEN.signbit.default: _signbit,
    _ATEN.copysign.Tensor: _copysign,
    _ATEN.copysign.Scalar: _with_tensor(_copysign),
    _ATEN.angle.default: _angle,
    _ATEN.median.dim: _median,
    _ATEN.median.default: _of_all(_median),
    _ATEN.nanmedian.dim: _median_of_numbers,
    _ATEN.nanmedian.default: _of_all(_median_of_numbers),
    _ATEN.logcumsumexp.default: _logcumsumexp,
    _ATEN.hypot.default: _hypot,
    _ATEN.fmax.default: _larger,
    _ATEN.fmin.default: _smaller,
    **{getattr(_ATEN, name).Tensor: op for name, op in _SHIFTS_AND_BITS.items()},
    **{getattr(_ATEN, name).Scalar: _with_tensor(op) for name, op in _SHIFTS_AND_BITS.items()},
    **{op: _with_tensor(meaning) for op, meaning in _WITH_NUMBER.items()},
}
