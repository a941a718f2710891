"""Step 7, operations that the torch dialect lowers to something else than they are, spelled out.

Each is written with operations whose lowering is right, in the order and with the roundings that PyTorch's
own implementation has.  This is for what is left when kernels have been chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from iree.compiler import ir

from patterns import torch_ir

_SMALL_FLOATS = ("bfloat16", "float16")
_CAST = "torch.prims.convert_element_type"


def spell_out(function: ir.Operation) -> int:
    """Replace, in place, the operations of ``function`` whose lowering is not exact; returns how many."""
    block, count = torch_ir.block_of(function), 0
    for op in [op.operation for op in block.operations]:
        spelling = _SPELLINGS.get(torch_ir.op_name(op).removeprefix("torch.aten."))
        type_ = torch_ir.tensor_type(op.result) if spelling is not None else None
        if spelling is None or type_ is None:
            continue
        with ir.InsertionPoint(op), op.location:
            value = spelling(op, _Speller(type_))
        if value is not None:
            op.result.replace_all_uses_with(value)
            count += 1
    torch_ir.erase_dead(block)
    return count


@dataclass(frozen=True)
class _Speller:
    """Makes operations of the shape, and unless told otherwise of the dtype, of one result."""

    type_: torch_ir.TensorType

    def __call__(
        self, name: str, *operands: ir.Value | float | str | None, dtype: str | None = None
    ) -> ir.Value:
        result = replace(self.type_, dtype=dtype or self.type_.dtype)
        return torch_ir.make(f"torch.aten.{name}", result, [_constant(operand) for operand in operands])

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        """``value``, of whatever shape it has, as ``dtype``."""
        type_ = torch_ir.tensor_type(value)
        assert type_ is not None
        if type_.dtype == dtype:
            return value
        return torch_ir.make(_CAST, replace(type_, dtype=dtype), [value, torch_ir.make_dtype(dtype)])

    @property
    def computed(self) -> str:
        """The dtype that PyTorch computes this result in."""
        return "float32" if self.type_.dtype in _SMALL_FLOATS else self.type_.dtype


def _constant(operand: Any) -> ir.Value:
    for kind, make in _MAKERS.items():
        if isinstance(operand, kind):
            return make(operand)
    return operand


_MAKERS: dict[type, Callable[[Any], ir.Value]] = {
    bool: torch_ir.make_bool,
    int: torch_ir.make_int,
    float: torch_ir.make_float,
    str: torch_ir.make_str,
    type(None): lambda _: torch_ir.make_none(),
}

_Spelling = Callable[[ir.Operation, _Speller], ir.Value | None]


def _cube(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """In bfloat16 x * x is rounded before it is multiplied again."""
    x, exponent = op.operands
    if torch_ir.constant(exponent) != 3 or make.type_.dtype != "bfloat16":
        return None
    return make("mul.Tensor", make("mul.Tensor", x, x), x)


def _gelu(op: ir.Operation, make: _Speller) -> ir.Value | None:
    if torch_ir.constant(op.operands[1]) != "tanh":
        return None
    dtype = make.computed
    wide = replace(make, type_=replace(make.type_, dtype=dtype))
    x = make.cast(op.operands[0], dtype)
    cube = wide("mul.Tensor", wide("mul.Tensor", x, x), x)
    sum_ = wide("add.Tensor", x, wide("mul.Scalar", cube, 0.044715), 1)
    tanh = wide("tanh", wide("mul.Scalar", sum_, math.sqrt(2 / math.pi)))
    half = wide("mul.Scalar", x, 0.5)
    return make.cast(wide("mul.Tensor", half, wide("add.Scalar", tanh, 1.0, 1)), make.type_.dtype)


_SPELLINGS: dict[str, _Spelling] = {
    "pow.Tensor_Scalar": _cube,
    "gelu": _gelu,
}
