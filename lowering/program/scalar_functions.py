"""Rules of ``scalar_ops`` about functions that IREE computes inexactly, or in a way that can end the process.

The sine and cosine of a large angle, such as a position times a frequency, lose a digit for each of its own:
here they are reduced and computed in float64, as is what ``scalar_elementary`` has.  The remainder of a
division is the exact one.  An integer divided by zero would end the process where that traps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from iree.compiler import ir
from iree.compiler.dialects import arith
from iree.compiler.dialects import math as math_ops

from patterns import torch_ir

from ..errors import CompileError
from ..targets import Target
from . import scalar_elementary
from .scalar_double import Double

Rule = Callable[[ir.Operation], ir.Value | None]


def rules(target: Target) -> dict[str, Rule]:
    """The rules for ``target``."""
    general: dict[str, Rule] = {"arith.remf": _remainder, "arith.divsi": _quotient, "arith.remsi": _quotient}
    if target.has_precise_functions:
        return general
    functions: dict[str, Rule] = {
        "math.sin": _sine,
        "math.cos": _cosine,
        "math.tan": _tangent,
        **scalar_elementary.RULES,
    }
    if target.is_gpu:
        return {**general, **functions}
    functions |= {"math.log10": _logarithm, "math.log2": _log2, "math.tanh": _tanh}
    return {**general, **functions, **{name: _or_refused(functions.get(name)) for name in _LACKING}}


# Functions of float64 for which nothing is linked into a CPU program.
_LACKING = tuple(
    f"math.{name}" for name in ("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "erf")
)


def _or_refused(rule: Rule | None) -> Rule:
    """``rule``, for anything but float64."""

    def refusing(op: ir.Operation) -> ir.Value | None:
        if str(op.result.type) == "f64":
            where, name = torch_ir.location(op), op.name.removeprefix("math.")
            raise CompileError(
                f"{where}: {name} of float64 cannot be compiled for the CPU; compute it in float32"
            )
        return rule(op) if rule is not None else None

    return refusing


def _log2(op: ir.Operation) -> ir.Value | None:
    return _logarithm(op) if str(op.result.type) == "f64" else scalar_elementary.RULES[op.name](op)


def _logarithm(op: ir.Operation) -> ir.Value | None:
    """The natural one over that of the base: no other is there for every float."""
    if not _is_float(op):
        return None
    factor = 1 / math.log(10 if op.name == "math.log10" else 2)
    natural = math_ops.LogOp(op.operands[0]).result
    return arith.MulFOp(natural, arith.ConstantOp(op.result.type, factor).result).result


def _tanh(op: ir.Operation) -> ir.Value | None:
    """1 - 2 / (exp(2 x) + 1), of float64."""
    if str(op.result.type) != "f64":
        return None
    double, x = Double(), op.operands[0]
    power = math_ops.ExpOp(arith.AddFOp(x, x).result).result
    rest = arith.DivFOp(double.number(2.0), arith.AddFOp(power, double.number(1.0)).result).result
    return arith.SubFOp(double.number(1.0), rest).result


# pi / 2 in three parts; what the first two lack is below their 106 bits.
_HALF_PI = (math.pi / 2, 6.123233995736766e-17, -1.4973849048591833e-33)
# 2 / pi, 24 bits each: enough for the largest float32.
_TWO_OVER_PI = (0xA2F983, 0x6E4E44, 0x1529FC, 0x2757D1, 0xF534DD, 0xC0DB62, 0x95993C, 0x439041)
# Taylor's series: below pi / 4 the first term left out is less than the last bit.
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(10)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(10)]


def _sine(op: ir.Operation) -> ir.Value | None:
    return _wave(op, 0)


def _cosine(op: ir.Operation) -> ir.Value | None:
    return _wave(op, 1)


def _tangent(op: ir.Operation) -> ir.Value | None:
    if not _is_float(op):
        return None
    double = Double()
    return double.back(arith.DivFOp(_turned(op, 0), _turned(op, 1)).result, op.result.type)


def _wave(op: ir.Operation, quarters: int) -> ir.Value | None:
    return Double().back(_turned(op, quarters), op.result.type) if _is_float(op) else None


def _is_float(op: ir.Operation) -> bool:
    return str(op.result.type) in ("f32", "f64")


def _turned(op: ir.Operation, quarters: int) -> ir.Value:
    """The sine, in float64, of the operand and ``quarters`` of a turn more."""
    double = Double()
    x = double.of(op.operands[0])
    turns = math_ops.FmaOp(x, double.number(2 / math.pi), double.number(0.5)).result
    count = math_ops.FloorOp(turns).result
    rest = x
    for part in _HALF_PI:
        rest = double.minus_product(rest, count, double.number(part))
    rest = double.when(double.is_(arith.CmpFPredicate.OEQ, count, 0.0), x, rest)  # with the sign of a zero
    known = double.is_(arith.CmpFPredicate.OLT, double.size(x), 2.0**52)
    if op.operands[0].type == double.type:
        rest = double.when(known, rest, math.nan)  # nothing would be left of it
    else:
        far, far_count = _far(x)
        rest, count = double.when(known, rest, far), double.when(known, count, far_count)
    square = arith.MulFOp(rest, rest).result
    sine = arith.MulFOp(double.polynomial(square, _SINE), rest).result
    cosine = double.polynomial(square, _COSINE)
    shifted = arith.AddFOp(count, double.number(float(quarters))).result if quarters else count
    quadrant = double.minus_product(shifted, _floor_of(shifted, 0.25), double.number(4.0))
    half = _floor_of(quadrant, 0.5)
    odd = arith.SubFOp(quadrant, arith.AddFOp(half, half).result).result
    is_odd = arith.CmpFOp(arith.CmpFPredicate.OEQ, odd, double.number(1.0)).result
    value = arith.SelectOp(is_odd, cosine, sine).result
    is_lower = arith.CmpFOp(arith.CmpFPredicate.OEQ, half, double.number(1.0)).result
    return arith.SelectOp(is_lower, arith.NegFOp(value).result, value).result


def _far(x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Reduce an angle beyond 2^52 that is a float32: the rest, and the number of quarters of a turn in it.

    Its product with each part of 2 / pi is exact, and so is what that is more than whole turns.
    """
    double = Double()
    turns = double.number(0.0)
    for place, part in enumerate(_TWO_OVER_PI):
        product = double.two(arith.MulFOp, x, part * 2.0 ** (-24 * (place + 1) - 2))
        whole = double.floor(double.two(arith.AddFOp, product, 0.5))
        turns = double.two(arith.AddFOp, turns, double.two(arith.SubFOp, product, whole))
    count = double.floor(math_ops.FmaOp(turns, double.number(4.0), double.number(0.5)).result)
    rest = double.minus_product(turns, count, double.number(0.25))
    return double.two(arith.MulFOp, rest, 2 * math.pi), count


def _floor_of(x: ir.Value, factor: float) -> ir.Value:
    return math_ops.FloorOp(arith.MulFOp(x, Double().number(factor)).result).result


def _remainder(op: ir.Operation) -> ir.Value | None:
    """x - y * trunc(x / y) without any rounding: 53 bits of the quotient at a time."""
    if not _is_float(op):
        return None
    double, (x, y) = Double(), map(Double().of, op.operands)
    size = math_ops.AbsFOp(y).result
    rest = whole = math_ops.AbsFOp(x).result
    for _ in range(6):
        rest = double.minus_product(rest, math_ops.TruncOp(arith.DivFOp(rest, size).result).result, size)
    # The last quotient may have been rounded up to the next integer.
    below = arith.CmpFOp(arith.CmpFPredicate.OLT, rest, double.number(0.0)).result
    rest = arith.SelectOp(below, arith.AddFOp(rest, size).result, rest).result
    smaller = arith.CmpFOp(arith.CmpFPredicate.OLT, whole, size).result
    rest = arith.SelectOp(smaller, whole, rest).result
    # Not by copysign, which ends IREE's compiler for AMD.
    negative = arith.CmpFOp(arith.CmpFPredicate.OLT, x, double.number(0.0)).result
    signed = arith.SelectOp(negative, arith.NegFOp(rest).result, rest).result
    return double.back(signed, op.result.type)


def _quotient(op: ir.Operation) -> ir.Value | None:
    """An integer division, or its remainder, that never traps: by zero as by one, by -1 as a negation."""
    x, y = op.operands
    known = torch_ir.producer(y)
    if known is not None and known.name == "arith.constant":
        return None
    if not isinstance(x.type, ir.IntegerType):
        return None
    zero, one, minus = (arith.ConstantOp(x.type, value).result for value in (0, 1, -1))
    by_minus = arith.CmpIOp(arith.CmpIPredicate.eq, y, minus).result
    by_zero = arith.CmpIOp(arith.CmpIPredicate.eq, y, zero).result
    divisor = arith.SelectOp(arith.OrIOp(by_minus, by_zero).result, one, y).result
    if op.name == "arith.remsi":
        return arith.RemSIOp(x, divisor).result
    quotient = arith.DivSIOp(x, divisor).result
    return arith.SelectOp(by_minus, arith.SubIOp(zero, x).result, quotient).result
