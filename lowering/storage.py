"""A second entry point for each program, which writes into memory of the caller's.

``@main`` takes tensors and returns tensors, as every IREE program does, and allocates what it returns and
what it needs on the way.  On a GPU that is a synchronous allocation and a synchronous release for each call.
``@main$into`` is the same function with more arguments: a buffer for each result whose size the caller
knows, and one for everything that lives only during the call.  torch's allocator has those at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith, hal, tensor

from .signature import ASYNC, INTO

_BARRIER = "hal.tensor.barrier"
_RESHAPES = ("tensor.cast", "tensor.expand_shape", "tensor.collapse_shape")
# Behind these IREE may not be able to say how much scratch memory a call needs before it begins.
_UNKNOWN_SIZES = ("tensor.extract", "util.call", "func.call", "scf.if", "scf.for", "scf.while")
_NOT_COMPUTED = ("hal.tensor.import", "util.global.load", "arith.constant")


@dataclass(frozen=True)
class Storage:
    """What a caller of the second entry point allocates.

    results: for each buffer the numbers of the results it holds; several are one tensor, returned several
    times.  scratch: whether there is a buffer for what lives only during the call.
    """

    results: tuple[tuple[int, ...], ...] = ()
    scratch: bool = False

    @property
    def buffers(self) -> int:
        return len(self.results) + self.scratch

    def others(self, count: int) -> list[int]:
        """Those of ``count`` results that are returned."""
        return sorted(set(range(count)) - {number for numbers in self.results for number in numbers})


def add_entry(module: ir.Module, name: str, numbers: Sequence[int]) -> Storage:
    """Add ``@name$into`` to ``module``, as it is after IREE's torch pipeline.

    numbers: the results whose sizes a caller knows.  The arguments after those of ``@name`` are a buffer view
    for each of them and, if there is scratch memory, one for that; of the views only the memory counts.  The
    other results are returned.  Where a value is read from a tensor there is no scratch memory, since its
    size may not be known before the call; nothing is added for a function of several blocks.
    """
    functions = {ir.StringAttr(op.attributes["sym_name"]).value: op for op in _functions(module)}
    work, entry = functions.get(name + ASYNC), functions.get(name)
    if work is None or entry is None or len(work.regions[0].blocks) != 1:
        return Storage()
    with module.context, ir.Location.unknown():
        work, entry = _copy(work, name + INTO + ASYNC), _copy(entry, name + INTO)
        storage = _write_into(work, numbers)
        _forward(entry, name + INTO + ASYNC, storage)
    return storage


def _functions(module: ir.Module) -> Iterator[ir.Operation]:
    return (op.operation for op in module.body.operations if op.operation.name == "util.func")


def _copy(function: ir.Operation, name: str) -> ir.Operation:
    copy = function.clone(ir.InsertionPoint.after(function)).operation
    copy.attributes["sym_name"] = ir.StringAttr.get(name)
    if "iree.reflection" in copy.attributes:
        del copy.attributes["iree.reflection"]
    return copy


def _write_into(work: ir.Operation, numbers: Sequence[int]) -> Storage:
    """Make the function that does the work take its storage."""
    block = work.regions[0].blocks[0]
    # As for the arguments: the other fence is signalled when the results are there.
    available = block.arguments[len(block.arguments) - 2]
    results = _results(list(block.operations)[-1].operation)
    placed = [same for same in results if {result.number for result in same} <= set(numbers)]
    scratch = not any(op.operation.name in _UNKNOWN_SIZES for op in block.operations)
    storage = Storage(tuple(tuple(result.number for result in same) for same in placed), scratch)
    buffers = _add_arguments(work, storage)
    _return_others(work, storage)
    for result in (result for same in placed for result in same):
        if not list(result.export.results[0].uses):
            result.export.erase()
    aliases: set[ir.Value] = set()
    for same, buffer in zip(placed, buffers, strict=False):
        aliases.add(_alias(same, buffer, available, aliases))
    if scratch:
        for barrier in [op.operation for op in block.operations if op.operation.name == _BARRIER]:
            _take_scratch(barrier, buffers[-1])
    return storage


@dataclass(frozen=True)
class _Result:
    """A tensor that is returned as the result ``number``, after it was an operand of a barrier."""

    number: int
    export: ir.Operation
    barrier: ir.Operation
    operand: int


def _results(returned: ir.Operation) -> list[list[_Result]]:
    """The tensors that are returned, each with all the results it is."""
    found: dict[ir.Value, list[_Result]] = {}
    for number, value in enumerate(returned.operands):
        export = _producer(value)
        if export is None or export.name != "hal.tensor.export":
            continue
        barrier = _producer(export.operands[0])
        if barrier is not None and barrier.name == _BARRIER:
            operand = ir.OpResult(export.operands[0]).result_number
            result = _Result(number, export, barrier, operand)
            found.setdefault(barrier.operands[operand], []).append(result)
    return list(found.values())


def _producer(value: ir.Value) -> ir.Operation | None:
    """The operation that ``value`` is a result of; None for an argument."""
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def _alias(
    same: Sequence[_Result], buffer: ir.Value, available: ir.Value, aliases: set[ir.Value]
) -> ir.Value:
    """Write the tensor of these results into ``buffer``.

    In place: the alias follows what computes the tensor, and all other uses read the alias; behind such a
    use it would be a copy.  It is one where nothing computes the tensor (an argument, a constant), and where
    it is another shape of a tensor that has a buffer already.
    """
    source = same[0].barrier.operands[same[0].operand]
    root = _root(source)
    if root in aliases or root.owner.operation.name in _NOT_COMPUTED:
        with ir.InsertionPoint(same[0].barrier):
            alias = hal.TensorAliasOp(source, _dims(source), buffer, wait_fence=available)
        for result in same:
            result.barrier.operands[result.operand] = alias.result
        return alias.result
    with ir.InsertionPoint.after(root.owner):
        dims = _dims(root)
        alias = hal.TensorAliasOp(root, dims, buffer, wait_fence=available)
    root.replace_all_uses_except(alias.result, [alias.operation, *(dim.owner.operation for dim in dims)])
    return alias.result


def _root(value: ir.Value) -> ir.Value:
    """What ``value`` is another shape of: the same bytes."""
    while value.owner.operation.name in _RESHAPES:
        value = value.owner.operation.operands[0]
    return value


def _dims(value: ir.Value) -> list[ir.Value]:
    """The dynamic sizes of a tensor, at the current insertion point."""
    type_ = ir.RankedTensorType(value.type)
    dynamic = [i for i in range(type_.rank) if type_.is_dynamic_dim(i)]
    return [tensor.DimOp(value, arith.constant(ir.IndexType.get(), i)).result for i in dynamic]


def _take_scratch(barrier: ir.Operation, buffer: ir.Value) -> None:
    """Everything that lives until the barrier alone lies in ``buffer``."""
    for number, value in enumerate(list(barrier.operands)[:-1]):  # the last one is the fence
        with ir.InsertionPoint(barrier):
            barrier.operands[number] = hal.TensorTransientsOp(value, _dims(value), buffer).result


def _forward(entry: ir.Operation, callee: str, storage: Storage) -> None:
    """Make the function that calls the work and waits pass the storage on."""
    buffers = _add_arguments(entry, storage)
    block = entry.regions[0].blocks[0]
    call = next(op.operation for op in block.operations if op.operation.name == "util.call")
    _return_others(entry, storage)
    kept = [call.results[i] for i in storage.others(len(call.results))]
    with ir.InsertionPoint(call):
        new = ir.Operation.create(
            "util.call",
            results=[result.type for result in kept],
            operands=[*call.operands, *buffers],
            attributes={"callee": ir.FlatSymbolRefAttr.get(callee)},
        )
    for old, replacement in zip(kept, new.results, strict=True):
        old.replace_all_uses_with(replacement)
    call.erase()


def _add_arguments(function: ir.Operation, storage: Storage) -> list[ir.Value]:
    """The arguments for the storage, behind all others."""
    view = ir.Type.parse("!hal.buffer_view")
    added = [view] * storage.buffers
    type_ = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
    type_ = ir.FunctionType.get([*type_.inputs, *added], type_.results)
    function.attributes["function_type"] = ir.TypeAttr.get(type_)
    if "arg_attrs" in function.attributes:
        attributes = [*ir.ArrayAttr(function.attributes["arg_attrs"]), *[ir.DictAttr.get({}) for _ in added]]
        function.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
    block = function.regions[0].blocks[0]
    return [block.add_argument(type_, ir.Location.unknown()) for type_ in added]


def _return_others(function: ir.Operation, storage: Storage) -> None:
    """Return only what has no storage."""
    old = list(function.regions[0].blocks[0].operations)[-1].operation
    kept = storage.others(len(old.operands))
    with ir.InsertionPoint(old):
        ir.Operation.create("util.return", operands=[old.operands[i] for i in kept])
    old.erase()
    type_ = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
    type_ = ir.FunctionType.get(type_.inputs, [type_.results[i] for i in kept])
    function.attributes["function_type"] = ir.TypeAttr.get(type_)
    for name in ("res_attrs", "tied_operands"):
        if name in function.attributes:
            attributes = ir.ArrayAttr(function.attributes[name])
            function.attributes[name] = ir.ArrayAttr.get([attributes[i] for i in kept])
