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
        while _is_of_slice(op.operands[0]):
            cut = maker(op.operands[0])
            assert cut is not None
            with ir.InsertionPoint(op), op.location:
                places = _PLACES[cut.name](cut, list(op.operands)[1:])
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


def maker(value: ir.Value) -> ir.Operation | None:
    """The operation that makes ``value``; None for an argument."""
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def _is_of_slice(value: ir.Value) -> bool:
    """Tell whether ``value`` is a slice, in whatever shape."""
    while (op := maker(value)) is not None and op.name in _PLACES:
        if op.name == _SLICE:
            return True
        value = op.operands[0]
    return False


def _negation(concat: ir.Operation) -> ir.Operation | None:
    """The negation of the first of two slices, where they are not the halves of a tensor exchanged."""
    makers = [maker(part) for part in concat.operands]
    if len(makers) != 2 or makers[0] is None or makers[0].name != "linalg.generic":
        return None
    made = list(makers[0].regions[0].blocks[0].operations)
    first, second = maker(makers[0].operands[0]), makers[1]
    slices = all(maker is not None and maker.name == _SLICE for maker in (first, second))
    if len(made) != 2 or made[0].operation.name != "arith.negf" or not slices:
        return None
    return None if _are_halves_exchanged(first, second) else made[0].operation  # type: ignore[arg-type]


def _are_halves_exchanged(first: ir.Operation, second: ir.Operation) -> bool:
    """Tell whether these slices are the second and the first half of a tensor along its last axis."""
    *rest, half = bounds(first, 1)[1]
    offsets, ones = [0] * len(rest), [1] * (len(rest) + 1)
    return (
        first.operands[0] == second.operands[0]
        and bounds(first, 1) == [[*offsets, half], [*rest, half], ones]
        and bounds(second, 1) == [[*offsets, 0], [*rest, half], ones]
    )


def _places_in_source(cut: ir.Operation, places: Sequence[ir.Value]) -> list[ir.Value]:
    """Find where an element of a slice is in the tensor that it was cut from."""
    offsets, sizes, strides = bounds(cut, 1)
    left_out = dropped(sizes, ir.RankedTensorType(cut.result.type).shape)
    remaining, found = list(places), []
    for offset, stride, out in zip(offsets, strides, left_out, strict=True):
        step = tensors.index(0) if out else arith.MulIOp(remaining.pop(0), tensors.index(stride)).result
        found.append(arith.AddIOp(tensors.index(offset), step).result)
    return found


def _places_in_collapsed(view: ir.Operation, places: Sequence[ir.Value]) -> list[ir.Value]:
    """Find where an element of joined axes is along each of them."""
    sizes, found = tensors.sizes(view.operands[0]), []
    if not places:  # a number, of axes of one element each
        return [tensors.index(0)] * len(sizes)
    for axes, place in zip(_groups(view), places, strict=True):
        inner, rest = [], place
        for axis in reversed(axes[1:]):
            size = tensors.index(sizes[axis])
            inner.insert(0, arith.RemUIOp(rest, size).result)
            rest = arith.DivUIOp(rest, size).result
        found += [rest, *inner]
    return found


def _places_in_expanded(view: ir.Operation, places: Sequence[ir.Value]) -> list[ir.Value]:
    """Find where an element of axes that were one is along that one."""
    sizes, found = tensors.sizes(view.result), []
    for axes in _groups(view):
        place = places[axes[0]] if axes else tensors.index(0)
        for axis in axes[1:]:
            whole = arith.MulIOp(place, tensors.index(sizes[axis])).result
            place = arith.AddIOp(whole, places[axis]).result
        found.append(place)
    return found


def _groups(view: ir.Operation) -> list[list[int]]:
    return [[int(axis.value) for axis in group] for group in view.attributes["reassociation"]]  # type: ignore


_PLACES = {
    _SLICE: _places_in_source,
    "tensor.collapse_shape": _places_in_collapsed,
    "tensor.expand_shape": _places_in_expanded,
}


def dropped(sizes: Sequence[tensors.Size], shape: Sequence[int]) -> list[bool]:
    """Tell which axes of a slice, each of one element, a tensor of this shape is without."""
    left, found = list(shape), []
    for number, size in enumerate(sizes):
        without = size == 1 and len(left) < len(sizes) - number and left[:1] != [1]
        found.append(without)
        if not without:
            left.pop(0)
    return found


def bounds(op: ir.Operation, operands: int) -> list[list[tensors.Size]]:
    """The offsets, sizes and strides of a slice along each axis; so many ``operands`` are before them."""
    given, dynamic = iter(list(op.operands)[operands:]), ir.ShapedType.get_dynamic_size()
    found: list[list[tensors.Size]] = []
    for name in ("static_offsets", "static_sizes", "static_strides"):
        known = list(ir.DenseI64ArrayAttr(op.attributes[name]))
        found.append([next(given) if number == dynamic else number for number in known])
    return found
