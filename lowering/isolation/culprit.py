"""Find the operation that a program cannot be compiled for, where the compiler does not say.

A compiler that died says nothing, and torch-mlir may name a constant in place of the operation that reads it.
The first operations of the program are compiled alone, fewer or more of them, until one makes the difference.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Collection

from iree.compiler import ir
from iree.compiler.dialects import func

from patterns import torch_ir

from ..importing.merging import Merged
from ..signature import INITIAL

# A search that takes longer than this is given up; an error without a line is better than none for minutes.
_SECONDS = 60.0
_CASTS = ("torch_c.from_builtin_tensor", "torch_c.to_builtin_tensor", "tensor.cast")


def find_culprit(merged: Merged, fails: Callable[[ir.Module], bool]) -> ir.Operation | None:
    """The first operation of a function, in the torch dialect, with which a part of the program fails.

    None where no part fails, or where it takes too long to tell.
    """
    deadline = time.monotonic() + _SECONDS
    bytecode = io.BytesIO()
    merged.module.operation.write_bytecode(bytecode)
    for name in merged.functions:
        others = {*merged.functions, INITIAL} - {name}
        found = _in_function(merged, name, others, bytecode.getvalue(), fails, deadline)
        if found is not None:
            return found
    return None


def _in_function(
    merged: Merged,
    name: str,
    others: Collection[str],
    bytecode: bytes,
    fails: Callable[[ir.Module], bool],
    deadline: float,
) -> ir.Operation | None:
    operations = list(torch_ir.block_of(_functions(merged.module)[name]).operations)[:-1]

    def part_fails(count: int) -> bool:
        part = ir.Module.parse(bytecode, context=merged.module.context)
        for other in others:
            if (function := _functions(part).get(other)) is not None:
                function.erase()
        return _keep(_functions(part)[name], count) and fails(part)

    well, badly = 0, len(operations)
    if not part_fails(badly):
        return None
    while badly - well > 1:
        middle = (well + badly) // 2
        if time.monotonic() > deadline:
            return None
        if part_fails(middle):
            badly = middle
        else:
            well = middle
    return _made_by(operations[badly - 1].operation)


def _functions(module: ir.Module) -> dict[str, ir.Operation]:
    functions = [op.operation for op in module.body.operations if op.operation.name == "func.func"]
    return {ir.StringAttr(function.attributes["sym_name"]).value: function for function in functions}


def _made_by(op: ir.Operation) -> ir.Operation:
    """Find what computes the value that ``op`` only gives another type.

    The parts of a program that are compiled alone return torch's tensors.
    """
    while op.name in _CASTS and not isinstance(op.operands[0].owner, ir.Block):
        op = op.operands[0].owner.operation
    return op


def _keep(function: ir.Operation, count: int) -> bool:
    """Keep the first ``count`` operations, and return what none reads; tells whether that is anything."""
    block = torch_ir.block_of(function)
    operations = [op.operation for op in block.operations]
    for op in reversed(operations[count:]):
        op.erase()
    tensors = [
        result
        for op in operations[:count]
        for result in op.results
        if not list(result.uses) and str(result.type).startswith("!torch.vtensor")
    ]
    with function.context, ir.Location.unknown(), ir.InsertionPoint(block):
        func.ReturnOp(tensors)
        inputs = [argument.type for argument in block.arguments]
        type_ = ir.FunctionType.get(inputs, [tensor.type for tensor in tensors])
        function.attributes["function_type"] = ir.TypeAttr.get(type_)
    if "res_attrs" in function.attributes:
        del function.attributes["res_attrs"]
    return bool(tensors)
