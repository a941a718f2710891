"""Step 7, respell updates that IREE computes wrongly as a choice for each element of a tensor.

Where a dispatch has several results, and one of them is put into another, or two of them into one tensor,
IREE lets it write both into the same memory, in any order.  So each element of the result is chosen: what is
put there, or what it was.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg, tensor

from ..passes import tensors
from .places import barred
from .slices import bounds, dropped, maker

_P = arith.CmpIPredicate
_UPDATE = "tensor.insert_slice"
# No dispatch has other results beside these.
_GIVEN = ("hal.tensor.import", "util.global.load", "arith.constant", "tensor.empty", "linalg.fill")


def choose_elements(module: ir.Module) -> None:
    """Respell such updates in ``module``, as it is after IREE's torch pipeline, in place."""
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        operations = [op.operation for block in function.regions[0].blocks for op in block.operations]
        for op in (op for op in operations if op.name == _UPDATE):
            if _is_computed_with_target(op):
                with ir.InsertionPoint(op), op.location:
                    op.result.replace_all_uses_with(_chosen(op))
                op.erase()


def _is_computed_with_target(op: ir.Operation) -> bool:
    """Tell whether what is put, and what is there, may be results of one dispatch: they share a value."""
    source, target = op.operands[0], op.operands[1]
    shared = _computed_from(source)
    while (earlier := maker(target)) is not None and earlier.name == _UPDATE:
        if not _are_apart(op, earlier) and not shared.isdisjoint(_computed_from(earlier.operands[0])):
            return True
        target = earlier.operands[1]
    return not shared.isdisjoint(_computed_from(target))


def _computed_from(value: ir.Value) -> set[ir.Value]:
    """The tensors that the program computes on the way to ``value``, itself included."""
    found: set[ir.Value] = set()
    left = [value]
    while left:
        value = left.pop()
        op = maker(value)
        if op is not None and op.name not in _GIVEN and isinstance(value.type, ir.RankedTensorType):
            left += [operand for operand in op.operands if operand not in found]
            found.add(value)
    return found


def _are_apart(one: ir.Operation, other: ir.Operation) -> bool:
    """Tell whether two updates are known to have no place in common."""
    axes = zip(zip(*bounds(one, 2), strict=True), zip(*bounds(other, 2), strict=True), strict=True)
    return any(_is_before(a, b) or _is_before(b, a) for a, b in axes)


def _is_before(one: tuple[tensors.Size, ...], other: tuple[tensors.Size, ...]) -> bool:
    """Tell whether a range, an offset, a size and a stride, is known to end before another begins."""
    (offset, size, stride), begin = one, other[0]
    if not isinstance(begin, int) or not isinstance(offset, int):
        return False
    return isinstance(size, int) and isinstance(stride, int) and offset + (size - 1) * stride < begin


def _chosen(op: ir.Operation) -> ir.Value:
    """The updated tensor.

    What is put there is computed before: of a tensor that elements are picked from by their places IREE may
    compute these alone, in a dispatch where something else reads the whole of it.
    """
    source, target = op.operands[0], op.operands[1]
    source = barred(source, op) if _computed_from(source) else source
    sizes, ranges = tensors.sizes(target), list(zip(*bounds(op, 2), strict=True))
    source_sizes = tensors.sizes(source)
    left_out = dropped([size for _, size, _ in ranges], ir.RankedTensorType(source.type).shape)

    def element(before: ir.Value, _: ir.Value) -> ir.Value:
        inside, places, left = arith.ConstantOp(ir.IntegerType.get_signless(1), 1).result, [], [*source_sizes]
        for axis, (range_, out) in enumerate(zip(ranges, left_out, strict=True)):
            hit, place = _place(linalg.IndexOp(axis).result, *range_)
            inside = arith.AndIOp(inside, hit).result
            if not out:
                places.append(_within(place, left.pop(0)))
        return arith.SelectOp(inside, tensor.ExtractOp(source, places).result, before).result

    identity = ir.AffineMap.get_identity(len(sizes))
    made = tensors.empty(sizes, ir.RankedTensorType(target.type).element_type)
    return tensors.generic([target], made, [identity, identity], [tensors.PARALLEL] * len(sizes), element)


def _place(
    number: ir.Value, offset: tensors.Size, size: tensors.Size, stride: tensors.Size
) -> tuple[ir.Value, ir.Value]:
    """Tell whether an element of an axis is in a range, and which one of the range it is."""
    distance = arith.SubIOp(number, tensors.index(offset)).result
    place = distance if stride == 1 else arith.FloorDivSIOp(distance, tensors.index(stride)).result
    # Of unsigned numbers those before the range are large.
    hit = arith.CmpIOp(_P.ult, place, tensors.index(size)).result
    if stride != 1:
        reached = arith.MulIOp(place, tensors.index(stride)).result
        hit = arith.AndIOp(hit, arith.CmpIOp(_P.eq, reached, distance).result).result
    return hit, place


def _within(place: ir.Value, size: tensors.Size) -> ir.Value:
    """A place that can be read, the same where it is one of the axis."""
    if size == 1:
        return tensors.index(0)
    last = size - 1 if isinstance(size, int) else arith.SubIOp(size, tensors.index(1)).result
    below = arith.MinSIOp(place, tensors.index(last)).result
    return arith.MaxSIOp(below, tensors.index(0)).result
