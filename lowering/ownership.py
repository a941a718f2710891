"""Arguments belong to the caller: a program only reads them.

IREE updates a tensor in place where an operation is the last to read it, and takes an argument for such a
tensor: its copy-on-write asks whether a value has another reader, not whose memory it is.  So every argument
gets one more reader, the barrier at the end of the function.  IREE then puts a copy before each operation
that would write into an argument, and none where nothing is written: what is only read is not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from iree.compiler import ir
from iree.compiler.dialects import tensor

from patterns import torch_ir

from .errors import CompileError
from .kernel_functions import index_constant

# What updates a tensor, and which operand that is.
_UPDATES = {"iree_linalg_ext.scatter": -1, "tensor.insert_slice": 1}
_RESHAPES = ("tensor.cast", "tensor.expand_shape", "tensor.collapse_shape")
_BARRIER = "hal.tensor.barrier"
_IMPORT = "hal.tensor.import"


def keep_arguments(module: ir.Module) -> None:
    """Make no function of ``module``, as it is after IREE's torch pipeline, write into its arguments."""
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        operations = [op.operation for block in function.regions[0].blocks for op in block.operations]
        imported = [op.results[0] for op in operations if op.name == _IMPORT]
        for barrier in (op for op in operations if op.name == _BARRIER):
            _read_until(barrier, [value for value in imported if value not in set(barrier.operands)])


def part_updates(module: ir.Module) -> None:
    """Give the values of each update that are computed from what it updates a place of their own.

    IREE would compute both in one dispatch, with one binding for both: it reads what it has written already.
    """
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        for op in [op.operation for block in function.regions[0].blocks for op in block.operations]:
            if op.name in _UPDATES:
                number = _UPDATES[op.name] % len(op.operands)
                for other, value in enumerate(op.operands):
                    if other != number and _unshaped(value) == _unshaped(op.operands[number]):
                        raise CompileError(
                            f"{torch_ir.location(op)}: a tensor is updated with all of itself, which is read "
                            "while it is written; compute the result without an update, from x[index]"
                        )
                    if other != number and op.operands[number] in _computed_from(value):
                        op.operands[other] = _copy(value, op)


def _unshaped(value: ir.Value) -> ir.Value:
    """What ``value`` is but for its shape."""
    while isinstance(value.owner, ir.Operation | ir.OpView) and value.owner.operation.name in _RESHAPES:
        value = value.owner.operation.operands[0]
    return value


def _computed_from(value: ir.Value) -> Iterator[ir.Value]:
    """``value``, if it is a tensor, and every tensor that it is computed from."""
    pending, seen = [value], set[ir.Operation]()
    while pending:
        value = pending.pop()
        if not isinstance(value.type, ir.RankedTensorType):
            continue
        yield value
        op = value.owner.operation if isinstance(value.owner, ir.Operation | ir.OpView) else None
        if op is not None and op not in seen:
            seen.add(op)
            pending += op.operands


def _copy(value: ir.Value, op: ir.Operation) -> ir.Value:
    """A copy of ``value`` in front of ``op``."""
    type_ = ir.RankedTensorType(value.type)
    with ir.InsertionPoint(op), op.location:
        dynamic = [axis for axis in range(type_.rank) if type_.is_dynamic_dim(axis)]
        sizes = [tensor.DimOp(value, index_constant(axis)).result for axis in dynamic]
        return ir.Operation.create("flow.tensor.clone", results=[type_], operands=[value, *sizes]).result


def _read_until(barrier: ir.Operation, values: list[ir.Value]) -> None:
    """Have ``barrier`` wait for ``values`` as well; what it gave before it still gives."""
    *tensors, fence = barrier.operands
    joined = [*tensors, *values]
    with ir.InsertionPoint(barrier), barrier.location:
        new = ir.Operation.create(
            _BARRIER, results=[value.type for value in joined], operands=[*joined, fence]
        )
    for old, result in zip(barrier.results, new.results, strict=False):
        old.replace_all_uses_with(result)
    barrier.erase()
