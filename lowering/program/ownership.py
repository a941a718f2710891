"""Leave arguments to the caller: a program only reads them.

IREE updates a tensor in place where an operation is the last to read it, and takes an argument for such a
tensor: its copy-on-write asks whether a value has another reader, not whose memory it is.  So every argument
gets one more reader, the barrier at the end of the function.  IREE then puts a copy before each operation
that would write into an argument, and none where nothing is written: what is only read is not copied.

What the model itself writes to, and updates part by part, is left to IREE's way: see ``write_in_place``.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg

from patterns import torch_ir

from ..passes import tensors

# What updates a tensor, and which operand that is.
_UPDATES = {"iree_linalg_ext.scatter": -1, "tensor.insert_slice": 1}
# What gives a tensor another shape; it is the same memory.
_VIEWS = ("tensor.collapse_shape", "tensor.expand_shape", "tensor.cast", "tensor.bitcast")
_BARRIER = "hal.tensor.barrier"
# On a function: the numbers of the arguments whose memory it writes to.
_WRITTEN = "written"
_IMPORT = "hal.tensor.import"


def keep_arguments(module: ir.Module) -> None:
    """Make no function of ``module``, as it is after IREE's torch pipeline, write into its arguments."""
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        operations = [op.operation for block in function.regions[0].blocks for op in block.operations]
        imported = [op.results[0] for op in operations if op.name == _IMPORT and not _is_written(op)]
        for barrier in (op for op in operations if op.name == _BARRIER):
            _read_until(barrier, [value for value in imported if value not in set(barrier.operands)])


def write_in_place(work: ir.Operation, argument: int, new: ir.Value) -> bool:
    """Leave the memory of an argument to its ``new`` value, where that is made of updates of it alone.

    work: the function, as for ``keep_arguments``.  Each update has to be of the last, and nothing else may
    read what is before one: IREE then updates in place.  Tells whether it is so.
    """
    number = _number_of(_updated(new))
    if number != argument:
        return False
    work.attributes[_WRITTEN] = ir.DenseI64ArrayAttr.get([*_written(work), argument])
    return True


def is_in_place(value: ir.Value) -> bool:
    """Tell whether ``value`` is the new value of an argument, in its memory."""
    origin = _updated(value)
    if _number_of(origin) is None:
        return False
    return _is_written(torch_ir.producer(origin))  # type: ignore[arg-type]


def _is_written(imported: ir.Operation) -> bool:
    function = imported.operands[0].owner.owner
    return ir.BlockArgument(imported.operands[0]).arg_number in _written(function)


def _written(function: ir.Operation) -> list[int]:
    attributes = function.attributes
    return list(ir.DenseI64ArrayAttr(attributes[_WRITTEN])) if _WRITTEN in attributes else []


def _number_of(value: ir.Value | None) -> int | None:
    """The number of the argument that ``value`` is; None for any other."""
    imported = torch_ir.producer(value) if value is not None else None
    if imported is None or imported.name != _IMPORT or torch_ir.producer(imported.operands[0]) is not None:
        return None
    return ir.BlockArgument(imported.operands[0]).arg_number


def _updated(value: ir.Value) -> ir.Value | None:
    """What ``value`` is after updates, if nothing but them reads what was before; None for no update."""
    updated = False
    while (op := torch_ir.producer(value)) is not None and op.name in (*_UPDATES, *_VIEWS):
        updated = updated or op.name in _UPDATES
        value = op.operands[_UPDATES.get(op.name, 0) % len(op.operands)]
        if updated and sum(use.owner.operation.name != "tensor.dim" for use in value.uses) > 1:
            return None
    return value if updated else None


def why_not_in_place(new: ir.Value) -> str:
    """Say why the ``new`` value of an argument is not made in its memory."""
    value, updated = new, False
    while (op := torch_ir.producer(value)) is not None and op.name in (*_UPDATES, *_VIEWS):
        updated = updated or op.name in _UPDATES
        value = op.operands[_UPDATES.get(op.name, 0) % len(op.operands)]
        readers = [use.owner.operation for use in value.uses if use.owner.operation.name != "tensor.dim"]
        others = [torch_ir.location(reader) for reader in readers if reader != op]
        if updated and others:
            return f"copied in each call, since something else reads it before this update ({others[0]})"
    return "computed as a whole in each call, into a second memory, with which it changes places"


def part_updates(module: ir.Module) -> None:
    """Give each update of a tensor that something else reads or updates too a copy of it to update.

    IREE lets two updates of one tensor write into the same memory, and computes an update and its values,
    where they come from what is updated, in one place: it reads what it has written already.  Two tensors of
    the same zeros are one as well: it finds out that they have the same sizes, and keeps one of them.
    """
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        operations = [op.operation for block in function.regions[0].blocks for op in block.operations]
        updates = [op for op in operations if op.name in _UPDATES]
        targets = [op.operands[_UPDATES[op.name] % len(op.operands)] for op in updates]
        named: dict[str, list[ir.Operation]] = {}
        for op in operations:
            named.setdefault(op.name, []).append(op)
        shared = [_is_shared(target, named) for target in targets]
        for copy, (op, target) in enumerate(zip(updates, targets, strict=True)):
            if shared[copy] and ir.RankedTensorType(target.type).rank:
                op.operands[_UPDATES[op.name] % len(op.operands)] = _copy(target, op, copy)


def _is_shared(target: ir.Value, named: dict[str, list[ir.Operation]]) -> bool:
    """Tell whether ``target``, or a tensor that IREE may find to be the same, has more than one reader.

    named: the operations of the function, by their names.
    """
    target = _viewed(target)
    if _readers(target) > 1:
        return True
    owner = torch_ir.producer(target)
    if owner is None:
        return False
    number = ir.OpResult(target).result_number
    others = (op.results[number] for op in named[owner.name] if op != owner and number < len(op.results))
    return any(_readers(other) and _may_be_one(target, other) for other in others)


def _viewed(value: ir.Value) -> ir.Value:
    """The tensor that ``value`` is, in another shape."""
    while (op := torch_ir.producer(value)) is not None and op.name in _VIEWS:
        value = op.operands[0]
    return value


def _readers(value: ir.Value) -> int:
    """Count what reads more of ``value``, in whatever shape, than its sizes."""
    readers = [use.owner.operation for use in value.uses]
    views = sum(_readers(reader.results[0]) for reader in readers if reader.name in _VIEWS)
    return views + sum(reader.name not in (*_VIEWS, "tensor.dim") for reader in readers)


def _may_be_one(value: ir.Value, other: ir.Value) -> bool:
    """Tell whether two values are made alike, from the same ones: equal, if their sizes are."""
    pairs, seen = [(value, other)], set()
    while pairs:
        a, b = pair = pairs.pop()
        if a == b or pair in seen or isinstance(a.type, ir.IndexType):
            continue
        seen.add(pair)
        one, two = torch_ir.producer(a), torch_ir.producer(b)
        if one is None or two is None or not _are_alike(one, two):
            return False
        pairs.extend(zip(one.operands, two.operands, strict=True))
    return True


def _are_alike(a: ir.Operation, b: ir.Operation) -> bool:
    """Tell whether two operations do the same with their operands, and those within them."""
    return (
        a.name == b.name
        and [result.type for result in a.results] == [result.type for result in b.results]
        and len(a.operands) == len(b.operands)
        and _attributes(a) == _attributes(b)
        and len(inside := _inside(a)) == len(inside_b := _inside(b))
        and all(map(_are_alike, inside, inside_b))
    )


def _attributes(op: ir.Operation) -> dict[str, ir.Attribute]:
    return {name: op.attributes[name] for name in op.attributes}


def _inside(op: ir.Operation) -> list[ir.Operation]:
    return [inner.operation for region in op.regions for block in region for inner in block]


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
