"""Rules of ``scalar_ops`` about powers, hyperbolic functions and arcs of float32.

IREE takes them apart into logarithms and exponentials of float32, which leaves few digits of a large power or
of what is near zero, and NaN of zeros and infinities.  Here they are computed in float64 and rounded once,
special values as C's functions have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from iree.compiler import ir
from iree.compiler.dialects import arith
from iree.compiler.dialects import math as math_ops

from patterns import torch_ir

from .scalar_double import Double

_OLT, _OEQ, _UNO = arith.CmpFPredicate.OLT, arith.CmpFPredicate.OEQ, arith.CmpFPredicate.UNO
_ADD, _SUB, _MUL, _DIV = arith.AddFOp, arith.SubFOp, arith.MulFOp, arith.DivFOp
# Exponents for which IREE multiplies, divides or takes a root, as PyTorch does.
_PLAIN_EXPONENTS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0)
# Below this the first three terms of a series are exact to 1e-13.
_NEAR_ZERO = 1e-2
_Function = Callable[..., ir.Value]


def _in_double(function: _Function) -> Callable[[ir.Operation], ir.Value | None]:
    """The rule that computes ``function`` of float64 in place of an operation on float32."""

    def rule(op: ir.Operation) -> ir.Value | None:
        if str(op.result.type) != "f32":
            return None
        double = Double()
        return double.back(function(double, *map(double.of, op.operands)), op.result.type)

    return rule


def _power(op: ir.Operation) -> ir.Value | None:
    exponent = torch_ir.producer(op.operands[1])
    if exponent is not None and exponent.name == "arith.constant":
        value = exponent.attributes["value"]
        if isinstance(value, ir.FloatAttr) and value.value in _PLAIN_EXPONENTS:
            return None
    return _in_double(_raised)(op)


def _raised(double: Double, x: ir.Value, y: ir.Value) -> ir.Value:
    size = double.size(x)
    value = double.power_of_two(double.two(_MUL, _log2(double, size), y))
    # 1 to an infinite power.
    value = double.when(double.is_(_OEQ, size, 1.0), 1.0, value)
    whole = double.is_(_OEQ, double.floor(y), y)
    half = double.two(_MUL, y, 0.5)
    even = double.is_(_OEQ, double.floor(half), half)
    odd = arith.AndIOp(whole, arith.XOrIOp(even, arith.ConstantOp(even.type, 1).result).result).result
    negated = arith.AndIOp(odd, double.is_negative(x)).result
    value = double.when(negated, arith.NegFOp(value).result, value)
    rooted = double.when(whole, value, math.nan)
    finite = arith.AndIOp(double.is_(_OLT, x, 0.0), double.is_(_OLT, size, math.inf)).result
    value = double.when(finite, rooted, value)
    value = double.when(double.is_(_UNO, x, y), math.nan, value)
    value = double.when(double.is_(_OEQ, x, 1.0), 1.0, value)
    return double.when(double.is_(_OEQ, y, 0.0), 1.0, value)


def _log2(double: Double, x: ir.Value) -> ir.Value:
    return double.two(_MUL, double.logarithm(x), 1 / math.log(2))


def _series(double: Double, x: ir.Value, value: ir.Value, third: float, fifth: float) -> ir.Value:
    """``value``, of the size of ``x`` and with its sign; near zero x + third * x^3 + fifth * x^5."""
    square = double.two(_MUL, x, x)
    near = double.two(_MUL, double.polynomial(square, [1.0, third, fifth]), x)
    value = double.signed(value, x)
    return double.when(double.is_(_OLT, double.size(x), _NEAR_ZERO), near, value)


def _sinh(double: Double, x: ir.Value) -> ir.Value:
    power = double.power_of_two(double.two(_MUL, double.size(x), 1 / math.log(2)))
    twice = double.two(_SUB, power, double.two(_DIV, 1.0, power))
    return _series(double, x, double.two(_MUL, twice, 0.5), 1 / 6, 1 / 120)


def _asinh(double: Double, x: ir.Value) -> ir.Value:
    root = math_ops.SqrtOp(double.two(_ADD, double.two(_MUL, x, x), 1.0)).result
    value = double.logarithm(double.two(_ADD, double.size(x), root))
    return _series(double, x, value, -1 / 6, 3 / 40)


def _acosh(double: Double, x: ir.Value) -> ir.Value:
    root = math_ops.SqrtOp(double.two(_SUB, double.two(_MUL, x, x), 1.0)).result
    value = double.logarithm(double.two(_ADD, x, root))
    return double.when(double.is_(arith.CmpFPredicate.ULT, x, 1.0), math.nan, value)


def _atanh(double: Double, x: ir.Value) -> ir.Value:
    size = double.size(x)
    ratio = double.two(_DIV, double.two(_ADD, 1.0, size), double.two(_SUB, 1.0, size))
    value = double.two(_MUL, double.logarithm(ratio), 0.5)
    return _series(double, x, value, 1 / 3, 1 / 5)


def _atan(double: Double, x: ir.Value) -> ir.Value:
    return _arc(double, x, double.number(1.0))


def _arc(double: Double, y: ir.Value, x: ir.Value) -> ir.Value:
    """The angle of the point (x, y): of the smaller coordinate over the larger, then turned to its octant."""
    across, up = double.size(x), double.size(y)
    steep = double.is_(_OLT, across, up)
    small, large = double.when(steep, across, up), double.when(steep, up, across)
    # Zero over zero is zero, infinity over infinity one.
    same = double.when(double.is_(_OEQ, large, 0.0), 0.0, 1.0)
    ratio = double.when(double.is_(_OEQ, small, large), same, double.two(_DIV, small, large))
    angle = _arc_of_ratio(double, ratio)
    angle = double.when(steep, double.two(_SUB, math.pi / 2, angle), angle)
    angle = double.when(double.is_negative(x), double.two(_SUB, math.pi, angle), angle)
    angle = double.when(double.is_(_UNO, x, y), math.nan, angle)
    return double.signed(angle, y)


def _arc_of_ratio(double: Double, ratio: ir.Value) -> ir.Value:
    """Taylor's series, up to the tangent of pi / 8; above it of the angle less pi / 4."""
    turned = double.two(_DIV, double.two(_SUB, ratio, 1.0), double.two(_ADD, ratio, 1.0))
    is_turned = double.is_(_OLT, double.number(math.sqrt(2) - 1), ratio)
    ratio = double.when(is_turned, turned, ratio)
    square = double.two(_MUL, ratio, ratio)
    series = double.polynomial(square, [(-1) ** n / (2 * n + 1) for n in range(16)])
    base = double.when(is_turned, math.pi / 4, 0.0)
    return math_ops.FmaOp(series, ratio, base).result


RULES: dict[str, Callable[[ir.Operation], ir.Value | None]] = {
    "math.exp2": _in_double(Double.power_of_two),
    "math.log2": _in_double(_log2),
    "math.powf": _power,
    "math.sinh": _in_double(_sinh),
    "math.asinh": _in_double(_asinh),
    "math.acosh": _in_double(_acosh),
    "math.atanh": _in_double(_atanh),
    "math.atan": _in_double(_atan),
    "math.atan2": _in_double(_arc),
}
