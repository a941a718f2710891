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

_ATEN = torch.ops.aten
Number = int | float | bool

# PyTorch's rules for what it counts among its core operations, but the torch dialect lowers not, or badly.
_BROKEN_UP = (
    _ATEN.squeeze.dims,
    _ATEN._native_batch_norm_legit_no_training,
    _ATEN._native_batch_norm_legit,
    _ATEN._native_batch_norm_legit.no_stats,
    _ATEN.native_batch_norm,
    _ATEN.upsample_linear1d,
    _ATEN.upsample_bilinear2d,
    _ATEN.upsample_trilinear3d,
    _ATEN.upsample_bicubic2d,
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


def _searchsorted(
    ordered: Tensor,
    values: Tensor | Number,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Count the elements that a value stands behind, of an ordered row, which each row of values may have."""
    if not isinstance(values, Tensor):
        values = torch.full((), values, dtype=ordered.dtype, device=ordered.device)
    if sorter is not None:
        ordered = ordered.gather(-1, sorter)
    if ordered.dim() > 1:
        ordered = ordered.unsqueeze(-2)
    values = values.unsqueeze(-1)
    behind = ordered > values if right or side == "right" else ordered >= values
    return behind.logical_not().sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _bucketize(
    values: Tensor | Number, ordered: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    return _searchsorted(ordered, values, out_int32=out_int32, right=right)


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


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Elements of a complex tensor: both parts of each."""
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_complex(_ATEN.index.Tensor(torch.view_as_real(x), indices).contiguous())


def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """Put the values, in order, where a mask is set; one value everywhere, if they have no such axis."""
    mask = indices[0] if len(indices) == 1 else None
    if mask is None or mask.dtype != torch.bool:
        return NotImplemented
    rest = x.dim() - mask.dim()
    if values.dim() > rest and not guard_or_false(values.shape[0] == 1):
        place = mask.flatten().to(torch.int64).cumsum(0).sub(1).clamp(min=0)
        values = values[place].reshape(*mask.shape, *values.shape[1:])
    elif values.dim() > rest:
        values = values[0]
    put = x + values if accumulate else values
    return torch.where(mask.reshape(*mask.shape, *[1] * rest), put, x)


def _index_fill(x: Tensor, dim: int, index: Tensor, value: Tensor | Number) -> Tensor:
    """As an ``index_put``: PyTorch's own form asks for the strides of ``x``."""
    if not x.dim():
        return _index_fill(x.reshape(1), 0, index, value).reshape(())
    filled = value if isinstance(value, Tensor) else torch.full((), value, device=x.device)
    before = (None,) * (dim % x.dim())
    return _ATEN.index_put.default(x, (*before, index.reshape(-1)), filled.to(x.dtype))


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Put the elements of ``source``, in their order, where a mask is set."""
    x, mask = torch.broadcast_tensors(x, mask)
    place = mask.flatten().to(torch.int64).cumsum(0).sub(1).clamp(min=0)
    return torch.where(mask, source.flatten()[place].reshape(mask.shape), x)


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


# PyTorch's own form.
_ADDED = get_decompositions([_ATEN.index_add])[_ATEN.index_add.default]


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Number = 1) -> Tensor:
    """An update of 16 bits with multiples, of which PyTorch rounds the sum alone."""
    if alpha == 1 or x.dtype not in (torch.bfloat16, torch.float16):
        return _ADDED(x, dim, index, source, alpha=alpha)
    return _ADDED(x.float(), dim, index, source.float() * alpha).to(x.dtype)


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
    *(_ATEN.prod.dim_int, _ATEN.var.correction, _ATEN._softmax.default, _ATEN._log_softmax.default),
)

_RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.histc.default: _histc,
    _ATEN.searchsorted.Tensor: _searchsorted,
    _ATEN.searchsorted.Scalar: _searchsorted,
    _ATEN.bucketize.Tensor: _bucketize,
    _ATEN.bucketize.Scalar: _bucketize,
    _ATEN.empty_permuted.default: _empty_permuted,
    _ATEN._grouped_mm.default: _grouped_product,
    _ATEN._scaled_mm.default: _scaled_product,
    _ATEN.mul.Tensor: _mul,
    _ATEN.mul.Scalar: _mul,
    _ATEN.index.Tensor: _index,
    _ATEN.index_put.default: _index_put,
    _ATEN.index_add.default: _index_add,
    _ATEN.index_fill.int_Scalar: _index_fill,
    _ATEN.index_fill.int_Tensor: _index_fill,
    _ATEN.masked_scatter.default: _masked_scatter,
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.abs.default: _abs,
    _ATEN.std.correction: _std,
    **{op: _running(op) for op in (_ATEN.cumsum.default, _ATEN.cumprod.default)},
    _ATEN.argmax.default: _place_of(_ATEN.max.dim),
    _ATEN.argmin.default: _place_of(_ATEN.min.dim),
    **{op: _of_a_vector(op) for op in _OF_AN_AXIS},
    _ATEN.fmax.default: _larger,
    _ATEN.fmin.default: _smaller,
    **{getattr(_ATEN, name).Tensor: op for name, op in _SHIFTS_AND_BITS.items()},
    **{getattr(_ATEN, name).Scalar: _with_tensor(op) for name, op in _SHIFTS_AND_BITS.items()},
    **{op: _with_tensor(meaning) for op, meaning in _WITH_NUMBER.items()},
}
