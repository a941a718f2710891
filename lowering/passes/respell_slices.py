"""Respell slices of an axis whose size is unknown until run time.

torch.export takes such a size for larger than what a constant bound names, and torch-mlir reads as much,
whether it is there or not.  Here bounds are clamped in each call as PyTorch clamps them; a call fails where
the rest of the program was made for another number of elements than there are.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith, tensor

from patterns import torch_ir

from . import tensors

_P = arith.CmpIPredicate


def _slice(op: ir.Operation) -> list[ir.Value] | None:
    found, result = _bounds(op, op.operands[1:]), torch_ir.tensor_type(op.result)
    if found is None or result is None:
        return None
    axis, start, length, step = found
    value = torch_ir.to_builtin(op.operands[0])
    shape = tensors.sizes(value)
    rank, declared = len(shape), result.shape[axis]
    if declared is not None:
        _require(op, _P.eq, length, declared, f"{declared} elements")
    elif _counts_on_bounds(op, axis):
        for bound in op.operands[2:4]:
            if torch_ir.constant(bound) is torch_ir.NOT_CONSTANT:
                _require(op, _P.sge, shape[axis], tensors.from_torch_int(bound), "its bounds")
    shape[axis] = length if declared is None else declared
    dynamic = ir.ShapedType.get_dynamic_size()
    offsets: list[tensors.Size] = [0] * rank
    offsets[axis] = start
    taken = tensor.ExtractSliceOp(
        tensors.typed(shape, ir.RankedTensorType(value.type).element_type),
        value,
        [offset for offset in offsets if not isinstance(offset, int)],
        [size for size in shape if not isinstance(size, int)],
        [],
        [offset if isinstance(offset, int) else dynamic for offset in offsets],
        [size if isinstance(size, int) else dynamic for size in shape],
        [step if number == axis else 1 for number in range(rank)],
    ).result
    return [torch_ir.from_builtin(tensors.cast(taken, result.builtin()), result)]


def _counts_on_bounds(op: ir.Operation, axis: int) -> bool:
    """Tell whether torch.export took the bounds to lie within the axis, for the rest of the program too."""
    before, after = torch_ir.example_shape(op.operands[0]), torch_ir.example_shape(op.result)
    if before is None or after is None:
        return False
    whole, names = (getattr(sizes[axis], "factors", ()) for sizes in (before, after))
    return bool(names) and names != whole and not any("Min(" in name or "Max(" in name for name in names)


def _require_slice(op: ir.Operation) -> None:
    """Require, in each call, that what is put into a slice has as many elements as the slice."""
    found, source = _bounds(op, op.operands[2:]), torch_ir.tensor_type(op.operands[1])
    if found is not None and source is not None:
        axis, _, length, _ = found
        size = tensors.sizes(torch_ir.to_builtin(op.operands[1]))[axis]
        _require(op, _P.eq, length, size, "the elements that are put there")


def _require_element(op: ir.Operation) -> None:
    """Require, in each call, that the element that is selected is there."""
    source, axis = torch_ir.tensor_type(op.operands[0]), torch_ir.constant(op.operands[1])
    number = torch_ir.constant(op.operands[2])
    if source is None or not isinstance(axis, int) or source.shape[axis] is not None:
        return
    if isinstance(number, int):
        size = tensors.sizes(torch_ir.to_builtin(op.operands[0]))[axis % len(source.shape)]
        _require(op, _P.sge, size, number + 1 if number >= 0 else -number, f"an element {number}")


def _bounds(op: ir.Operation, given: ir.OpOperandList) -> tuple[int, tensors.Size, tensors.Size, int] | None:
    """The axis, first element, number of elements and step of a slice; None where all sizes are known."""
    source = torch_ir.tensor_type(op.operands[0])
    axis, step = torch_ir.constant(given[0]), torch_ir.constant(given[3])
    if source is None or not isinstance(axis, int) or not isinstance(step, int):
        return None
    axis %= len(source.shape)
    bounds = [torch_ir.constant(value) for value in (given[1], given[2])]
    if source.shape[axis] is not None and torch_ir.NOT_CONSTANT not in bounds:
        return None
    size = tensors.sizes(torch_ir.to_builtin(op.operands[0]))[axis]
    start, end = (_clamped(value, size) for value in (given[1], given[2]))
    start = 0 if start is None else start
    elements = _minus(size if end is None else end, start)
    return axis, start, _steps(elements, step), step


def _clamped(bound: ir.Value, size: tensors.Size) -> tensors.Size | None:
    """A bound, which may count from the end, within the axis; None where there is none."""
    number = torch_ir.constant(bound)
    if number is None or number == 2**63 - 1:
        return None
    if number == 0:
        return 0
    whole = tensors.index(size)
    if isinstance(number, int) and number > 0:
        return arith.MinSIOp(tensors.index(number), whole).result
    place = tensors.index(number) if isinstance(number, int) else tensors.from_torch_int(bound)
    negative = arith.CmpIOp(_P.slt, place, tensors.index(0)).result
    place = arith.SelectOp(negative, arith.AddIOp(place, whole).result, place).result
    return arith.MinSIOp(arith.MaxSIOp(place, tensors.index(0)).result, whole).result


def _minus(end: tensors.Size, start: tensors.Size) -> tensors.Size:
    """``end - start``, at least 0."""
    if start == 0:
        return end
    difference = arith.SubIOp(tensors.index(end), tensors.index(start)).result
    return arith.MaxSIOp(difference, tensors.index(0)).result


def _steps(elements: tensors.Size, step: int) -> tensors.Size:
    if step == 1:
        return elements
    rounded = arith.AddIOp(tensors.index(elements), tensors.index(step - 1)).result
    return arith.DivUIOp(rounded, tensors.index(step)).result


def _require(
    op: ir.Operation, predicate: arith.CmpIPredicate, size: tensors.Size, wanted: tensors.Size, what: str
) -> None:
    """Let a call fail, before anything is read, where a size is not what the program was made for."""
    holds = arith.CmpIOp(predicate, tensors.index(size), tensors.index(wanted)).result
    text = f"{torch_ir.location(op)}: the axis that is sliced is too short for {what}"
    ir.Operation.create("cf.assert", operands=[holds], attributes={"msg": ir.StringAttr.get(text)})


RULES = {
    "torch.aten.slice.Tensor": _slice,
    "torch.aten.slice_scatter": _require_slice,
    "torch.aten.select.int": _require_element,
}
