"""Step 7, check sizes before anything is computed.

An assertion in the middle of a program parts it in two for IREE, which gives each part memory of its own.
Where sizes are open it cannot take several such memories from the caller: a sum of their places is left among
the commands ("explicit execution regions must only contain explicit ops").  What is asserted of sizes follows
from those of the arguments, so it is checked in front.
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir
from iree.compiler.dialects import tensor

from patterns import torch_ir

from ..passes import tensors
from .slices import bounds, dropped

_ASSERT, _IMPORT = "cf.assert", "hal.tensor.import"
# What gives a tensor of the sizes that its first operand has.
_SAME = ("tensor.cast", "iree_tensor_ext.compute_barrier.start")


def check_first(module: ir.Module) -> None:
    """Move what is asserted of sizes to the front of each function of ``module``, in place.

    module: as it is after IREE's torch pipeline.  An assertion about values, or about a size that does not
    follow from those of the arguments as far as this knows the operations, stays where it is.
    """
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        if len(function.regions[0].blocks) == 1:
            _check_first(function.regions[0].blocks[0])


def _check_first(block: ir.Block) -> None:
    operations = [op.operation for op in block.operations]
    imports = [number for number, op in enumerate(operations) if op.name == _IMPORT]
    if not imports:
        return
    given, later = operations[: imports[-1] + 1], operations[imports[-1] + 1 :]
    front = _Front(later[0], {result for op in given for result in op.results})
    for op in (op for op in later if op.name == _ASSERT):
        with op.location:
            holds = front.value(op.operands[0])
            if holds is None:
                continue
            with ir.InsertionPoint(later[0]):
                ir.Operation.create(_ASSERT, operands=[holds], attributes={"msg": op.attributes["msg"]})
        op.erase()


class _Front:
    """Sizes, and what is computed of them, in front of an operation.

    given: the values that are there.
    """

    def __init__(self, begin: ir.Operation, given: set[ir.Value]):
        self._begin = begin
        self._values: dict[ir.Value, ir.Value | None] = {value: value for value in given}

    def value(self, value: ir.Value) -> ir.Value | None:
        """``value``, a number, as it follows from what is given; None if it does not."""
        if value not in self._values:
            self._values[value] = self._made(value)
        return self._values[value]

    def _made(self, value: ir.Value) -> ir.Value | None:
        op = torch_ir.producer(value)
        if op is None or len(op.results) != 1:
            return None
        if op.name == "tensor.dim":
            axis = _constant(op.operands[1])
            size = self._size(op.operands[0], axis) if axis is not None else None
            return self._index(size)
        if not op.name.startswith("arith.") or not isinstance(value.type, ir.IndexType | ir.IntegerType):
            return None
        operands = [self.value(operand) for operand in op.operands]
        if any(operand is None for operand in operands):
            return None
        copy = op.clone(ir.InsertionPoint(self._begin)).operation
        for number, operand in enumerate(operands):
            assert operand is not None
            copy.operands[number] = operand
        return copy.results[0]

    def _index(self, size: tensors.Size | None) -> ir.Value | None:
        if size is None:
            return None
        with ir.InsertionPoint(self._begin):
            return tensors.index(size)

    def _size(self, value: ir.Value, axis: int) -> tensors.Size | None:
        """The size of a tensor along an axis; None if it is not known from what is given."""
        type_ = ir.RankedTensorType(value.type)
        if not type_.is_dynamic_dim(axis):
            return type_.shape[axis]
        if value in self._values:
            with ir.InsertionPoint(self._begin):
                return tensor.DimOp(value, tensors.index(axis)).result
        op = torch_ir.producer(value)
        rule = _RULES.get(op.name) if op is not None else None
        if op is None or (rule is None and not op.name.startswith(("linalg.", "iree_linalg_ext."))):
            return None
        if rule is not None:
            return rule(self, op, value, axis)
        # Of such an operation the last operands are those that its results are written over.
        number = ir.OpResult(value).result_number
        return self._size(list(op.operands)[number - len(op.results)], axis)

    def _same(self, op: ir.Operation, _: ir.Value, axis: int) -> tensors.Size | None:
        return self._size(op.operands[0], axis)

    def _inserted(self, op: ir.Operation, _: ir.Value, axis: int) -> tensors.Size | None:
        return self._size(op.operands[1], axis)

    def _empty(self, op: ir.Operation, value: ir.Value, axis: int) -> tensors.Size | None:
        return self.value(list(op.operands)[_dynamic_before(value, axis)])

    def _dispatched(self, op: ir.Operation, value: ir.Value, axis: int) -> tensors.Size | None:
        """The sizes of all results are the last operands."""
        *_, count = ir.DenseI32ArrayAttr(op.attributes["operandSegmentSizes"])
        results = list(op.results)
        before = sum(_dynamic_before(each) for each in results[: ir.OpResult(value).result_number])
        sizes = list(op.operands)[len(op.operands) - count :]
        return self.value(sizes[before + _dynamic_before(value, axis)])

    def _sliced(self, op: ir.Operation, value: ir.Value, axis: int) -> tensors.Size | None:
        _, sizes, _ = bounds(op, 1)
        without = dropped(sizes, ir.RankedTensorType(value.type).shape)
        size = [size for size, left_out in zip(sizes, without, strict=True) if not left_out][axis]
        return size if isinstance(size, int) else self.value(size)

    def _collapsed(self, op: ir.Operation, _: ir.Value, axis: int) -> tensors.Size | None:
        group = ir.ArrayAttr(ir.ArrayAttr(op.attributes["reassociation"])[axis])
        sizes = [self._size(op.operands[0], ir.IntegerAttr(each).value) for each in group]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return None
        with ir.InsertionPoint(self._begin):
            return tensors.product(known)

    def _expanded(self, op: ir.Operation, value: ir.Value, axis: int) -> tensors.Size | None:
        return self.value(list(op.operands)[1 + _dynamic_before(value, axis)])


_Rule = Callable[[_Front, ir.Operation, ir.Value, int], tensors.Size | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_SAME, _Front._same),
    "tensor.empty": _Front._empty,
    "tensor.insert_slice": _Front._inserted,
    "tensor.extract_slice": _Front._sliced,
    "tensor.collapse_shape": _Front._collapsed,
    "tensor.expand_shape": _Front._expanded,
    "flow.dispatch": _Front._dispatched,
    "hal.dispatch.extern": _Front._dispatched,
}


def _dynamic_before(value: ir.Value, axis: int | None = None) -> int:
    """Count the axes of unknown size that ``value`` has before one, or has."""
    type_ = ir.RankedTensorType(value.type)
    return sum(type_.is_dynamic_dim(each) for each in range(type_.rank if axis is None else axis))


def _constant(value: ir.Value) -> int | None:
    op = torch_ir.producer(value)
    if op is None or op.name != "arith.constant":
        return None
    return ir.IntegerAttr(op.attributes["value"]).value
