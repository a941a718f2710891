"""Float64 arithmetic for the rules of ``scalar_ops``, which compute functions of float32 in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith
from iree.compiler.dialects import math as math_ops

_BIAS, _MANTISSA = 1023, 52
_OLT, _OEQ, _UNO = arith.CmpFPredicate.OLT, arith.CmpFPredicate.OEQ, arith.CmpFPredicate.UNO


class Double:
    """Shorthands at the current insertion point."""

    def __init__(self) -> None:
        self.type = ir.F64Type.get()

    def of(self, value: ir.Value) -> ir.Value:
        return value if value.type == self.type else arith.ExtFOp(self.type, value).result

    def number(self, value: float) -> ir.Value:
        return arith.ConstantOp(self.type, value).result

    def back(self, value: ir.Value, type_: ir.Type) -> ir.Value:
        return value if value.type == type_ else arith.TruncFOp(type_, value).result

    def two(self, op: Callable[..., ir.OpView], a: ir.Value | float, b: ir.Value | float) -> ir.Value:
        """``op`` of two operands, numbers or values."""
        return op(*(self.number(v) if isinstance(v, (int, float)) else v for v in (a, b))).result

    def is_(self, predicate: arith.CmpFPredicate, a: ir.Value, b: ir.Value | float) -> ir.Value:
        return arith.CmpFOp(predicate, a, b if isinstance(b, ir.Value) else self.number(b)).result

    def when(self, condition: ir.Value, yes: ir.Value | float, no: ir.Value | float) -> ir.Value:
        yes, no = (self.number(v) if isinstance(v, (int, float)) else v for v in (yes, no))
        return arith.SelectOp(condition, yes, no).result

    def floor(self, x: ir.Value) -> ir.Value:
        return math_ops.FloorOp(x).result

    def size(self, x: ir.Value) -> ir.Value:
        return math_ops.AbsFOp(x).result

    def minus_product(self, x: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """x - a * b, rounded once."""
        return math_ops.FmaOp(arith.NegFOp(a).result, b, x).result

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """The sum of ``coefficients`` times the powers of ``x``, from the first on."""
        value = self.number(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = math_ops.FmaOp(value, x, self.number(coefficient)).result
        return value

    def signed(self, size: ir.Value, like: ir.Value) -> ir.Value:
        """``size``, positive, with the sign of ``like``."""
        return self.when(self.is_negative(like), arith.NegFOp(size).result, size)

    def is_negative(self, x: ir.Value) -> ir.Value:
        """Tell whether the sign is set, as it is of -0."""
        bits = self._bits(x)
        return arith.CmpIOp(arith.CmpIPredicate.slt, bits, self._integer(0)).result

    def power_of_two(self, x: ir.Value) -> ir.Value:
        """2 ** x: exact of whole numbers, else to 1e-14 of itself; 0 and infinity far beyond float32."""
        limit = 1000.0
        inside = self.when(self.is_(_OLT, x, limit), x, limit)
        inside = self.when(self.is_(_OLT, inside, -limit), -limit, inside)
        whole = self.floor(self.two(arith.AddFOp, inside, 0.5))
        rest = self.two(arith.MulFOp, self.two(arith.SubFOp, inside, whole), math.log(2))
        series = self.polynomial(rest, [1 / math.factorial(n) for n in range(13)])
        exponent = arith.FPToSIOp(ir.IntegerType.get_signless(32), whole).result
        exponent = arith.ExtSIOp(ir.IntegerType.get_signless(64), exponent).result
        biased = arith.AddIOp(exponent, self._integer(_BIAS)).result
        scale = arith.BitcastOp(self.type, arith.ShLIOp(biased, self._integer(_MANTISSA)).result).result
        value = self.two(arith.MulFOp, series, scale)
        return self.when(self.is_(_UNO, x, x), x, value)

    def logarithm(self, x: ir.Value) -> ir.Value:
        """The natural logarithm to 1e-15, exact of 1; of 0 minus infinity, of what is below it NaN."""
        bits = self._bits(x)
        # The exponent of x over sqrt(1/2): then the mantissa is between that and sqrt(2).
        half = arith.BitcastOp(ir.IntegerType.get_signless(64), self.number(math.sqrt(0.5))).result
        above = arith.SubIOp(bits, half).result
        exponent = arith.ShRSIOp(above, self._integer(_MANTISSA)).result
        shifted = arith.ShLIOp(exponent, self._integer(_MANTISSA)).result
        mantissa = arith.BitcastOp(self.type, arith.SubIOp(bits, shifted).result).result
        count = arith.TruncIOp(ir.IntegerType.get_signless(32), exponent).result
        power = arith.SIToFPOp(self.type, count).result
        ratio = self.two(
            arith.DivFOp, self.two(arith.SubFOp, mantissa, 1.0), self.two(arith.AddFOp, mantissa, 1.0)
        )
        square = self.two(arith.MulFOp, ratio, ratio)
        series = self.polynomial(square, [2 / (2 * n + 1) for n in range(11)])
        value = math_ops.FmaOp(power, self.number(math.log(2)), self.two(arith.MulFOp, ratio, series)).result
        value = self.when(self.is_(_OEQ, x, math.inf), math.inf, value)
        value = self.when(self.is_(_OEQ, x, 0.0), -math.inf, value)
        return self.when(self.is_(arith.CmpFPredicate.ULT, x, 0.0), math.nan, value)

    def _bits(self, x: ir.Value) -> ir.Value:
        return arith.BitcastOp(ir.IntegerType.get_signless(64), x).result

    def _integer(self, value: int) -> ir.Value:
        return arith.ConstantOp(ir.IntegerType.get_signless(64), value).result
