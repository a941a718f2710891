"""Lane-wise float instructions of the gfx950 executor, plain and packed, and their modifiers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.gfx950.gfx950_cases import (
    ACCUMULATING,
    BF16,
    F16,
    F32,
    F64,
    bits_of,
    case,
    check_cases,
    clamp,
    halves,
    pack,
    pair_of,
    signalling,
)
from tests.gfx950.gfx950_operands import exactly


def number(function: Callable, sign: Callable) -> Callable[..., np.ndarray]:
    """Minimum or maximum: of two numbers, or the number; of zeros the signed order."""

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        zeros = np.where(sign(np.signbit(a), np.signbit(b)), a.dtype.type(-0.0), a.dtype.type(0.0))
        return np.where((a == 0) & (b == 0), zeros, function(a, b))

    return compute


def ieee(kind: str, function: Callable) -> Callable[..., np.ndarray]:
    """In IEEE mode a signalling NaN makes the result NaN."""

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        noisy = signalling(kind, a) | signalling(kind, b)
        return np.where(noisy, a.dtype.type(np.nan), function(a, b))

    return compute


LEAST, MOST = number(np.fmin, np.logical_or), number(np.fmax, np.logical_and)
MIN32, MAX32 = ieee("f32", LEAST), ieee("f32", MOST)


def spread(function: Callable) -> Callable[..., np.ndarray]:
    return lambda a, b, c: function(function(a, b), c)


def median32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    middle = np.sort(np.stack([a, b, c]), 0)[1]
    odd = np.isnan(a) | np.isnan(b) | np.isnan(c)
    most = MOST(MOST(a, b), c)
    rest = np.where(most == a, MOST(b, c), np.where(most == b, MOST(a, c), MOST(a, b)))
    assert (odd | (middle == rest)).all()
    return np.where(odd, MIN32(MIN32(a, b), c), rest)


def propagating(function: Callable) -> Callable[..., np.ndarray]:
    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
        return np.where(nan, a.dtype.type(np.nan), spread(function)(a, b, c))

    return compute


def fma(dtype: type) -> Callable[..., np.ndarray]:
    return exactly(dtype, lambda a, b, c: a * b + c)


def ldexp(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def scaled_by(x: Fraction, power: Fraction) -> Fraction:
        limited = clamp(int(power), -3000, 3000)
        return x * Fraction(2) ** limited if isinstance(x, Fraction) else np.ldexp(x, limited)

    return exactly(a.dtype.type, scaled_by)(a, b)


def fract(a: np.ndarray) -> np.ndarray:
    below = np.nextafter(a.dtype.type(1), a.dtype.type(0))
    return np.where(
        np.isinf(a), a.dtype.type(np.nan), np.fmin(a - np.floor(a), below) + np.where(np.isnan(a), a, 0)
    )


def frexp_exponent(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), np.frexp(a)[1], 0)


def frexp_mantissa(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), np.frexp(a)[0], a)


def median16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    odd = np.isnan(a) | np.isnan(b) | np.isnan(c)
    most = MOST(MOST(a, b), c)
    rest = np.where(most == a, MOST(b, c), np.where(most == b, MOST(a, c), MOST(a, b)))
    return np.where(odd, LEAST(LEAST(a, b), c), rest)


FLOATS = [
    case("v_add_f32", "f32: f32 f32", lambda a, b: a + b),
    case("v_sub_f32", "f32: f32 f32", lambda a, b: a - b),
    case("v_subrev_f32", "f32: f32 f32", lambda a, b: b - a),
    case("v_mul_f32", "f32: f32 f32", lambda a, b: a * b),
    case("v_mul_legacy_f32", "f32: f32 f32", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b)),
    case("v_fma_f32", "f32: f32 f32 f32", fma(F32)),
    case("v_fmac_f32", "f32: f32 f32", fma(F32), text=ACCUMULATING),
    case(
        "v_fmamk_f32",
        "f32: f32 f32",
        lambda a, b: fma(F32)(a, np.full_like(a, 1.7), b),
        text="{d}, {a}, 0x3fd9999a, {b}",
    ),
    case(
        "v_fmaak_f32",
        "f32: f32 f32",
        lambda a, b: fma(F32)(a, b, np.full_like(a, 1.7)),
        text="{d}, {a}, {b}, 0x3fd9999a",
    ),
    case("v_min_f32", "f32: f32 f32", MIN32),
    case("v_max_f32", "f32: f32 f32", MAX32),
    case("v_min3_f32", "f32: f32 f32 f32", spread(MIN32)),
    case("v_max3_f32", "f32: f32 f32 f32", spread(MAX32)),
    case("v_med3_f32", "f32: f32 f32 f32", median32),
    case("v_minimum3_f32", "f32: f32 f32 f32", propagating(LEAST)),
    case("v_maximum3_f32", "f32: f32 f32 f32", propagating(MOST)),
    *(
        case(f"v_{name}_{kind}", f"{kind}: {kind}", function)
        for kind in ("f32", "f64", "f16")
        for name, function in (
            ("trunc", np.trunc),
            ("ceil", np.ceil),
            ("floor", np.floor),
            ("rndne", np.rint),
            ("fract", fract),
            ("frexp_mant", frexp_mantissa),
        )
    ),
    case("v_frexp_exp_i32_f32", "i32: f32", frexp_exponent),
    case("v_frexp_exp_i32_f64", "i32: f64", frexp_exponent),
    case("v_frexp_exp_i16_f16", "i16: f16", frexp_exponent),
    case("v_ldexp_f32", "f32: f32 i32", ldexp),
    case("v_ldexp_f64", "f64: f64 i32", ldexp),
    case("v_ldexp_f16", "f16: f16 i16", ldexp),
    case("v_add_f64", "f64: f64 f64", lambda a, b: a + b),
    case("v_mul_f64", "f64: f64 f64", lambda a, b: a * b),
    case("v_fma_f64", "f64: f64 f64 f64", fma(F64)),
    case("v_fmac_f64", "f64: f64 f64", fma(F64), text=ACCUMULATING),
    case("v_min_f64", "f64: f64 f64", LEAST),
    case("v_max_f64", "f64: f64 f64", MOST),
    case("v_add_f16", "f16: f16 f16", lambda a, b: a + b),
    case("v_sub_f16", "f16: f16 f16", lambda a, b: a - b),
    case("v_subrev_f16", "f16: f16 f16", lambda a, b: b - a),
    case("v_mul_f16", "f16: f16 f16", lambda a, b: a * b),
    case("v_fma_f16", "f16: f16 f16 f16", fma(F16)),
    case("v_fma_legacy_f16", "f16: f16 f16 f16", fma(F16)),
    case("v_min_f16", "f16: f16 f16", LEAST),
    case("v_max_f16", "f16: f16 f16", MOST),
    case("v_min3_f16", "f16: f16 f16 f16", spread(LEAST)),
    case("v_max3_f16", "f16: f16 f16 f16", spread(MOST)),
    case("v_med3_f16", "f16: f16 f16 f16", median16),
]


# Modifiers: signs of operands, output scale, clamping.
MODIFIED = [
    case("v_add_f32", "f32: f32 f32", lambda a, b: abs(b) - a, text="{d}, -{a}, |{b}|"),
    case(
        "v_fma_f32",
        "f32: f32 f32 f32",
        lambda a, b, c: fma(F32)(-abs(a), b, -c),
        text="{d}, -|{a}|, {b}, -{c}",
    ),
    case("v_mul_f32", "f32: f32 f32", lambda a, b: a * b * F32(2), modifiers=" mul:2"),
    case("v_mul_f32", "f32: f32 f32", lambda a, b: a * b * F32(0.5), modifiers=" div:2"),
    case("v_add_f32", "f32: f32 f32", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1)), modifiers=" clamp"),
    case("v_add_f64", "f64: f64 f64", lambda a, b: abs(a) - b, text="{d}, |{a}|, -{b}"),
    case("v_add_f16", "f16: f16 f16", lambda a, b: -abs(a) + b, text="{d}, -|{a}|, {b}"),
    case(
        "v_cndmask_b32",
        "f32: f32 f32 mask",
        lambda a, b, c: np.where(c, abs(b), -a),
        text="{d}, -{a}, |{b}|, {c}",
    ),
    case("v_add_f32", "f32: f32", lambda a: a + F32(0.5), text="{d}, 0.5, {a}"),
    case("v_add_f32", "f32: f32", lambda a: a + F32(1e20), text="{d}, 0x60ad78ec, {a}"),
    case("v_add_f16", "f16: f16", lambda a: a + F16(-4), text="{d}, -4.0, {a}"),
    case("v_add_f64", "f64: f64", lambda a: a + 2.0, text="{d}, 2.0, {a}"),
    case("v_add_u32", "u32: u32", lambda a: a - np.uint32(16), text="{d}, -16, {a}"),
    case("v_mul_f32", "f32: f32", lambda a: a * F32(1 / (2 * np.pi)), text="{d}, 0.15915494, {a}"),
]


# -- packed, mixed, dot --


def packed(function: Callable, dtype: type) -> Callable[..., np.ndarray]:
    """``function`` of the low and of the high 16-bit halves."""

    def compute(*arrays: np.ndarray) -> np.ndarray:
        parts = [a.view(np.uint16).reshape(-1, 2).T for a in arrays]
        low, high = (function(*(np.ascontiguousarray(p[i]).view(dtype) for p in parts)) for i in (0, 1))
        return pack(np.asarray(low, dtype).view(np.uint16), np.asarray(high, dtype).view(np.uint16))

    return compute


def floats_of(a: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(p) for p in a.view(F32).reshape(-1, 2).T]


def packed32(function: Callable) -> Callable[..., np.ndarray]:
    return lambda *arrays: pair_of(
        *(function(*values) for values in zip(*map(floats_of, arrays), strict=True))
    )


PACKED = [
    case("v_pk_add_f32", "f32x2: u64 u64", packed32(lambda a, b: a + b)),
    case("v_pk_mul_f32", "f32x2: u64 u64", packed32(lambda a, b: a * b)),
    case("v_pk_fma_f32", "f32x2: u64 u64 u64", packed32(fma(F32))),
    case(
        "v_pk_add_f32",
        "f32x2: u64 u64",
        lambda a, b: pair_of(floats_of(a)[1] - floats_of(b)[0], floats_of(a)[1] + floats_of(b)[0]),
        modifiers=" op_sel:[1,0] op_sel_hi:[1,0] neg_lo:[0,1]",
    ),
    case(
        "v_pk_mov_b32",
        "u64: u64 u64",
        lambda a, b: a >> np.uint64(32) | (b & np.uint64(0xFFFFFFFF)) << np.uint64(32),
        modifiers=" op_sel:[1,0]",
    ),
    *(
        case(f"v_pk_{name}", "f16x2: u32 u32", packed(function, F16))
        for name, function in (
            ("add_f16", lambda a, b: a + b),
            ("mul_f16", lambda a, b: a * b),
            ("min_f16", LEAST),
            ("max_f16", MOST),
        )
    ),
    case("v_pk_fma_f16", "f16x2: u32 u32 u32", packed(fma(F16), F16)),
    case("v_pk_minimum3_f16", "f16x2: u32 u32 u32", packed(propagating(LEAST), F16)),
    case("v_pk_maximum3_f16", "f16x2: u32 u32 u32", packed(propagating(MOST), F16)),
    *(
        case(f"v_pk_{name}", "u32: u32 u32", packed(function, dtype))
        for name, function, dtype in (
            ("add_u16", lambda a, b: a + b, np.uint16),
            ("sub_u16", lambda a, b: a - b, np.uint16),
            ("add_i16", lambda a, b: a + b, np.int16),
            ("sub_i16", lambda a, b: a - b, np.int16),
            ("mul_lo_u16", lambda a, b: a * b, np.uint16),
            ("min_u16", np.minimum, np.uint16),
            ("max_u16", np.maximum, np.uint16),
            ("min_i16", np.minimum, np.int16),
            ("max_i16", np.maximum, np.int16),
            ("lshlrev_b16", lambda a, b: b << (a & 15), np.uint16),
            ("lshrrev_b16", lambda a, b: b >> (a & 15), np.uint16),
            ("ashrrev_i16", lambda a, b: b >> (a & 15), np.int16),
        )
    ),
    case("v_pk_mad_u16", "u32: u32 u32 u32", packed(lambda a, b, c: a * b + c, np.uint16)),
    case("v_pk_mad_i16", "u32: u32 u32 u32", packed(lambda a, b, c: a * b + c, np.int16)),
    case(
        "v_pk_add_f16",
        "f16x2: u32 u32",
        lambda a, b: pack(*(bits_of(x - y, F16) for x, y in zip(_swapped(a), halves(b, F16), strict=True))),
        modifiers=" op_sel:[1,0] op_sel_hi:[0,1] neg_lo:[0,1] neg_hi:[0,1]",
    ),
    case(
        "v_fma_mix_f32",
        "f32: f32 u32 f32",
        lambda a, b, c: fma(F32)(a, halves(b, F16)[1], -c),
        text="{d}, {a}, {b}, -{c}",
        modifiers=" op_sel:[0,1,0] op_sel_hi:[0,1,0]",
    ),
    case("v_fma_mixlo_f16", "f16: f32 f32 f32", lambda a, b, c: fma(F32)(a, b, c).astype(F16), modifiers=""),
    case(
        "v_fma_mixhi_f16",
        "high16: f32 f32 f32",
        lambda a, b, c: bits_of(fma(F32)(a, b, c), F16),
        modifiers="",
    ),
]


def _swapped(a: np.ndarray) -> tuple[np.ndarray, ...]:
    return halves(a, F16)[::-1]


def dot2(dtype: type, last: bool) -> Callable[..., np.ndarray]:
    """Products of both halves and c, which comes ``last`` or is what the others are added to."""

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        (a0, a1), (b0, b1) = halves(a, dtype), halves(b, dtype)
        return fma(F32)(a1, b1, a0 * b0) + c if last else fma(F32)(a1, b1, fma(F32)(a0, b0, c))

    return compute


DOTS = [
    case("v_dot2_f32_f16", "f32: u32 u32 f32", dot2(F16, False)),
    case("v_dot2_f32_bf16", "f32: u32 u32 f32", dot2(BF16, True)),
    case("v_dot2c_f32_f16", "f32: u32 u32", dot2(F16, False), text=ACCUMULATING),
    case("v_dot2c_f32_bf16", "f32: u32 u32", dot2(BF16, False), text=ACCUMULATING),
]

GROUPS = {"dots": DOTS, "floats": FLOATS, "modified": MODIFIED, "packed": PACKED}


@pytest.mark.parametrize("group", GROUPS)
def test_floats(group: str) -> None:
    check_cases(GROUPS[group])
