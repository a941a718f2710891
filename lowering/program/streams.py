"""Look at a program in IREE's stream dialect: all allocations, copies and dispatches are explicit there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from iree.compiler import ir

from patterns import torch_ir

_WRITES = 2  # of an access to a resource, the bit that says so
_RESOURCE = "!stream.resource<"


def not_in_place(
    module: ir.Module, name: str, arguments: Sequence[int], lent: Collection[int] = ()
) -> set[int]:
    """Find which of these arguments the function ``name`` cannot write to where they are.

    IREE gives a tensor other memory where something else reads it, whatever was found before.  Then nothing
    writes to the argument's, or all of it is copied to memory of the call's own.  lent: the arguments whose
    memory may be written by kernels alone, not by what IREE fills and copies itself.
    """
    functions = (op.operation for op in module.body if op.operation.name == "util.func")
    found = [op for op in functions if ir.StringAttr(op.attributes["sym_name"]).value == name]
    if not found:
        return set()
    (function,) = found
    memory = _Memory(function)
    by_kernels, by_copies, moved = set(memory.dispatched()), set(memory.filled()), set(memory.moved())
    refused = moved | (by_copies & set(lent))
    return {number for number in arguments if number not in by_kernels | by_copies or number in refused}


class _Memory:
    """The memory of a function's arguments, wherever it is used."""

    def __init__(self, function: ir.Operation):
        self._operations = list(_inside(function))
        self._arguments: dict[ir.Value, int] = {}
        for op in self._operations:
            if op.name == "stream.tensor.import" and torch_ir.producer(op.operands[0]) is None:
                self._arguments[op.results[0]] = ir.BlockArgument(op.operands[0]).arg_number
            elif op.name == "stream.cmd.execute":
                self._follow(op, op.regions[0].blocks[0].arguments)
            elif op.name == "stream.timepoint.await":
                self._follow(op, op.results)

    def _follow(self, op: ir.Operation, becomes: Sequence[ir.Value]) -> None:
        """What is passed first is, in order, what it becomes."""
        for before, after in zip(_resources(op), becomes, strict=False):
            if before in self._arguments:
                self._arguments[after] = self._arguments[before]

    def dispatched(self) -> Iterator[int]:
        """The arguments whose memory kernels write to."""
        for op in (op for op in self._operations if op.name == "stream.cmd.dispatch"):
            accesses = [ir.IntegerAttr(access).value for access in op.attributes["resource_accesses"]]  # type: ignore
            for resource, access in zip(_resources(op), accesses, strict=True):
                if access & _WRITES and resource in self._arguments:
                    yield self._arguments[resource]

    def filled(self) -> Iterator[int]:
        """The arguments whose memory something is copied to, or filled with."""
        for op in (op for op in self._operations if op.name in ("stream.cmd.copy", "stream.cmd.fill")):
            *_, target = _resources(op)
            if target in self._arguments:
                yield self._arguments[target]

    def moved(self) -> Iterator[int]:
        """The arguments that are copied to memory which lives during the call."""
        for op in self._operations:
            if op.name == "stream.cmd.copy":
                source, target = _resources(op)
                if source in self._arguments and "transient" in str(target.type):
                    yield self._arguments[source]


def _resources(op: ir.Operation) -> list[ir.Value]:
    return [operand for operand in op.operands if str(operand.type).startswith(_RESOURCE)]


def _inside(op: ir.Operation) -> Iterator[ir.Operation]:
    for region in op.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _inside(inner.operation)
