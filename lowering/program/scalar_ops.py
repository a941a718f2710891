"""Step 7, replace scalar operations of generated code that do not compute what the model says.

After torch-to-iree each torch operation is the body of one ``linalg.generic``.  A rule sees one operation of
such a body and builds what it stands for, or leaves it.  ``scalar_bounds`` has the rules about NaN,
``scalar_functions`` those about division and trigonometry; those about types are here.
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir
from iree.compiler.dialects import arith

from patterns import torch_ir

from ..targets import Target
from . import scalar_bounds, scalar_functions

Rule = Callable[[ir.Operation], ir.Value | None]


def correct(module: ir.Module, target: Target) -> int:
    """Replace, in place, what has a rule for ``target``; returns how many operations that was."""
    rules = {**_TYPES, **scalar_bounds.RULES, **scalar_functions.rules(target)}
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.operation.name in rules:
            found.append(op.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return sum(_replace(op, rules[op.name]) for op in found)


def _replace(op: ir.Operation, rule: Rule) -> bool:
    with ir.InsertionPoint(op), op.location:
        value = rule(op)
    if value is None:
        return False
    op.result.replace_all_uses_with(value)
    op.erase()
    return True


def _rounded_constant(narrowing: ir.Operation) -> ir.Value | None:
    """A Python number is a float64 until here, and IREE would cut off the bits that do not fit."""
    source = torch_ir.producer(narrowing.operands[0])
    if source is None or source.name != "arith.constant":
        return None
    value = source.attributes["value"]
    if not isinstance(value, ir.FloatAttr):
        return None
    # By way of float32, as PyTorch does.
    single = ir.FloatAttr.get(ir.F32Type.get(), value.value).value
    type_ = narrowing.result.type
    return arith.ConstantOp(type_, ir.FloatAttr.get(type_, single)).result


def _small_float(op: ir.Operation) -> ir.Value | None:
    """An integer becomes a 16-bit float by way of float32, as in PyTorch: not every target knows another."""
    type_ = op.result.type
    if str(type_) not in ("bf16", "f16"):
        return None
    made = {"arith.sitofp": arith.SIToFPOp, "arith.uitofp": arith.UIToFPOp}[op.name]
    return arith.TruncFOp(type_, made(ir.F32Type.get(), op.operands[0]).result).result


def _small_integer(op: ir.Operation) -> ir.Value | None:
    """A float becomes a small integer by way of a large one, of which the low bits remain."""
    value, type_ = op.operands[0], ir.IntegerType(op.result.type)
    narrow = str(value.type) in ("bf16", "f16")
    if type_.width >= 32 and not narrow:
        return None
    wide = arith.ExtFOp(ir.F32Type.get(), value).result if narrow else value
    if type_.width >= 32:
        return arith.FPToSIOp(type_, wide).result
    whole = arith.FPToSIOp(ir.IntegerType.get_signless(32), wide).result
    return arith.TruncIOp(type_, whole).result


_ARITHMETIC = {
    "arith.addf": arith.AddFOp,
    "arith.subf": arith.SubFOp,
    "arith.mulf": arith.MulFOp,
    "arith.divf": arith.DivFOp,
}


def _of_small_floats(op: ir.Operation) -> ir.Value | None:
    """A step of a loop in 16 bits, such as an update's sum, is one of float32 that is rounded."""
    type_, loop = op.result.type, op.parent.name
    # The body of an operation that is named for what it computes cannot be another.
    named = loop.startswith("linalg.") and loop != "linalg.generic"
    if str(type_) not in ("bf16", "f16") or named:
        return None
    wide = [arith.ExtFOp(ir.F32Type.get(), value).result for value in op.operands]
    return arith.TruncFOp(type_, _ARITHMETIC[op.name](*wide).result).result


_TYPES: dict[str, Rule] = {
    "arith.truncf": _rounded_constant,
    "arith.sitofp": _small_float,
    "arith.uitofp": _small_float,
    "arith.fptosi": _small_integer,
    **dict.fromkeys(_ARITHMETIC, _of_small_floats),
}
