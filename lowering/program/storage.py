"""Add a second entry point to each program, which writes into memory of the caller's.

``@main`` takes tensors and returns tensors, as every IREE program does, and allocates what it returns and
what it needs on the way.  On a GPU that is a synchronous allocation and a synchronous release for each call.
``@main$into`` is the same function with more arguments: a buffer for each result whose size the caller
knows, and one for everything that lives only during the call.  torch's allocator has those at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith, hal, tensor

from ..signature import ASYNC, INTO
from .ownership import is_in_place

_BARRIER = "hal.tensor.barrier"
_RESHAPES = ("tensor.cast", "tensor.expand_shape", "tensor.collapse_shape", "tensor.reshape")
_GIVEN = ("hal.tensor.import", "util.global.load", "arith.constant")
# Behind these IREE may not be able to say how much scratch memory a call needs before it begins.
_UNKNOWN_SIZES = ("tensor.extract", "util.call", "func.call", "scf.if", "scf.for", "scf.while")

Placed = tuple[tuple[int, ...], ...]
"""The results that have a buffer of the caller's: for each buffer the numbers of those it holds.  Several are
one tensor, returned several times."""


def add_entry(module: ir.Module, name: str, numbers: Sequence[int]) -> Placed:
    """Add ``@name$into`` to ``module``, as it is after IREE's torch pipeline.

    numbers: the results whose sizes a caller knows.  The arguments after those of ``@name`` are a buffer view
    for each of them, and one for scratch memory; of the views only the memory counts.  The other results are
    returned, an argument that is a result as it is among them.  Nothing is added where none is left, where a
    value is read from a tensor (the size of the scratch memory may then not be known before the call), and
    for a function of several blocks.
    """
    functions = functions_of(module)
    work, entry = functions.get(name + ASYNC), functions.get(name)
    if work is None or entry is None or len(work.regions[0].blocks) != 1:
        return ()
    unknown = any(op.operation.name in _UNKNOWN_SIZES for op in work.regions[0].blocks[0].operations)
    if unknown or not _placed(work, numbers):
        return ()
    with module.context, ir.Location.unknown():
        work, entry = _copy(work, name + INTO + ASYNC), _copy(entry, name + INTO)
        placed = _write_into(work, numbers)
        _forward(entry, name + INTO + ASYNC, placed)
    return placed


def drop_results(module: ir.Module, name: str, numbers: Collection[int]) -> None:
    """Return no more these results of ``@name``; the tensors are still computed before the barrier is."""
    functions = functions_of(module)
    work, entry, placed = functions[name + ASYNC], functions[name], (tuple(numbers),)
    exports = [r.export for same in results_of(work).values() for r in same if r.number in numbers]
    with module.context, ir.Location.unknown():
        _return_others(work, placed)
        _call(entry, name + ASYNC, (), placed)
    for export in exports:
        if not list(export.results[0].uses):
            export.erase()


def remove_entry(module: ir.Module, name: str) -> None:
    """Take back what ``add_entry`` added."""
    functions = functions_of(module)
    for added in (name + INTO, name + INTO + ASYNC):
        functions[added].erase()


def functions_of(module: ir.Module) -> dict[str, ir.Operation]:
    """Find the functions of ``module``, as it is after IREE's torch pipeline, by name."""
    found = (op.operation for op in module.body.operations if op.operation.name == "util.func")
    return {ir.StringAttr(op.attributes["sym_name"]).value: op for op in found}


def _copy(function: ir.Operation, name: str) -> ir.Operation:
    copy = function.clone(ir.InsertionPoint.after(function)).operation
    copy.attributes["sym_name"] = ir.StringAttr.get(name)
    if "iree.reflection" in copy.attributes:
        del copy.attributes["iree.reflection"]
    return copy


def _write_into(work: ir.Operation, numbers: Sequence[int]) -> Placed:
    """Make the function that does the work take its storage."""
    block = work.regions[0].blocks[0]
    # As for the arguments: the other fence is signalled when the results are there.
    available = block.arguments[len(block.arguments) - 2]
    results = _placed(work, numbers)
    placed = tuple(tuple(result.number for result in same) for same in results)
    *buffers, scratch = _add_arguments(work, placed)
    _return_others(work, placed)
    for result in (result for same in results for result in same):
        if not list(result.export.results[0].uses):
            result.export.erase()
    aliases: set[ir.Value] = set()
    for same, buffer in zip(results, buffers, strict=True):
        aliases.add(_alias(same, buffer, available, aliases))
    for barrier in [op.operation for op in block.operations if op.operation.name == _BARRIER]:
        _take_scratch(barrier, scratch)
    return placed


@dataclass(frozen=True)
class _Result:
    """A tensor that is returned as the result ``number``, after it was an operand of a barrier."""

    number: int
    export: ir.Operation
    barrier: ir.Operation
    operand: int


def _placed(work: ir.Operation, numbers: Sequence[int]) -> list[list[_Result]]:
    """The results among ``numbers`` that get a buffer."""
    same = results_of(work).values()
    return [results for results in same if {result.number for result in results} <= set(numbers)]


def results_of(work: ir.Operation) -> dict[ir.Value, list[_Result]]:
    """The tensors that a function returns, each with all the results it is."""
    returned = list(work.regions[0].blocks[0].operations)[-1].operation
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
    return found


def _producer(value: ir.Value) -> ir.Operation | None:
    """The operation that ``value`` is a result of; None for an argument."""
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def _alias(
    same: Sequence[_Result], buffer: ir.Value, available: ir.Value, aliases: set[ir.Value]
) -> ir.Value:
    """Write the tensor of these results into ``buffer``.

    In place: the alias follows what computes the tensor, and all other uses read the alias; behind such a
    use it would be a copy.  It is one where nothing computes the tensor, where it is another shape of one
    that has a buffer already, and where it is the new value of an argument, whose memory it has.
    """
    source = same[0].barrier.operands[same[0].operand]
    root = _root(source)
    if root in aliases or root.owner.operation.name in _GIVEN or is_in_place(root):
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
    """Find the value that ``value`` is another shape of: the same bytes."""
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


def _forward(entry: ir.Operation, callee: str, placed: Placed) -> None:
    """Make the function that calls the work and waits pass the storage on."""
    _call(entry, callee, _add_arguments(entry, placed), placed)


def _call(entry: ir.Operation, callee: str, buffers: Sequence[ir.Value], placed: Placed) -> None:
    """Make the function that calls the work and waits call it so, without the results that are ``placed``."""
    block = entry.regions[0].blocks[0]
    call = next(op.operation for op in block.operations if op.operation.name == "util.call")
    _return_others(entry, placed)
    kept = [call.results[i] for i in _others(placed, len(call.results))]
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


def _others(placed: Placed, count: int) -> list[int]:
    """Keep those of ``count`` results that are returned."""
    return sorted(set(range(count)) - {number for numbers in placed for number in numbers})


def _add_arguments(function: ir.Operation, placed: Placed) -> list[ir.Value]:
    """The arguments for the storage, behind all others."""
    view = ir.Type.parse("!hal.buffer_view")
    added = [view] * (len(placed) + 1)
    type_ = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
    type_ = ir.FunctionType.get([*type_.inputs, *added], type_.results)
    function.attributes["function_type"] = ir.TypeAttr.get(type_)
    if "arg_attrs" in function.attributes:
        attributes = [*ir.ArrayAttr(function.attributes["arg_attrs"]), *[ir.DictAttr.get({}) for _ in added]]
        function.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
    block = function.regions[0].blocks[0]
    return [block.add_argument(type_, ir.Location.unknown()) for type_ in added]


def _return_others(function: ir.Operation, placed: Placed) -> None:
    """Return only what has no storage."""
    old = list(function.regions[0].blocks[0].operations)[-1].operation
    kept = _others(placed, len(old.operands))
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
