"""Step 7, spell as integer arithmetic the conversions of small floats that a target lacks or drops.

IREE lowers no float8 conversion for CUDA and on AMD only those of the hardware's own flavour.  On the CPU it
reads a NaN as a number, narrows wrongly near the smallest normal number, and computes bfloat16 in float32:
there a narrowing that is widened again in the same dispatch would round nothing.  Where it computes float16
by itself, LLVM takes an operation between a widening and a narrowing for one of float16, and joins a product
and a sum of these: a narrowing that says how it rounds is left alone.
Loading and storing the bytes works everywhere, so a conversion becomes bit operations on them,
exact for every input: round to nearest even, overflow as torch's own conversion does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from iree.compiler import ir
from iree.compiler.dialects import arith

from ..signature import host_arch
from ..targets import Target


@dataclass(frozen=True)
class Format:
    """An 8-bit float: ``mantissa`` bits, exponent ``bias``, the codes of the largest finite value and of NaN.

    ``overflow`` is what a value too large becomes: torch makes e4m3fnuz NaN and e5m2 infinite; of e4m3fn
    it makes NaN in older versions, and the largest value in newer ones.
    ``negative_zero`` is False where 0x80 is NaN (the fnuz formats).
    """

    mantissa: int
    bias: int
    largest: int
    nan: int
    overflow: int
    negative_zero: bool = True

    @property
    def infinity(self) -> int | None:
        return self.overflow if self.overflow not in (self.largest, self.nan) else None


_TOO_LARGE = torch.full((), 1e6).to(torch.float8_e4m3fn).view(torch.uint8).item()

FORMATS = {
    "f8E4M3FN": Format(mantissa=3, bias=7, largest=0x7E, nan=0x7F, overflow=int(_TOO_LARGE)),
    "f8E4M3FNUZ": Format(mantissa=3, bias=8, largest=0x7F, nan=0x80, overflow=0x80, negative_zero=False),
    "f8E5M2": Format(mantissa=2, bias=15, largest=0x7B, nan=0x7F, overflow=0x7C),
}

# A format of exponents only: powers of two, 0xFF is NaN.
_SCALE = "f8E8M0FNU"
_BRAIN = "bf16"

_LACKING = {
    "arith.extf": {
        "cpu": set(FORMATS),
        "cuda": {*FORMATS, _SCALE},
        "gfx950": {"f8E4M3FNUZ"},
        "gfx942": {"f8E4M3FN", "f8E5M2"},
    },
    "arith.truncf": {
        "cpu": {*FORMATS, _BRAIN},
        "cuda": set(FORMATS),
        "gfx950": {"f8E4M3FNUZ"},
        "gfx942": {"f8E4M3FN", "f8E5M2"},
    },
}

# Processors that compute float16 by themselves, on x86 and on Arm.
_HALF = {"avx512fp16", "asimdhp"}


def rewrite_unsupported(module: ir.Module, target: Target) -> int:
    """Rewrite ``arith.extf`` and ``arith.truncf`` of small scalars in place; returns how many."""
    has_half = target.backend == "cpu" and not _HALF.isdisjoint(host_arch().split("+"))
    nearest = ir.IntegerAttr.get(ir.IntegerType.get_signless(32, module.context), 0)
    lacking = {
        name: table.get(target.backend, set()) | table.get(target.name, set())
        for name, table in _LACKING.items()
    }
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if _narrow_type(op.operation) in lacking.get(op.operation.name, ()):
            found.append(op.operation)
        elif has_half and op.operation.name == "arith.truncf" and _narrow_type(op.operation) == "f16":
            op.operation.attributes["roundingmode"] = nearest
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            value = _widened(op) if op.name == "arith.extf" else _narrowed(op)
        op.result.replace_all_uses_with(value)
        op.erase()
    return len(found)


def _narrow_type(op: ir.Operation) -> str | None:
    if op.name == "arith.extf":
        return str(op.operands[0].type)
    return str(op.result.type) if op.name == "arith.truncf" else None


class _Bits:
    """Shorthands for i32 arithmetic at the current insertion point."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        self.f32 = ir.F32Type.get()

    def const(self, value: int) -> ir.Value:
        signed = value - (1 << 32) if value >= 1 << 31 else value
        return arith.ConstantOp(self.i32, signed).result

    def number(self, value: float) -> ir.Value:
        return arith.ConstantOp(self.f32, value).result

    def as_float(self, bits: ir.Value) -> ir.Value:
        return arith.BitcastOp(self.f32, bits).result

    def as_bits(self, value: ir.Value) -> ir.Value:
        return arith.BitcastOp(self.i32, value).result

    def two(self, op: Callable[..., ir.OpView], a: ir.Value, b: int) -> ir.Value:
        return op(a, self.const(b)).result

    def when(
        self, predicate: arith.CmpIPredicate, a: ir.Value, b: int, yes: ir.Value, no: ir.Value
    ) -> ir.Value:
        test = arith.CmpIOp(predicate, a, self.const(b)).result
        return arith.SelectOp(test, yes, no).result


def _widened(op: ir.Operation) -> ir.Value:
    return _decode_scale(op) if str(op.operands[0].type) == _SCALE else _decode(op)


def _narrowed(op: ir.Operation) -> ir.Value:
    return _encode_brain(op) if str(op.result.type) == _BRAIN else _encode(op)


def _encode_brain(op: ir.Operation) -> ir.Value:
    """The upper half of a float32, rounded to nearest even."""
    bits = _Bits()
    wide = bits.as_bits(_convert(op.operands[0], bits.f32))
    odd = bits.two(arith.AndIOp, bits.two(arith.ShRUIOp, wide, 16), 1)
    rounded = arith.AddIOp(bits.two(arith.AddIOp, wide, 0x7FFF), odd).result
    upper = bits.two(arith.ShRUIOp, rounded, 16)
    magnitude = bits.two(arith.AndIOp, wide, 0x7FFFFFFF)
    code = bits.when(arith.CmpIPredicate.ugt, magnitude, 0x7F800000, bits.const(0x7FC0), upper)
    code16 = arith.TruncIOp(ir.IntegerType.get_signless(16), code).result
    return arith.BitcastOp(op.result.type, code16).result


def _decode_scale(op: ir.Operation) -> ir.Value:
    """The power of two of an e8m0 code: its byte is a float32's exponent, zero a subnormal's."""
    bits = _Bits()
    code8 = arith.BitcastOp(ir.IntegerType.get_signless(8), op.operands[0]).result
    code = arith.ExtUIOp(bits.i32, code8).result
    power = bits.two(arith.ShLIOp, code, 23)
    power = bits.when(arith.CmpIPredicate.eq, code, 0, bits.const(0x00400000), power)
    power = bits.when(arith.CmpIPredicate.eq, code, 0xFF, bits.const(0x7FC00000), power)
    return _convert(bits.as_float(power), op.result.type)


def _decode(op: ir.Operation) -> ir.Value:
    """The float32 (or wider, or bfloat16: exact either way) value of a float8 code."""
    form, bits = FORMATS[str(op.operands[0].type)], _Bits()
    code8 = arith.BitcastOp(ir.IntegerType.get_signless(8), op.operands[0]).result
    code = arith.ExtUIOp(bits.i32, code8).result
    magnitude = bits.two(arith.AndIOp, code, 0x7F)
    sign = bits.two(arith.ShLIOp, bits.two(arith.AndIOp, code, 0x80), 24)
    shifted = bits.two(arith.ShLIOp, magnitude, 23 - form.mantissa)
    normal = bits.two(arith.AddIOp, shifted, (127 - form.bias) << 23)
    step = bits.number(2.0 ** (1 - form.bias - form.mantissa))
    subnormal = bits.as_bits(arith.MulFOp(arith.UIToFPOp(bits.f32, magnitude).result, step).result)
    finite = bits.when(arith.CmpIPredicate.ult, magnitude, 1 << form.mantissa, subnormal, normal)
    special = _decode_special(form, bits, code, magnitude, finite)
    wide = bits.as_float(arith.OrIOp(special, sign).result)
    return _convert(wide, op.result.type)


def _decode_special(
    form: Format, bits: _Bits, code: ir.Value, magnitude: ir.Value, finite: ir.Value
) -> ir.Value:
    nan, infinity = bits.const(0x7FC00000), bits.const(0x7F800000)
    if not form.negative_zero:
        return bits.when(arith.CmpIPredicate.eq, code, form.nan, nan, finite)
    above = nan
    if form.infinity is not None:
        above = bits.when(arith.CmpIPredicate.ugt, magnitude, form.infinity, nan, infinity)
    return bits.when(arith.CmpIPredicate.ugt, magnitude, form.largest, above, finite)


def _encode(op: ir.Operation) -> ir.Value:
    """The float8 code nearest to a float."""
    form, bits = FORMATS[str(op.result.type)], _Bits()
    wide = bits.as_bits(_convert(op.operands[0], bits.f32))
    magnitude = bits.two(arith.AndIOp, wide, 0x7FFFFFFF)
    sign = bits.two(arith.AndIOp, bits.two(arith.ShRUIOp, wide, 24), 0x80)
    drop = 23 - form.mantissa
    odd = bits.two(arith.AndIOp, bits.two(arith.ShRUIOp, magnitude, drop), 1)
    half = bits.two(arith.AddIOp, arith.AddIOp(magnitude, odd).result, (1 << (drop - 1)) - 1)
    normal = bits.two(arith.SubIOp, bits.two(arith.ShRUIOp, half, drop), (127 - form.bias) << form.mantissa)
    # Adding 2^(23 - k) leaves a float32 whose last bit is worth 2^-k: the hardware rounds for us.
    magic = (127 + 23 + 1 - form.bias - form.mantissa) << 23
    summed = arith.AddFOp(bits.as_float(magnitude), bits.as_float(bits.const(magic))).result
    subnormal = bits.two(arith.SubIOp, bits.as_bits(summed), magic)
    smallest_normal = (128 - form.bias) << 23
    finite = bits.when(arith.CmpIPredicate.ult, magnitude, smallest_normal, subnormal, normal)
    code = bits.when(arith.CmpIPredicate.ugt, finite, form.largest, bits.const(form.overflow), finite)
    huge = (127 + 30) << 23  # beyond every format; also keeps the subtraction above from wrapping
    code = bits.when(arith.CmpIPredicate.uge, magnitude, huge, bits.const(form.overflow), code)
    code = bits.when(arith.CmpIPredicate.ugt, magnitude, 0x7F800000, bits.const(form.nan), code)
    code = _with_sign(form, bits, code, sign)
    code8 = arith.TruncIOp(ir.IntegerType.get_signless(8), code).result
    return arith.BitcastOp(op.result.type, code8).result


def _with_sign(form: Format, bits: _Bits, code: ir.Value, sign: ir.Value) -> ir.Value:
    signed = arith.OrIOp(code, sign).result
    if form.negative_zero:
        return signed
    # fnuz: no negative zero, and NaN has one code.
    return bits.when(arith.CmpIPredicate.eq, code, 0, bits.const(0), signed)


def _convert(value: ir.Value, type_: ir.Type) -> ir.Value:
    """``value`` as ``type_``, both at least 16 bits wide."""
    if value.type == type_:
        return value
    wider = _width(type_) > _width(value.type)
    return (arith.ExtFOp(type_, value) if wider else arith.TruncFOp(type_, value)).result


def _width(type_: ir.Type) -> int:
    return {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[str(type_)]
