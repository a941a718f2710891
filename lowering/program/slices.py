"""Step 7, respell slices that IREE reads wrongly.

Elements that are picked one by one from a slice are read as if it were a tensor of its own, rows next to each
other: they are picked from the tensor that it was cut from.  Two slices of a tensor, the first of them
negated, one behind the other, are taken for its halves exchanged, whatever slices they are: where they are
not, the negation is a product, which IREE does not look for.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith, tensor

from ..passes import tensors

_SLICE, _CONCAT, _ELEMENT = "tensor.extract_slice", "tensor.concat", "tensor.extract"


def mend_slices(module: ir.Module) -> None:
    """Respell such slices in ``module``, as it is after IREE's torch pipeline, in place."""
    for op in _named(module, _ELEMENT):
        while (cut := _maker(op.operands[0])) is not None and cut.name == _SLICE:
            with ir.InsertionPoint(op), op.location:
                places = _places_in_source(cut, list(op.operands)[1:])
                picked = tensor.ExtractOp(cut.operands[0], places)
            op.result.replace_all_uses_with(picked.result)
            op.erase()
            op = picked.operation
    for op in _named(module, _CONCAT):
        if (negation := _negation(op)) is not None:
            with ir.InsertionPoint(negation), negation.location:
                number = arith.ConstantOp(negation.result.type, -1.0).result
                negation.result.replace_all_uses_with(arith.MulFOp(negation.operands[0], number).result)


def _named(module: ir.Module, name: str) -> list[ir.Operation]:
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.operation.name == name:
            found.append(op.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _maker(value: ir.Value) -> ir.Operation | None:
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def _negation(concat: ir.Operation) -> ir.Operation | None:
    """The negation of the first of two slices, where they are not the halves of a tensor exchanged."""
    makers = [_maker(part) for part in concat.operands]
    if len(makers) != 2 or makers[0] is None or makers[0].name != "linalg.generic":
        return None
    made = list(makers[0].regions[0].blocks[0].operations)
    first, second = _maker(makers[0].operands[0]), makers[1]
    slices = all(maker is not None and maker.name == _SLICE for maker in (first, second))
    if len(made) != 2 or made[0].operation.name != "arith.negf" or not slices:
        return None
    return None if _are_halves_exchanged(first, second) else made[0].operation  # type: ignore[arg-type]


def _are_halves_exchanged(first: ir.Operation, second: ir.Operation) -> bool:
    """Tell whether these slices are the second and the first half of a tensor along its last axis."""
    *rest, half = _bounds(first)[1]
    offsets, ones = [0] * len(rest), [1] * (len(rest) + 1)
    return (
        first.operands[0] == second.operands[0]
        and _bounds(first) == [[*offsets, half], [*rest, half], ones]
        and _bounds(second) == [[*offsets, 0], [*rest, half], ones]
    )


def _places_in_source(cut: ir.Operation, places: Sequence[ir.Value]) -> list[ir.Value]:
    """Find where an element of a slice is in the tensor that it was cut from."""
    offsets, sizes, strides = _bounds(cut)
    shape, remaining = list(ir.RankedTensorType(cut.result.type).shape), list(places)
    found = []
    for offset, size, stride in zip(offsets, sizes, strides, strict=True):
        dropped = size == 1 and len(remaining) < len(sizes) and not (shape and shape[0] == 1)
        if dropped:
            found.append(tensors.index(offset))
            continue
        shape.pop(0)
        step = arith.MulIOp(remaining.pop(0), tensors.index(stride)).result
        found.append(arith.AddIOp(tensors.index(offset), step).result)
    return found


def _bounds(cut: ir.Operation) -> list[list[tensors.Size]]:
    """The offsets, sizes and strides of a slice, along each axis of the tensor that it was cut from."""
    given, dynamic = iter(list(cut.operands)[1:]), ir.ShapedType.get_dynamic_size()
    found: list[list[tensors.Size]] = []
    for name in ("static_offsets", "static_sizes", "static_strides"):
        known = list(ir.DenseI64ArrayAttr(cut.attributes[name]))
        found.append([next(given) if number == dynamic else number for number in known])
    return found
