"""Build builtin tensor operations, at the current insertion point: sizes, reshapes, linalg.generic.

A size is a Python integer where it is known when compiling, and otherwise a value of type index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg, tensor

Size = int | ir.Value

PARALLEL, REDUCTION = "parallel", "reduction"


def index(size: Size) -> ir.Value:
    """``size`` as a value of type index."""
    return arith.ConstantOp(ir.IndexType.get(), size).result if isinstance(size, int) else size


def from_torch_int(value: ir.Value) -> ir.Value:
    """A torch integer as a value of type index."""
    i64 = ir.IntegerType.get_signless(64)
    number = ir.Operation.create("torch_c.to_i64", results=[i64], operands=[value]).result
    return arith.IndexCastOp(ir.IndexType.get(), number).result


def sizes(value: ir.Value) -> list[Size]:
    """The sizes of a builtin tensor."""
    type_ = ir.RankedTensorType(value.type)
    return [
        tensor.DimOp(value, index(axis)).result if type_.is_dynamic_dim(axis) else type_.shape[axis]
        for axis in range(type_.rank)
    ]


def product(factors: Sequence[Size]) -> Size:
    """The product of sizes."""
    known: Size = math.prod(factor for factor in factors if isinstance(factor, int))
    unknown = [factor for factor in factors if not isinstance(factor, int)]
    if not unknown or known == 0:
        return known
    total = unknown[0]
    for factor in (*unknown[1:], *([index(known)] if known != 1 else [])):
        total = arith.MulIOp(total, factor).result
    return total


def quotient(total: Size, divisor: Size) -> Size:
    """``total // divisor``; of nothing, nothing."""
    if isinstance(total, int) and isinstance(divisor, int):
        return total // max(divisor, 1)
    divisor = max(divisor, 1) if isinstance(divisor, int) else arith.MaxUIOp(divisor, index(1)).result
    return total if divisor == 1 else arith.DivUIOp(index(total), index(divisor)).result


def typed(shape: Sequence[Size], element: ir.Type) -> ir.RankedTensorType:
    """The type of a tensor with these sizes."""
    dynamic = ir.ShapedType.get_dynamic_size()
    return ir.RankedTensorType.get([size if isinstance(size, int) else dynamic for size in shape], element)


def cast(value: ir.Value, type_: ir.Type) -> ir.Value:
    """``value`` as ``type_``, which knows more sizes, or fewer."""
    return value if value.type == type_ else tensor.CastOp(type_, value).result


def empty(shape: Sequence[Size], element: ir.Type) -> ir.Value:
    """A tensor whose values do not matter."""
    return tensor.EmptyOp(list(shape), element).result


def reassociation(groups: Sequence[Sequence[int]]) -> ir.ArrayAttr:
    """Write groups of axes as collapses and expansions name them."""
    i64 = ir.IntegerType.get_signless(64)
    return ir.ArrayAttr.get(
        [ir.ArrayAttr.get([ir.IntegerAttr.get(i64, axis) for axis in group]) for group in groups]
    )


def collapse(value: ir.Value, groups: Sequence[Sequence[int]]) -> ir.Value:
    """Each group of axes as one."""
    type_, dynamic = ir.RankedTensorType(value.type), ir.ShapedType.get_dynamic_size()
    members = [[type_.shape[axis] for axis in group] for group in groups]
    shape = [dynamic if dynamic in group else math.prod(group) for group in members]
    result = ir.RankedTensorType.get(shape, type_.element_type)
    return tensor.CollapseShapeOp(result, value, reassociation(groups)).result


def expand(value: ir.Value, groups: Sequence[Sequence[int]], shape: Sequence[Size]) -> ir.Value:
    """Each axis as a group of axes, of the sizes ``shape``."""
    element = ir.RankedTensorType(value.type).element_type
    members = [[shape[axis] for axis in group] for group in groups]
    known = [math.prod(group) if all(isinstance(s, int) for s in group) else index(0) for group in members]
    result, dynamic = typed(shape, element), ir.ShapedType.get_dynamic_size()
    return tensor.ExpandShapeOp(
        result,
        cast(value, typed(known, element)),
        reassociation(groups),
        [size for size in shape if not isinstance(size, int)],
        [size if isinstance(size, int) else dynamic for size in shape],
    ).result


def generic(
    inputs: Sequence[ir.Value],
    init: ir.Value,
    maps: Sequence[ir.AffineMap],
    iterators: Sequence[str],
    body: Callable[..., ir.Value],
) -> ir.Value:
    """``linalg.generic`` with one result: ``maps`` are of the inputs and of the result, in that order.

    ``body`` is given an element of each input and of the result, and makes the new element.
    """
    kinds = [ir.Attribute.parse(f"#linalg.iterator_type<{kind}>") for kind in iterators]
    places = ir.ArrayAttr.get([ir.AffineMapAttr.get(m) for m in maps])
    made = linalg.GenericOp([init.type], list(inputs), [init], places, ir.ArrayAttr.get(kinds))
    elements = [ir.ShapedType(value.type).element_type for value in (*inputs, init)]
    block = made.regions[0].blocks.append(*elements)
    with ir.InsertionPoint(block):
        linalg.YieldOp([body(*block.arguments)])
    return made.results[0]
