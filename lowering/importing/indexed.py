"""Decompose reads and updates at indices: searches, masks, multiples of rows, reductions, bags of embeddings.

A function has the signature of its operation and returns NotImplemented for a case that needs no other form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.symbolic_shapes import guard_or_false

_ATEN = torch.ops.aten
Number = int | float | bool


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


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Elements of a complex tensor: both parts of each."""
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_complex(_ATEN.index.Tensor(torch.view_as_real(x), indices).contiguous())


def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """Put the values, in order, where a mask is set; one value everywhere, if they have no such axis.

    Axes of indices that others are between come first, as they do in the values.
    """
    used = [axis for axis, index in enumerate(indices) if index is not None]
    masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if used and not masked and used != list(range(used[0], used[-1] + 1)):
        order = [*used, *(axis for axis in range(x.dim()) if axis not in used)]
        chosen = [indices[axis] for axis in used]
        put = _ATEN.index_put.default(x.permute(order), chosen, values, accumulate)
        return put.permute([order.index(axis) for axis in range(x.dim())])
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


def _gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Of a number, itself."""
    return NotImplemented if x.dim() else x.expand(index.shape).clone()


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


# PyTorch's own form.
_ADDED = get_decompositions([_ATEN.index_add])[_ATEN.index_add.default]


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Number = 1) -> Tensor:
    """An update of 16 bits with multiples, of which PyTorch rounds the sum alone."""
    if alpha == 1 or x.dtype not in (torch.bfloat16, torch.float16):
        return _ADDED(x, dim, index, source, alpha=alpha)
    return _ADDED(x.float(), dim, index, source.float() * alpha).to(x.dtype)


def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """As a ``scatter_reduce`` whose indices are those of whole rows."""
    if not x.dim():
        made = _index_reduce(
            x.reshape(1), 0, index.reshape(-1), source.reshape(-1), reduce, include_self=include_self
        )
        return made.reshape(())
    dim %= x.dim()
    rows = index.reshape([-1 if axis == dim else 1 for axis in range(x.dim())]).expand_as(source)
    return _ATEN.scatter_reduce.two(x, dim, rows, source, reduce, include_self=include_self)


def _scatter_with(x: Tensor, dim: int, index: Tensor, source: Tensor | Number, *, reduce: str) -> Tensor:
    """As a ``scatter_reduce``, which names its reductions otherwise."""
    if not isinstance(source, Tensor):
        source = torch.full(index.shape, source, dtype=x.dtype, device=x.device)
    source = source[tuple(slice(0, size) for size in index.shape)]
    return _ATEN.scatter_reduce.two(x, dim, index, source, {"add": "sum", "multiply": "prod"}[reduce])


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """As an ``index_put`` of the elements in a row."""
    flat = _ATEN.index_put.default(x.reshape(-1), (index.reshape(-1),), source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """As the update of a slice: PyTorch's own form looks at every element."""
    dim %= x.dim()
    place = index if guard_or_false(index >= 0) else index + x.shape[dim]
    return _ATEN.slice_scatter.default(x, src.unsqueeze(dim), dim, place, place + 1)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, mean or largest of the rows of each bag, zeros where it is empty.

    Of the other three results, which ``F.embedding_bag`` does not return, the last is zeros: places of the
    largest, which training reads.
    """
    bags = offsets.shape[0] - include_last_offset
    place = torch.arange(indices.shape[0], device=indices.device)
    bag = (place.unsqueeze(-1) >= offsets[:bags]).sum(-1) - 1
    kept = (bag >= 0) & (indices != padding_idx if padding_idx >= 0 else True)
    if include_last_offset:
        kept = kept & (place < offsets[-1])
    rows, to = weight[indices].to(torch.promote_types(weight.dtype, torch.float32)), bag.clamp(min=0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    count = torch.zeros(bags, dtype=torch.int64, device=indices.device).index_add(0, to, kept.to(torch.int64))
    filled = kept.unsqueeze(-1)
    empty = torch.zeros(bags, weight.shape[1], dtype=rows.dtype, device=rows.device)
    if mode == 2:
        rows = torch.where(filled, rows, float("-inf"))
        largest = _index_reduce(torch.full_like(empty, float("-inf")), 0, to, rows, "amax")
        made = torch.where((count > 0).unsqueeze(-1), largest, empty)
    else:
        made = empty.index_add(0, to, torch.where(filled, rows, 0.0))
        made = made / count.clamp(min=1).unsqueeze(-1) if mode == 1 else made
    return made.to(weight.dtype), bag, count, torch.zeros_like(count)


RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.searchsorted.Tensor: _searchsorted,
    _ATEN.searchsorted.Scalar: _searchsorted,
    _ATEN.bucketize.Tensor: _bucketize,
    _ATEN.bucketize.Scalar: _bucketize,
    _ATEN.index.Tensor: _index,
    _ATEN.index_put.default: _index_put,
    _ATEN.index_add.default: _index_add,
    _ATEN.index_fill.int_Scalar: _index_fill,
    _ATEN.index_fill.int_Tensor: _index_fill,
    _ATEN.gather.default: _gather,
    _ATEN.index_reduce.default: _index_reduce,
    _ATEN.scatter.reduce: _scatter_with,
    _ATEN.scatter.value_reduce: _scatter_with,
    _ATEN.masked_scatter.default: _masked_scatter,
    _ATEN.select_scatter.default: _select_scatter,
    _ATEN.put.default: _put,
    _ATEN._embedding_bag.default: _embedding_bag,
    _ATEN._embedding_bag_forward_only.default: _embedding_bag,
}
