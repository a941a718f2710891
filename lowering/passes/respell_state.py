"""Respell updates of what a model writes to, so that IREE writes the new elements alone.

An update at indices is IREE's scatter, of the memory as rows: a row for each place that the indices name, and
what stands behind the last of these axes in it.  What is elsewhere is not touched, however much it is.  Places
outside of the tensor, which PyTorch refuses, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    # A row for each place along the axes in front that have no index, and along those of the indices.
    batch = [*(sizes[axis] for axis in kept), *shape]
    loops = range(len(kept), len(batch))
    maps = [respell_index.aligned(index, len(kept), len(shape), len(batch)) for index in places.values()]

    def row(*elements: ir.Value) -> ir.Value:
        named = dict(zip(places, elements, strict=False))
        parts = [
            (respell_index.wrapped(named[axis], sizes[axis]), sizes[axis])
            if axis in named
            else (linalg.IndexOp(kept.index(axis)).result, sizes[axis])
            for axis in range(count)
        ]
        return _row(parts, set(places))

    rows = _computed(list(places.values()), batch, maps, row)
    first = 0 if max(places) - min(places) >= len(places) else min(places)
    behind = range(len(batch), len(batch) + len(sizes) - count)
    order = [*range(first), *loops, *range(first, len(kept)), *behind]
    elements = _in_order(torch_ir.to_builtin(op.operands[2]), order, [*batch, *sizes[count:]])
    return _scattered(op, target, rows, elements, count)


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

    def row(element: ir.Value, *_: ir.Value) -> ir.Value:
        parts = [(linalg.IndexOp(number).result, sizes[number]) for number in range(rank)]
        parts[axis % rank] = (respell_index.wrapped(element, sizes[axis % rank]), sizes[axis % rank])
        return _row(parts, {axis % rank})

    rows = _computed([places], batch, [ir.AffineMap.get_identity(rank)], row)
    return _scattered(op, target, rows, torch_ir.to_builtin(op.operands[3]), rank)


def _row(parts: Sequence[tuple[ir.Value, tensors.Size]], named: set[int]) -> ir.Value:
    """The number of a row, of a place along each axis and the axis's size; -1 outside of the tensor."""
    number, inside = tensors.index(0), arith.ConstantOp(ir.IntegerType.get_signless(1), 1).result
    for axis, (place, size) in enumerate(parts):
        if axis in named:  # of unsigned numbers those before the tensor are large
            hit = arith.CmpIOp(_P.ult, place, tensors.index(size)).result
            inside = arith.AndIOp(inside, hit).result
        scaled = arith.MulIOp(number, tensors.index(size)).result
        number = arith.AddIOp(scaled, place).result
    i64 = ir.IntegerType.get_signless(64)
    outside = arith.ConstantOp(i64, -1).result
    return arith.SelectOp(inside, arith.IndexCastOp(i64, number).result, outside).result


def _computed(
    inputs: Sequence[ir.Value],
    shape: Sequence[tensors.Size],
    maps: Sequence[ir.AffineMap],
    body: Callable[..., ir.Value],
) -> ir.Value:
    """A tensor of int64, each element computed."""
    init = tensors.empty(shape, ir.IntegerType.get_signless(64))
    identity = ir.AffineMap.get_identity(len(shape))
    return tensors.generic(inputs, init, [*maps, identity], [tensors.PARALLEL] * len(shape), body)


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
    maps = [ir.AffineMap.get(len(shape), 0, places), ir.AffineMap.get_identity(len(shape))]
    init = tensors.empty(shape, type_.element_type)
    return tensors.generic([values], init, maps, [tensors.PARALLEL] * len(shape), lambda x, _: x)


def _scattered(
    op: ir.Operation, target: ir.Value, rows: ir.Value, elements: ir.Value, count: int
) -> list[ir.Value]:
    """``target`` with ``elements`` in these of its rows, which are what ``count`` leading axes name."""
    result = torch_ir.tensor_type(op.result)
    assert result is not None
    whole, batch = ir.RankedTensorType(target.type), ir.RankedTensorType(rows.type).rank
    sizes = tensors.sizes(target)
    if result.dtype in _AS_BYTES:
        byte = ir.IntegerType.get_signless(8)
        target, elements = (_bitcast(value, byte) for value in (target, elements))
    behind = [list(range(count, whole.rank))] if count < whole.rank else []
    groups = [list(range(count)), *behind]
    flat = tensors.collapse(target, groups)
    indices = tensors.collapse(rows, [list(range(batch))])
    updates = tensors.collapse(elements, [list(range(batch)), *[[a - count + batch for a in g] for g in behind]])
    made = tensors.expand(_scatter(flat, indices, updates), groups, sizes)
    if result.dtype in _AS_BYTES:
        made = _bitcast(made, whole.element_type)
    return [torch_ir.from_builtin(tensors.cast(made, result.builtin()), result)]


def _bitcast(value: ir.Value, element: ir.Type) -> ir.Value:
    shape = ir.RankedTensorType(value.type).shape
    type_ = ir.RankedTensorType.get(shape, element)
    return ir.Operation.create("tensor.bitcast", results=[type_], operands=[value]).result


def _scatter(flat: ir.Value, rows: ir.Value, updates: ir.Value) -> ir.Value:
    """IREE's scatter of rows, without those whose number is negative."""
    shape, element = tensors.sizes(rows), ir.RankedTensorType(flat.type).element_type
    i1 = ir.IntegerType.get_signless(1)
    identity = ir.AffineMap.get_identity(1)

    def is_inside(number: ir.Value, _: ir.Value) -> ir.Value:
        return arith.CmpIOp(_P.sge, number, arith.ConstantOp(number.type, 0).result).result

    kept = tensors.generic(
        [rows], tensors.empty(shape, i1), [identity, identity], [tensors.PARALLEL], is_inside
    )
    op = ir.Operation.create(
        "iree_linalg_ext.scatter",
        results=[flat.type],
        operands=[updates, rows, kept, flat],
        attributes={
            "dimension_map": ir.DenseI64ArrayAttr.get([0]),
            "unique_indices": ir.BoolAttr.get(True),
        },
        regions=1,
    )
    block = op.regions[0].blocks.append(element, element)
    with ir.InsertionPoint(block):
        ir.Operation.create("iree_linalg_ext.yield", operands=[block.arguments[0]])
    return op.result


RULES = {
    "torch.aten.index_put": index_put,
    "torch.aten.index_put.hacked_twin": index_put,
    "torch.aten.scatter.src": scatter,
}
