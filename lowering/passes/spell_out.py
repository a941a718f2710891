"""Step 6, spell out operations that the torch dialect lowers to something else than they are.

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

    def as_computed(self) -> _Speller:
        """Return a speller of the same, in the dtype that PyTorch computes in."""
        return _Speller(replace(self.type_, dtype=self.computed))

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


def _power(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """A cube in bfloat16 rounds x * x before it multiplies again; integers need no float."""
    x, exponent = op.operands
    power, dtype = torch_ir.constant(exponent), make.type_.dtype
    whole = "int" in dtype and isinstance(power, int) and 0 < power <= 64
    if not (whole or (dtype == "bfloat16" and power == 3)):
        return None
    x = make.cast(x, dtype)
    value = x
    for bit in f"{int(power):b}"[1:]:
        value = make("mul.Tensor", value, value)
        value = make("mul.Tensor", value, x) if bit == "1" else value
    return value


def _negative(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """Negate integers without going by way of floats."""
    return make("mul.Scalar", op.operands[0], -1) if "int" in make.type_.dtype else None


def _shift(op: ir.Operation, make: _Speller) -> ir.Value | None:
    side = "left" if "lshift" in torch_ir.op_name(op) else "right"
    return make(
        f"bitwise_{side}_shift.Tensor", *(make.cast(value, make.type_.dtype) for value in op.operands)
    )


def _truth(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """Compute first, of anything but booleans, whether each element is other than zero."""
    x, *rest = op.operands
    type_ = torch_ir.tensor_type(x)
    if type_ is None or type_.dtype == "bool":
        return None
    true = _Speller(type_)("ne.Scalar", x, 0, dtype="bool")
    name = torch_ir.op_name(op).removeprefix("torch.aten.")
    return make.cast(make(name, true, *rest, dtype="bool"), make.type_.dtype)


def _with_tensor(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """Make a tensor without axes of the number that ``op`` computes with."""
    x, y = op.operands
    dtype = "float64" if str(y.type) == "!torch.float" else "int64"
    number = torch_ir.make("torch.prim.NumToTensor.Scalar", torch_ir.TensorType((), dtype), [y])
    name = torch_ir.op_name(op).removeprefix("torch.aten.").replace(".Scalar", ".Tensor")
    value = make(name, x, make.cast(number, make.type_.dtype))
    again = _SPELLINGS.get(name)
    made = torch_ir.producer(value)
    assert made is not None
    return (again(made, make) if again is not None else None) or value


def _gelu(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """x / (1 + exp(-2 z)): it is x / 2 * (1 + tanh z), and keeps its digits where x is negative."""
    if torch_ir.constant(op.operands[1]) != "tanh":
        return None
    dtype = make.computed
    wide = make.as_computed()
    x = make.cast(op.operands[0], dtype)
    cube = wide("mul.Tensor", wide("mul.Tensor", x, x), x)
    sum_ = wide("add.Tensor", x, wide("mul.Scalar", cube, 0.044715), 1)
    power = wide("exp", wide("mul.Scalar", sum_, -2 * math.sqrt(2 / math.pi)))
    return make.cast(wide("div.Tensor", x, wide("add.Scalar", power, 1.0, 1)), make.type_.dtype)


def _float_remainder(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """Take the remainder of floats: that of their magnitudes, which is exact, with the sign of the first."""
    dtype = make.computed
    if "float" not in dtype:
        return None
    x, y = (make.cast(value, dtype) for value in op.operands)
    return make.cast(_rest(x, y, make.as_computed()), make.type_.dtype)


def _rest(x: ir.Value, y: ir.Value, wide: _Speller) -> ir.Value:
    rest = wide("remainder.Tensor", _Speller(_type(x))("abs", x), _Speller(_type(y))("abs", y))
    return wide("where.self", _Speller(_type(x))("lt.Scalar", x, 0.0, dtype="bool"), wide("neg", rest), rest)


def _type(value: ir.Value) -> torch_ir.TensorType:
    type_ = torch_ir.tensor_type(value)
    assert type_ is not None
    return type_


def _number(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """A Python number as a tensor is a float64 where it meets one."""
    if make.type_.dtype == "float32":
        double = torch_ir.make(op.name, replace(make.type_, dtype="float64"), list(op.operands))
        for use in list(op.result.uses):
            user = use.owner.operation
            if "float64" in map(torch_ir.dtype_of, (*user.operands, *user.results)):
                user.operands[use.operand_number] = double
    return None


def _same(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """A NaN does not equal itself; the comparison would be folded."""
    x, y = op.operands
    type_ = torch_ir.tensor_type(x)
    if x != y or type_ is None or "float" not in type_.dtype:
        return None
    return make("logical_not", make("ne.Tensor", x, x))


def _elu(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """exp(x) - 1 has no digits left where x is small."""
    factors = [torch_ir.constant(operand) for operand in list(op.operands)[1:]]
    if torch_ir.NOT_CONSTANT in factors:
        return None
    alpha, scale, input_scale = map(float, factors)
    dtype = make.computed
    wide = make.as_computed()
    x = make.cast(op.operands[0], dtype)
    scaled = x if input_scale == 1 else wide("mul.Scalar", x, input_scale)
    negative = wide("mul.Scalar", wide("expm1", scaled), alpha * scale)
    positive = x if scale == 1 else wide("mul.Scalar", x, scale)
    value = wide("where.self", wide("le.Scalar", x, 0.0, dtype="bool"), negative, positive)
    return make.cast(value, make.type_.dtype)


def _divided(op: ir.Operation, make: _Speller) -> ir.Value | None:
    """The quotient rounded down: of integers without floats, of floats by way of their exact remainder."""
    x, y, mode = (*op.operands, None) if len(op.operands) == 2 else op.operands
    if mode is not None and torch_ir.constant(mode) != "floor":
        return None
    if torch_ir.tensor_type(y) is None:
        return None
    return _floored_floats(x, y, make) if "float" in make.type_.dtype else _floored_integers(x, y, make)


def _floored_integers(x: ir.Value, y: ir.Value, make: _Speller) -> ir.Value:
    x, y = (make.cast(value, make.type_.dtype) for value in (x, y))
    quotient = make("div.Tensor_mode", x, y, "trunc")
    rest = make("sub.Tensor", x, make("mul.Tensor", quotient, y), 1)
    inexact = make("ne.Scalar", rest, 0, dtype="bool")
    opposite = make("lt.Scalar", make("bitwise_xor.Tensor", rest, y), 0, dtype="bool")
    one_less = make("logical_and", inexact, opposite, dtype="bool")
    return make("sub.Tensor", quotient, make.cast(one_less, make.type_.dtype), 1)


def _floored_floats(x: ir.Value, y: ir.Value, make: _Speller) -> ir.Value:
    if make.type_.dtype in _SMALL_FLOATS and any(torch_ir.dtype_of(v) == "float32" for v in (x, y)):
        # What is no 16-bit number yet is a number without axes, rounded to the type of the other.
        x, y = (make.cast(value, make.type_.dtype) for value in (x, y))
    dtype = make.computed
    wide = make.as_computed()
    x, y = (make.cast(value, dtype) for value in (x, y))
    rest = _rest(x, y, wide)
    inexact = wide("ne.Scalar", rest, 0.0, dtype="bool")
    signs = (_Speller(_type(value))("lt.Scalar", value, 0.0, dtype="bool") for value in (rest, y))
    one_less = wide("logical_and", inexact, wide("logical_xor", *signs, dtype="bool"), dtype="bool")
    exact = wide("div.Tensor", wide("sub.Tensor", x, rest, 1), y)
    quotient = wide("sub.Tensor", exact, make.cast(one_less, dtype), 1)
    floor = wide("floor", quotient)
    above = wide("gt.Scalar", wide("sub.Tensor", quotient, floor, 1), 0.5, dtype="bool")
    value = wide("add.Tensor", floor, make.cast(above, dtype), 1)
    by_zero = _Speller(_type(y))("eq.Scalar", y, 0.0, dtype="bool")
    return make.cast(wide("where.self", by_zero, wide("div.Tensor", x, y), value), make.type_.dtype)


_SPELLINGS: dict[str, _Spelling] = {
    "pow.Tensor_Scalar": _power,
    "neg": _negative,
    "__lshift__.Tensor": _shift,
    "__rshift__.Tensor": _shift,
    "any": _truth,
    "any.dim": _truth,
    "any.dims": _truth,
    "all": _truth,
    "all.dim": _truth,
    "fmod.Scalar": _with_tensor,
    "bitwise_or.Scalar": _with_tensor,
    "bitwise_xor.Scalar": _with_tensor,
    "fmod.Tensor": _float_remainder,
    "gelu": _gelu,
    "torch.prim.NumToTensor.Scalar": _number,
    "eq.Tensor": _same,
    "elu": _elu,
    "div.Tensor_mode": _divided,
    "floor_divide": _divided,
}
