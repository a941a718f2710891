"""Respell updates of what a model writes to, so that IREE writes the new elements alone.

An update at indices is IREE's scatter: a place for each combination of indices, along all axes up to the last
that has one, and what stands behind it.  What is elsewhere is not touched, however much it is.  Places
outside of the tensor, which PyTorch refuses, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg

from patterns import torch_ir

from . import respell_index, tensors

_P = arith.CmpIPredicate
# What gives the new value of a tensor, and which operand that is.
_UPDATES = {
    "torch.aten.index_put": 0,
    "torch.aten.index_put.hacked_twin": 0,
    "torch.aten.scatter.src": 0,
    "torch.aten.scatter.value": 0,
    "torch.aten.slice_scatter": 0,
    "torch.aten.select_scatter": 0,
    "torch_c.from_builtin_tensor": 0,
    "torch_c.to_builtin_tensor": 0,
    "tensor.cast": 0,
    "tensor.collapse_shape": 0,
    "tensor.expand_shape": 0,
    "tensor.bitcast": 0,
    "tensor.insert_slice": 1,
    "iree_linalg_ext.scatter": -1,
}
# What moves elements of 8 bits, of which the compiler for NVIDIA knows no floats.
_AS_BYTES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def is_written(value: ir.Value) -> bool:
    """Tell whether ``value`` is a tensor that the model writes to, before or after some of its updates."""
    while (op := torch_ir.producer(value)) is not None and op.name in _UPDATES:
        value = op.operands[_UPDATES[op.name] % len(op.operands)]
    return torch_ir.is_written(value)


def index_put(op: ir.Operation) -> list[ir.Value] | None:
    """Put elements at indices along some axes."""
    type_, values = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(op.operands[2])
    if type_ is None or values is None or not type_.shape or not is_written(op.operands[0]):
        return None
    indices, adds = respell_index.spelled(op), torch_ir.constant(op.operands[3])
    given = {axis: index for axis, index in enumerate(indices or ()) if index is not None}
    if not given or adds is not False or values.dtype != type_.dtype:
        return None
    places = {axis: torch_ir.to_builtin(index) for axis, index in given.items()}
    shape = respell_index.broadcast(list(places.values()))
    target = torch_ir.to_builtin(op.operands[0])
    sizes, count = tensors.sizes(target), max(places) + 1
    kept = [axis for axis in range(count) if axis not in places]
    # A place for each along the axes in front that have no index, and for those of the indices.
    batch = [*(sizes[axis] for axis in kept), *shape]
    maps = [respell_index.aligned(index, len(kept), len(shape), len(batch)) for index in places.values()]
    numbers = dict(zip(places, range(len(places)), strict=True))

    def along(axis: int, elements: Sequence[ir.Value]) -> ir.Value:
        if axis in numbers:
            return respell_index.wrapped(elements[numbers[axis]], sizes[axis])
        return linalg.IndexOp(kept.index(axis)).result

    rows = _Rows(list(places.values()), maps, batch, [*places], along)
    first = 0 if max(places) - min(places) >= len(places) else min(places)
    behind = range(len(batch), len(batch) + len(sizes) - count)
    order = [*range(first), *range(len(kept), len(batch)), *range(first, len(kept)), *behind]
    elements = _in_order(torch_ir.to_builtin(op.operands[2]), order, [*batch, *sizes[count:]])
    return _scattered(op, target, rows, elements, sizes[:count])


def scatter(op: ir.Operation) -> list[ir.Value] | None:
    """Put an element wherever an index along one axis says."""
    type_, index = (torch_ir.tensor_type(op.operands[number]) for number in (0, 2))
    axis, source = torch_ir.constant(op.operands[1]), torch_ir.tensor_type(op.operands[3])
    if type_ is None or index is None or source is None or not type_.shape or not isinstance(axis, int):
        return None
    if source.shape != index.shape or source.dtype != type_.dtype or not is_written(op.operands[0]):
        return None
    target, places = torch_ir.to_builtin(op.operands[0]), torch_ir.to_builtin(op.operands[2])
    sizes, batch, rank = tensors.sizes(target), tensors.sizes(places), len(type_.shape)

    def along(number: int, elements: Sequence[ir.Value]) -> ir.Value:
        if number == axis % rank:
            return respell_index.wrapped(elements[0], sizes[number])
        return linalg.IndexOp(number).result

    rows = _Rows([places], [ir.AffineMap.get_identity(rank)], batch, [axis % rank], along)
    return _scattered(op, target, rows, torch_ir.to_builtin(op.operands[3]), sizes)


@dataclass(frozen=True)
class _Rows:
    """Places in a tensor, one for each in a loop over ``shape``.

    inputs, maps: the indices, and where the loop reads them.  named: the axes that these are along.  along:
    the place along an axis, given an element of each index.
    """

    inputs: list[ir.Value]
    maps: list[ir.AffineMap]
    shape: list[tensors.Size]
    named: list[int]
    along: Callable[[int, Sequence[ir.Value]], ir.Value]

    def places(self, axes: int) -> ir.Value:
        """The places, [N, axes]."""
        rank, i64 = len(self.shape), ir.IntegerType.get_signless(64)
        wider = [ir.AffineMap.get(rank + 1, 0, list(map_.results)) for map_ in self.maps]

        def place(*elements: ir.Value) -> ir.Value:
            chosen = self.along(axes - 1, elements)
            for axis in reversed(range(axes - 1)):
                is_it = arith.CmpIOp(_P.eq, linalg.IndexOp(rank).result, tensors.index(axis)).result
                chosen = arith.SelectOp(is_it, self.along(axis, elements), chosen).result
            return arith.IndexCastOp(i64, chosen).result

        made = _computed(self.inputs, [*self.shape, axes], wider, i64, place)
        return tensors.collapse(made, [list(range(rank)), [rank]])

    def inside(self, sizes: Sequence[tensors.Size]) -> ir.Value:
        """Tell which places are in a tensor of these sizes, [N]."""
        i1 = ir.IntegerType.get_signless(1)

        def is_inside(*elements: ir.Value) -> ir.Value:
            inside = arith.ConstantOp(i1, 1).result
            for axis in self.named:  # of unsigned numbers those before the tensor are large
                place = self.along(axis, elements)
                hit = arith.CmpIOp(_P.ult, place, tensors.index(sizes[axis])).result
                inside = arith.AndIOp(inside, hit).result
            return inside

        made = _computed(self.inputs, self.shape, self.maps, i1, is_inside)
        return tensors.collapse(made, [list(range(len(self.shape)))])


def _computed(
    inputs: Sequence[ir.Value],
    shape: Sequence[tensors.Size],
    maps: Sequence[ir.AffineMap],
    element: ir.Type,
    body: Callable[..., ir.Value],
) -> ir.Value:
    """A tensor of which each element is computed from those of ``inputs``."""
    places = [*maps, ir.AffineMap.get_identity(len(shape))]
    kinds = [tensors.PARALLEL] * len(shape)
    return tensors.generic(inputs, tensors.empty(shape, element), places, kinds, body)


def _in_order(values: ir.Value, order: Sequence[int], shape: Sequence[tensors.Size]) -> ir.Value:
    """``values``, whose axes are the last of ``order`` or have one element, with this ``shape``."""
    type_ = ir.RankedTensorType(values.type)
    last = list(order)[len(order) - type_.rank :]
    same = type_.shape == tensors.typed(shape, type_.element_type).shape
    if last == list(range(len(shape))) and same:
        return values
    places = [
        ir.AffineExpr.get_constant(0) if size == 1 != shape[axis] else ir.AffineExpr.get_dim(axis)
        for size, axis in zip(type_.shape, last, strict=True)
    ]
    return _computed(
        [values], shape, [ir.AffineMap.get(len(shape), 0, places)], type_.element_type, lambda x, _: x
    )


def _scattered(
    op: ir.Operation, target: ir.Value, rows: _Rows, elements: ir.Value, sizes: Sequence[tensors.Size]
) -> list[ir.Value]:
    """``target`` with ``elements`` in these of its places; ``sizes``: of the axes that they are along."""
    result = torch_ir.tensor_type(op.result)
    assert result is not None
    whole = ir.RankedTensorType(target.type).element_type
    if result.dtype in _AS_BYTES:
        byte = ir.IntegerType.get_signless(8)
        target, elements = (_bitcast(value, byte) for value in (target, elements))
    batch, rank = len(rows.shape), ir.RankedTensorType(elements.type).rank
    updates = tensors.collapse(elements, [list(range(batch)), *([axis] for axis in range(batch, rank))])
    made = _scatter(target, rows.places(len(sizes)), rows.inside(sizes), updates)
    if result.dtype in _AS_BYTES:
        made = _bitcast(made, whole)
    return [torch_ir.from_builtin(tensors.cast(made, result.builtin()), result)]


def _bitcast(value: ir.Value, element: ir.Type) -> ir.Value:
    shape = ir.RankedTensorType(value.type).shape
    type_ = ir.RankedTensorType.get(shape, element)
    return ir.Operation.create("tensor.bitcast", results=[type_], operands=[value]).result


def _scatter(target: ir.Value, places: ir.Value, kept: ir.Value, updates: ir.Value) -> ir.Value:
    """IREE's scatter of those updates that are ``kept``."""
    type_ = ir.RankedTensorType(target.type)
    axes = ir.RankedTensorType(places.type).shape[-1]
    op = ir.Operation.create(
        "iree_linalg_ext.scatter",
        results=[type_],
        operands=[updates, places, kept, target],
        attributes={
            "dimension_map": ir.DenseI64ArrayAttr.get(list(range(axes))),
            "unique_indices": ir.BoolAttr.get(True),
        },
        regions=1,
    )
    block = op.regions[0].blocks.append(type_.element_type, type_.element_type)
    with ir.InsertionPoint(block):
        ir.Operation.create("iree_linalg_ext.yield", operands=[block.arguments[0]])
    return op.result


RULES = {
    "torch.aten.index_put": index_put,
    "torch.aten.index_put.hacked_twin": index_put,
    "torch.aten.scatter.src": scatter,
}
