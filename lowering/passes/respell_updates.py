"""Respell updates at a few indices: each element of the result is made of what is put there, in order.

IREE's scatter updates a tensor in place, one element after the other, and IREE's code generator fails for
many of its shapes.  Here the result is a loop over its elements and, within, over the indices: an element is
what was there until an index names its place.  That is a pass over the tensor for each index, so it is for
few of them; more are left to IREE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from iree.compiler import ir
from iree.compiler.dialects import arith, linalg, tensor

from patterns import torch_ir
from patterns.torch_ir import TensorType

from . import respell_index, respell_state, tensors

_MOST = 64  # indices
_P = arith.CmpIPredicate

# What becomes of an element, and of what is put there.
Combine = Callable[[ir.Value, ir.Value], ir.Value]


@dataclass(frozen=True)
class _Put:
    """Elements that are put into ``target`` where, along each of ``axes``, its place is the index.

    maps: where an index, and after them the elements, are read in a loop over the axes of the target and then
    ``loops``, those of the indices.  elements: a tensor, or a number for all.
    """

    target: ir.Value
    axes: tuple[int, ...]
    indices: tuple[ir.Value, ...]
    loops: int
    elements: ir.Value | float
    maps: tuple[ir.AffineMap, ...]
    combine: Combine

    def build(self) -> ir.Value:
        """The updated tensor.

        It is read, not updated: the loop's first turn takes each element from it.
        """
        rank, element = ir.RankedTensorType(self.target.type).rank, _element(self.target)
        moving = [] if isinstance(self.elements, float) else [self.elements]
        sizes = tensors.sizes(self.target)
        same = ir.AffineMap.get(rank + self.loops, 0, [ir.AffineExpr.get_dim(axis) for axis in range(rank)])

        def turn(before: ir.Value, *given: ir.Value) -> ir.Value:
            places, so_far = given[: len(self.axes)], given[-1]
            new = given[len(self.axes)] if moving else _number(self.elements, element)  # type: ignore[arg-type]
            now = arith.SelectOp(_first(rank, self.loops), before, so_far).result
            hit = _hit(self.axes, places, sizes)
            return arith.SelectOp(hit, self.combine(now, new), now).result

        kinds = [tensors.PARALLEL] * rank + [tensors.REDUCTION] * self.loops
        inputs = [self.target, *self.indices, *moving]
        return tensors.generic(inputs, tensors.empty(sizes, element), [same, *self.maps, same], kinds, turn)


def _element(value: ir.Value) -> ir.Type:
    return ir.RankedTensorType(value.type).element_type


def _first(rank: int, loops: int) -> ir.Value:
    """Tell whether all loops over the indices are at their first turn."""
    turns = [linalg.IndexOp(rank + loop).result for loop in range(loops)]
    total = turns[0]
    for other in turns[1:]:
        total = arith.AddIOp(total, other).result
    return arith.CmpIOp(_P.eq, total, tensors.index(0)).result


def _hit(axes: Sequence[int], places: Sequence[ir.Value], sizes: Sequence[tensors.Size]) -> ir.Value:
    hits = [
        arith.CmpIOp(_P.eq, linalg.IndexOp(axis).result, respell_index.wrapped(place, sizes[axis])).result
        for axis, place in zip(axes, places, strict=True)
    ]
    hit = hits[0]
    for other in hits[1:]:
        hit = arith.AndIOp(hit, other).result
    return hit


def _number(value: float, element: ir.Type) -> ir.Value:
    if isinstance(element, ir.IntegerType):
        return arith.ConstantOp(element, ir.IntegerAttr.get(element, int(value) % 2**element.width)).result
    return arith.ConstantOp(element, ir.FloatAttr.get(element, value)).result


def _added(element: ir.Type) -> Combine | None:
    if isinstance(element, ir.IntegerType):
        return None if element.width == 1 else lambda a, b: arith.AddIOp(a, b).result
    return lambda a, b: arith.AddFOp(a, b).result


def _replaced(_: ir.Value, new: ir.Value) -> ir.Value:
    return new


# -- along one axis ---------------------------------------------------------------------------------------


def _scatter(op: ir.Operation, *, adds: bool = False) -> list[ir.Value] | None:
    """One element for each index, in the rows that the index has."""
    target, index = (torch_ir.tensor_type(op.operands[number]) for number in (0, 2))
    axis = torch_ir.constant(op.operands[1])
    if target is None or index is None or not target.shape or not isinstance(axis, int):
        return None
    rank = len(target.shape)
    axis %= rank
    count = index.shape[axis]
    if len(index.shape) != rank or not _is_few([count]) or not _same_rows(op, target, index, axis):
        return None
    value = torch_ir.to_builtin(op.operands[0])
    combine = _added(_element(value)) if adds else _replaced
    elements = _elements(op, index, target.dtype)
    if combine is None or elements is None:
        return None
    places = [ir.AffineExpr.get_dim(rank if number == axis else number) for number in range(rank)]
    maps = (ir.AffineMap.get(rank + 1, 0, places),) * (1 if isinstance(elements, float) else 2)
    indices = (torch_ir.to_builtin(op.operands[2]),)
    return _made(op, _Put(value, (axis,), indices, 1, elements, maps, combine))


def _is_few(counts: Sequence[int | None]) -> bool:
    known = [count for count in counts if count is not None]
    return len(known) == len(counts) and 1 <= math.prod(known) <= _MOST


def _same_rows(op: ir.Operation, target: TensorType, index: TensorType, axis: int) -> bool:
    """Tell whether an index has all rows of the target."""
    known = [torch_ir.example_shape(value) for value in (op.result, op.operands[2])]
    for number, sizes in enumerate(zip(target.shape, index.shape, strict=True)):
        if number == axis or (None not in sizes and sizes[0] == sizes[1]):
            continue
        names = [getattr(shape[number], "factors", ()) if shape else () for shape in known]
        if not names[0] or names[0] != names[1]:
            return False
    return True


def _elements(op: ir.Operation, index: TensorType, dtype: str) -> ir.Value | float | None:
    """Give what is put: as many elements of the tensor as there are indices, or a number."""
    given = op.operands[3]
    source = torch_ir.tensor_type(given)
    if source is None:
        number = torch_ir.constant(given)
        exact = isinstance(number, (int, float)) and abs(number) < 2**53
        return float(torch.tensor(number, dtype=getattr(torch, dtype)).item()) if exact else None
    if source.dtype != dtype or len(source.shape) != len(index.shape):
        return None
    value = torch_ir.to_builtin(given)
    if source.shape == index.shape:
        return value
    wanted = tensors.sizes(torch_ir.to_builtin(op.operands[2]))
    dynamic, rank = ir.ShapedType.get_dynamic_size(), len(wanted)
    return tensor.ExtractSliceOp(
        tensors.typed(wanted, _element(value)),
        value,
        [],
        [size for size in wanted if not isinstance(size, int)],
        [],
        [0] * rank,
        [size if isinstance(size, int) else dynamic for size in wanted],
        [1] * rank,
    ).result


def _made(op: ir.Operation, put: _Put) -> list[ir.Value]:
    result = torch_ir.tensor_type(op.result)
    assert result is not None
    return [torch_ir.from_builtin(tensors.cast(put.build(), result.builtin()), result)]


# -- at indices along several axes ------------------------------------------------------------------------


def _index_put(op: ir.Operation) -> list[ir.Value] | None:
    """Elements, or parts, at the places that the indices name together."""
    indices, target = respell_index.spelled(op), torch_ir.tensor_type(op.operands[0])
    adds, values = torch_ir.constant(op.operands[3]), torch_ir.tensor_type(op.operands[2])
    if indices is None or target is None or values is None or not isinstance(adds, bool):
        return None
    given = {axis: torch_ir.to_builtin(index) for axis, index in enumerate(indices) if index is not None}
    shapes = [ir.RankedTensorType(index.type) for index in given.values()]
    if not given or any(not shape.has_static_shape for shape in shapes) or values.dtype != target.dtype:
        return None
    loops = max(shape.rank for shape in shapes)
    value = torch_ir.to_builtin(op.operands[0])
    combine = _added(_element(value)) if adds else _replaced
    counts = [max(shape.shape[axis] for shape in shapes if shape.rank >= -axis) for axis in range(-loops, 0)]
    if combine is None or not loops or not _is_few(counts) or 0 in [s for t in shapes for s in t.shape]:
        return None
    rank, axes = len(target.shape), tuple(given)
    kept = [axis for axis in range(rank) if axis not in given]
    first = 0 if axes[-1] - axes[0] >= len(axes) else axes[0]
    order = [*kept[:first], *range(rank, rank + loops), *kept[first:]]
    elements = torch_ir.to_builtin(op.operands[2])
    sizes = [*target.shape, *counts]
    maps = [_aligned(shape, range(rank, rank + loops), sizes) for shape in shapes]
    maps.append(_aligned(ir.RankedTensorType(elements.type), order, sizes))
    put = _Put(value, axes, tuple(given.values()), loops, elements, tuple(maps), combine)
    return _made(op, put)


def _aligned(type_: ir.RankedTensorType, order: Sequence[int], loops: Sequence[int | None]) -> ir.AffineMap:
    """Map ``loops`` to where a tensor is read; its axes are the last in ``order``, or have one element."""
    last = list(order)[len(order) - type_.rank :]
    places = [
        ir.AffineExpr.get_constant(0) if size == 1 != loops[axis] else ir.AffineExpr.get_dim(axis)
        for size, axis in zip(type_.shape, last, strict=True)
    ]
    return ir.AffineMap.get(len(loops), 0, places)


def _or(
    rule: Callable[[ir.Operation], list[ir.Value] | None], name: str
) -> Callable[..., list[ir.Value] | None]:
    """Try that of state, then ``rule``; where neither says a thing, do what is done for IREE's own form."""
    of_state = respell_state.RULES.get(name, lambda op: None)

    def either(op: ir.Operation) -> list[ir.Value] | None:
        made = of_state(op) or rule(op)
        return respell_index.RULES[name](op) if made is None else made

    return either


_RULES: dict[str, Callable[[ir.Operation], list[ir.Value] | None]] = {
    "torch.aten.scatter.src": _scatter,
    "torch.aten.scatter.value": _scatter,
    "torch.aten.scatter_add": lambda op: _scatter(op, adds=True),
    "torch.aten.index_put": _index_put,
    "torch.aten.index_put.hacked_twin": _index_put,
}
RULES = {name: _or(rule, name) for name, rule in _RULES.items()}
