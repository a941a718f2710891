"""Step 7, constants: a Python float of the model is rounded to the type it is computed in.

It is a float64 until then, and where IREE narrows constants it cuts off the bits that do not fit.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith

from patterns import torch_ir


def round_constants(module: ir.Module) -> int:
    """Replace every constant that is narrowed by the narrow number nearest to it; returns how many."""
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.operation.name == "arith.truncf" and _constant(op.operation) is not None:
            found.append(op.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        # By way of float32, as PyTorch does.
        type_ = op.result.type
        with ir.InsertionPoint(op), op.location:
            single = ir.FloatAttr.get(ir.F32Type.get(), _constant(op)).value
            constant = arith.ConstantOp(type_, ir.FloatAttr.get(type_, single)).result
        op.result.replace_all_uses_with(constant)
        op.erase()
    return len(found)


def _constant(narrowing: ir.Operation) -> float | None:
    """The number that is narrowed, if it is known."""
    source = torch_ir.producer(narrowing.operands[0])
    if source is None or source.name != "arith.constant":
        return None
    value = source.attributes["value"]
    return value.value if isinstance(value, ir.FloatAttr) else None
