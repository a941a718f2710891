"""Arguments belong to the caller: a program only reads them.

IREE updates a tensor in place where an operation is the last to read it, and takes an argument for such a
tensor: its copy-on-write asks whether a value has another reader, not whose memory it is.  So every argument
gets one more reader, the barrier at the end of the function.  IREE then puts a copy before each operation
that would write into an argument, and none where nothing is written: what is only read is not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from iree.compiler import ir
from iree.compiler.dialects import arith

from . import tensors

# What updates a tensor, and which operand that is.
_UPDATES = {"iree_linalg_ext.scatter": -1, "tensor.insert_slice": 1}
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
    """Give each update with values that are computed from what it updates a copy of that to update.

    IREE would compute both in one place, with one binding for both: it reads what it has written already.
    """
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        for op in [op.operation for block in function.regions[0].blocks for op in block.operations]:
            if op.name in _UPDATES:
                number = _UPDATES[op.name] % len(op.operands)
                updated, values = op.operands[number], [v for n, v in enumerate(op.operands) if n != number]
                if any(updated in _computed_from(value) for value in values):
                    op.operands[number] = _copy(updated, op)


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
    """A copy of ``value`` in front of ``op``.

    A computed one: its elements, or zeros if a bit that IREE knows nothing of were not set.  What IREE
    knows to be a copy it leaves out where nothing reads ``value`` later, and of equal ones it makes one.
    """
    element = ir.RankedTensorType(value.type).element_type
    with ir.InsertionPoint(op), op.location:
        bit = arith.ConstantOp(ir.IntegerType.get_signless(1), 1).result
        unknown = ir.Operation.create("util.optimization_barrier", results=[bit.type], operands=[bit]).result
        nothing = _zero(element)
        sizes = tensors.sizes(value)
        same = ir.AffineMap.get_identity(len(sizes))
        return tensors.generic(
            [value],
            tensors.empty(sizes, element),
            [same, same],
            [tensors.PARALLEL] * len(sizes),
            lambda element, _: arith.SelectOp(unknown, element, nothing).result,
        )


def _zero(element: ir.Type) -> ir.Value:
    """Zero, of any type that a tensor's elements have."""
    if isinstance(element, ir.ComplexType):
        part = ir.FloatAttr.get(element.element_type, 0)
        parts = ir.ArrayAttr.get([part, part])
        return ir.Operation.create("complex.constant", results=[element], attributes={"value": parts}).result
    attribute = ir.IntegerAttr if isinstance(element, ir.IntegerType) else ir.FloatAttr
    return arith.ConstantOp(element, attribute.get(element, 0)).result


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
