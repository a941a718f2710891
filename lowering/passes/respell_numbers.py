"""Respell numbers beside tensors: a comparison with one of another kind, and remainders of sizes.

torch-mlir dies of a comparison whose tensor it knows where the number is of another kind, and the importer
names a remainder of sizes by an operation that nothing lowers.
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir
from iree.compiler.dialects import arith

from patterns import torch_ir
from patterns.torch_ir import TensorType

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _compared(op: ir.Operation) -> None:
    """Floats are compared with a float, and bools as integers: torch-mlir takes a true one for -1."""
    source, number = torch_ir.tensor_type(op.operands[0]), torch_ir.constant(op.operands[1])
    if source is None or number is torch_ir.NOT_CONSTANT:
        return
    if "float" in source.dtype and isinstance(number, int):
        op.operands[1] = torch_ir.make_float(float(number))
    elif "float" not in source.dtype and isinstance(number, float):
        op.operands[0] = _converted(op.operands[0], source, "float32")
    elif source.dtype == "bool":
        op.operands[0] = _converted(op.operands[0], source, "int64")


def _converted(value: ir.Value, type_: TensorType, dtype: str) -> ir.Value:
    made = TensorType(type_.shape, dtype)
    return torch_ir.make("torch.prims.convert_element_type", made, [value, torch_ir.make_dtype(dtype)])


def _remainder(op: ir.Operation) -> list[ir.Value]:
    """The remainder of sizes, of the sign of the divisor as in Python."""
    i64 = ir.IntegerType.get_signless(64)
    a, b = (
        ir.Operation.create("torch_c.to_i64", results=[i64], operands=[value]).result for value in op.operands
    )
    zero = arith.ConstantOp(i64, 0).result
    left = arith.RemSIOp(a, b).result
    opposite = arith.CmpIOp(arith.CmpIPredicate.slt, arith.XOrIOp(left, b).result, zero).result
    there = arith.CmpIOp(arith.CmpIPredicate.ne, left, zero).result
    moved = arith.AddIOp(left, b).result
    found = arith.SelectOp(arith.AndIOp(opposite, there).result, moved, left).result
    type_ = op.results[0].type
    return [ir.Operation.create("torch_c.from_i64", results=[type_], operands=[found]).result]


RULES: dict[str, Callable[[ir.Operation], list[ir.Value] | None]] = {
    **{f"torch.aten.{name}.Scalar": _compared for name in _COMPARISONS},  # type: ignore[dict-item]
    "torch.aten.fmod.int": _remainder,
}
