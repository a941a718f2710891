"""Leave arguments to the caller: a program only reads them.

IREE updates a tensor in place where an operation is the last to read it, and takes an argument for such a
tensor: its copy-on-write asks whether a value has another reader, not whose memory it is.  So every argument
gets one more reader, the barrier at the end of the function.  IREE then puts a copy before each operation
that would write into an argument, and none where nothing is written: what is only read is not copied.
"""

from __future__ import annotations

from collections import Counter

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg

from ..passes import tensors
from .slices import maker

# What updates a tensor, and which operand that is.
_UPDATES = {"iree_linalg_ext.scatter": -1, "tensor.insert_slice": 1}
# What gives a tensor another shape; it is the same memory.
_VIEWS = ("tensor.collapse_shape", "tensor.expand_shape", "tensor.cast")
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
    """Give each update of a tensor that something else reads or updates too a copy of it to update.

    IREE lets two updates of one tensor write into the same memory, and computes an update and its values,
    where they come from what is updated, in one place: it reads what it has written already.  It makes one
    tensor of two that hold the same constants.
    """
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        operations = [op.operation for block in function.regions[0].blocks for op in block.operations]
        given = Counter(op.results[0].type for op in operations if _is_given(op))
        for copy, op in enumerate(op for op in operations if op.name in _UPDATES):
            number = _UPDATES[op.name] % len(op.operands)
            updated = op.operands[number]
            whole = _viewed(updated)
            made = maker(whole)
            alike = made is not None and _is_given(made) and given[whole.type] > 1
            if (alike or _readers(whole) > 1) and ir.RankedTensorType(updated.type).rank:
                op.operands[number] = _copy(updated, op, copy)


def _is_given(op: ir.Operation) -> bool:
    """Tell whether ``op`` makes a tensor of constants, such as zeros."""
    if op.name != "linalg.generic":
        return op.name == "linalg.fill"
    read = [maker(value) for value in list(op.operands)[: -len(op.results)]]
    return all(made is not None and made.name == "arith.constant" for made in read)


def _viewed(value: ir.Value) -> ir.Value:
    """The tensor that ``value`` is, in another shape."""
    while (op := maker(value)) is not None and op.name in _VIEWS:
        value = op.operands[0]
    return value


def _readers(value: ir.Value) -> int:
    """Count the operations that read ``value``, in whatever shape."""
    readers = [use.owner.operation for use in value.uses]
    views = sum(_readers(reader.results[0]) for reader in readers if reader.name in _VIEWS)
    return views + sum(reader.name not in (*_VIEWS, "tensor.dim") for reader in readers)


def _copy(value: ir.Value, op: ir.Operation, copy: int) -> ir.Value:
    """A copy of ``value`` in front of ``op``, unlike every other ``copy``.

    A computed one: its elements, or others if a product of two whole numbers in a row were odd, of which IREE
    knows nothing.  What it knows to be a copy it leaves out where nothing reads ``value`` later, and of equal
    ones it makes one.  Two others, since it knows those in ``value`` where all are equal.  An operation that
    is opaque to IREE would do as well, but parts a program in two, which then cannot be given its memory.
    """
    tensor = ir.RankedTensorType(value.type)
    element_type = tensor.element_type
    # Of an axis of one element IREE knows the number.
    axis = next((axis for axis, size in enumerate(tensor.shape) if size != 1), 0)

    def same(element: ir.Value, _: ir.Value) -> ir.Value:
        one, two = _number(element_type, 1), _number(element_type, 2)
        others = arith.SelectOp(_is_even(axis, 2 * copy + 1), one, two).result
        return arith.SelectOp(_is_even(axis, 2 * copy), element, others).result

    with ir.InsertionPoint(op), op.location:
        sizes = tensors.sizes(value)
        identity = ir.AffineMap.get_identity(len(sizes))
        kinds = [tensors.PARALLEL] * len(sizes)
        return tensors.generic([value], tensors.empty(sizes, element_type), [identity, identity], kinds, same)


def _is_even(axis: int, start: int) -> ir.Value:
    """Tell whether n * (n + 1) is even, n from ``start`` on along an axis of a loop."""
    n = arith.AddIOp(linalg.IndexOp(axis).result, tensors.index(start)).result
    product = arith.MulIOp(n, arith.AddIOp(n, tensors.index(1)).result).result
    last = arith.AndIOp(product, tensors.index(1)).result
    return arith.CmpIOp(arith.CmpIPredicate.eq, last, tensors.index(0)).result


def _number(element: ir.Type, number: int) -> ir.Value:
    """A constant of any type that a tensor's elements have, as far as it holds the number."""
    if isinstance(element, ir.ComplexType):
        part = ir.FloatAttr.get(element.element_type, number)
        parts = ir.ArrayAttr.get([part, part])
        return ir.Operation.create("complex.constant", results=[element], attributes={"value": parts}).result
    if isinstance(element, ir.IntegerType):
        number %= 2**element.width
    attribute = ir.IntegerAttr if isinstance(element, ir.IntegerType) else ir.FloatAttr
    return arith.ConstantOp(element, attribute.get(element, number)).result


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
