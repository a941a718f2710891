"""Every lane-wise instruction of the gfx950 executor against NumPy, ml_dtypes and rational arithmetic.

LLVM's assembler encodes each instruction, so decoding is tested by an independent encoder too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import gfx950
import ml_dtypes
import numpy as np
import pytest
from gfx950_kernels import Assembly, assemble
from gfx950_operands import COUNT, DTYPES, exactly, operands, same

F32, F64, F16, BF16 = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
E2M1 = ml_dtypes.float4_e2m1fn


@dataclass(frozen=True)
class Case:
    """An instruction, the types of its result and operands (a mask is ``mask``), and what it computes."""

    name: str
    result: str
    kinds: tuple[str, ...]
    reference: Callable[..., np.ndarray]
    text: str = ""  # how it is written, if not by the pattern
    arch: str = "gfx950"
    modifiers: str = ""

    @property
    def label(self) -> str:
        return (
            f"{self.name}{self.modifiers}".replace(" ", "_")
            .replace(":", "")
            .replace("[", "")
            .replace("]", "")
        )


def case(name: str, kinds: str, reference: Callable[..., np.ndarray], **fields: str) -> Case:
    """``kinds``: "result: operands"."""
    result, _, rest = kinds.partition(":")
    return Case(name, result, tuple(rest.split()), reference, **fields)


# -- the table -----------------------------------------------------------------------------------------


def u32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.uint64).astype(np.uint32)


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    """As Python integers, which do not overflow."""
    return [array.astype(object) for array in arrays]


def integer(kind: str, function: Callable) -> Callable[..., np.ndarray]:
    """``function`` of Python integers, wrapped to ``kind``."""
    dtype = np.dtype(DTYPES[kind])
    mask = (1 << 8 * dtype.itemsize) - 1

    def compute(*arrays: np.ndarray) -> np.ndarray:
        rows = zip(*(array.tolist() for array in arrays), strict=True)
        values = [int(function(*row)) & mask for row in rows]
        return np.array(values, f"u{dtype.itemsize}").view(dtype)

    return compute


def clamp(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


def reverse(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


def byte(x: int, i: int) -> int:
    return x >> 8 * i & 255


def perm(a: int, b: int, select: int) -> int:
    data = [byte(b, i) for i in range(4)] + [byte(a, i) for i in range(4)]
    signs = [255 if data[i] & 128 else 0 for i in (1, 3, 5, 7)]
    table = [*data, *signs, 0, 255, 255, 255]
    return sum(table[min(byte(select, i), 15)] << 8 * i for i in range(4))


def sext(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def median(a: int, b: int, c: int) -> int:
    return sorted((a, b, c))[1]


BITS = [
    case("v_mov_b32", "u32: u32", lambda a: a),
    case("v_mov_b64", "u64: u64", lambda a: a),
    case("v_not_b32", "u32: u32", lambda a: ~a),
    case("v_bfrev_b32", "u32: u32", integer("u32", reverse)),
    case("v_ffbh_u32", "u32: u32", integer("u32", lambda a: 32 - a.bit_length() if a else -1)),
    case("v_ffbl_b32", "u32: u32", integer("u32", lambda a: (a & -a).bit_length() - 1)),
    case(
        "v_ffbh_i32",
        "u32: i32",
        integer("u32", lambda a: -1 if a in (0, -1) else 32 - (~a if a < 0 else a).bit_length()),
    ),
    case("v_and_b32", "u32: u32 u32", lambda a, b: a & b),
    case("v_or_b32", "u32: u32 u32", lambda a, b: a | b),
    case("v_xor_b32", "u32: u32 u32", lambda a, b: a ^ b),
    case("v_xnor_b32", "u32: u32 u32", lambda a, b: ~(a ^ b)),
    case("v_lshlrev_b32", "u32: u32 u32", lambda a, b: b << (a & 31)),
    case("v_lshrrev_b32", "u32: u32 u32", lambda a, b: b >> (a & 31)),
    case("v_ashrrev_i32", "i32: u32 i32", lambda a, b: b >> (a & 31).astype(np.int32)),
    case("v_lshlrev_b64", "u64: u32 u64", lambda a, b: b << (a & 63).astype(np.uint64)),
    case("v_lshrrev_b64", "u64: u32 u64", lambda a, b: b >> (a & 63).astype(np.uint64)),
    case("v_ashrrev_i64", "i64: u32 i64", lambda a, b: b >> (a & 63).astype(np.int64)),
    case("v_lshlrev_b16", "u16: u16 u16", lambda a, b: b << (a & 15)),
    case("v_lshrrev_b16", "u16: u16 u16", lambda a, b: b >> (a & 15)),
    case("v_ashrrev_i16", "i16: u16 i16", lambda a, b: b >> (a & 15).astype(np.int16)),
    case("v_bfm_b32", "u32: u32 u32", integer("u32", lambda a, b: ((1 << (a & 31)) - 1) << (b & 31))),
    case(
        "v_bfe_u32", "u32: u32 u32 u32", integer("u32", lambda a, b, c: a >> (b & 31) & (1 << (c & 31)) - 1)
    ),
    case(
        "v_bfe_i32",
        "i32: i32 u32 u32",
        integer("i32", lambda a, b, c: sext(a >> (b & 31), c & 31) if c & 31 else 0),
    ),
    case("v_bfi_b32", "u32: u32 u32 u32", lambda a, b, c: (a & b) | (~a & c)),
    case("v_and_or_b32", "u32: u32 u32 u32", lambda a, b, c: (a & b) | c),
    case("v_or3_b32", "u32: u32 u32 u32", lambda a, b, c: a | b | c),
    case("v_lshl_or_b32", "u32: u32 u32 u32", lambda a, b, c: a << (b & 31) | c),
    case("v_bitop3_b32", "u32: u32 u32 u32", lambda a, b, c: (a & b) ^ c, modifiers=" bitop3:0x6a"),
    case("v_bitop3_b16", "u16: u16 u16 u16", lambda a, b, c: (a | ~b) & c, modifiers=" bitop3:0xa2"),
    case("v_alignbit_b32", "u32: u32 u32 u32", integer("u32", lambda a, b, c: (a << 32 | b) >> (c & 31))),
    case("v_alignbyte_b32", "u32: u32 u32 u32", integer("u32", lambda a, b, c: (a << 32 | b) >> 8 * (c & 3))),
    case("v_perm_b32", "u32: u32 u32 u32", integer("u32", perm)),
    case("v_bcnt_u32_b32", "u32: u32 u32", integer("u32", lambda a, b: a.bit_count() + b)),
    case("v_pack_b32_f16", "u32: u16 u16", integer("u32", lambda a, b: a | b << 16)),
    case("v_prng_b32", "u32: u32", integer("u32", lambda a: a << 1 ^ (197 if a >> 31 else 0))),
    case("v_cndmask_b32", "u32: u32 u32 mask", lambda a, b, c: np.where(c, b, a)),
    case("v_mbcnt_lo_u32_b32", "u32: u32 u32", lambda a, b: _mbcnt(a, b, 0)),
    case("v_mbcnt_hi_u32_b32", "u32: u32 u32", lambda a, b: _mbcnt(a, b, 32)),
]


def _mbcnt(a: np.ndarray, b: np.ndarray, first: int) -> np.ndarray:
    lanes = np.arange(COUNT) % 64
    below = [int(x) & (1 << int(np.clip(lane - first, 0, 32))) - 1 for x, lane in zip(a, lanes, strict=True)]
    return u32(np.array([x.bit_count() for x in below]) + b.astype(np.int64) & 0xFFFFFFFF)


def low24(x: int) -> int:
    return x & 0xFFFFFF


INTEGERS = [
    case("v_add_u32", "u32: u32 u32", lambda a, b: a + b),
    case("v_sub_u32", "u32: u32 u32", lambda a, b: a - b),
    case("v_subrev_u32", "u32: u32 u32", lambda a, b: b - a),
    case("v_add_u32", "u32: u32 u32", integer("u32", lambda a, b: min(a + b, 2**32 - 1)), modifiers=" clamp"),
    case("v_sub_u32", "u32: u32 u32", integer("u32", lambda a, b: max(a - b, 0)), modifiers=" clamp"),
    case("v_subrev_u32", "u32: u32 u32", integer("u32", lambda a, b: max(b - a, 0)), modifiers=" clamp"),
    case("v_add_i32", "i32: i32 i32", integer("i32", lambda a, b: a + b)),
    case("v_sub_i32", "i32: i32 i32", integer("i32", lambda a, b: a - b)),
    case(
        "v_add_i32",
        "i32: i32 i32",
        integer("i32", lambda a, b: clamp(a + b, -(2**31), 2**31 - 1)),
        modifiers=" clamp",
    ),
    case(
        "v_sub_i32",
        "i32: i32 i32",
        integer("i32", lambda a, b: clamp(a - b, -(2**31), 2**31 - 1)),
        modifiers=" clamp",
    ),
    case("v_mul_lo_u32", "u32: u32 u32", lambda a, b: a * b),
    case("v_mul_hi_u32", "u32: u32 u32", integer("u32", lambda a, b: a * b >> 32)),
    case("v_mul_hi_i32", "i32: i32 i32", integer("i32", lambda a, b: a * b >> 32)),
    case("v_mul_u32_u24", "u32: u32 u32", integer("u32", lambda a, b: low24(a) * low24(b))),
    case("v_mul_i32_i24", "i32: i32 i32", integer("i32", lambda a, b: sext(a, 24) * sext(b, 24))),
    case("v_mul_hi_u32_u24", "u32: u32 u32", integer("u32", lambda a, b: low24(a) * low24(b) >> 32)),
    case("v_mul_hi_i32_i24", "i32: i32 i32", integer("i32", lambda a, b: sext(a, 24) * sext(b, 24) >> 32)),
    case("v_mad_u32_u24", "u32: u32 u32 u32", integer("u32", lambda a, b, c: low24(a) * low24(b) + c)),
    case("v_mad_i32_i24", "i32: i32 i32 i32", integer("i32", lambda a, b, c: sext(a, 24) * sext(b, 24) + c)),
    case("v_mad_u32_u16", "u32: u16 u16 u32", integer("u32", lambda a, b, c: a * b + c)),
    case("v_mad_i32_i16", "i32: i16 i16 i32", integer("i32", lambda a, b, c: a * b + c)),
    case("v_min_u32", "u32: u32 u32", np.minimum),
    case("v_max_u32", "u32: u32 u32", np.maximum),
    case("v_min_i32", "i32: i32 i32", np.minimum),
    case("v_max_i32", "i32: i32 i32", np.maximum),
    case("v_min3_u32", "u32: u32 u32 u32", integer("u32", min)),
    case("v_max3_u32", "u32: u32 u32 u32", integer("u32", max)),
    case("v_min3_i32", "i32: i32 i32 i32", integer("i32", min)),
    case("v_max3_i32", "i32: i32 i32 i32", integer("i32", max)),
    case("v_med3_u32", "u32: u32 u32 u32", integer("u32", median)),
    case("v_med3_i32", "i32: i32 i32 i32", integer("i32", median)),
    case("v_add3_u32", "u32: u32 u32 u32", lambda a, b, c: a + b + c),
    case("v_lshl_add_u32", "u32: u32 u32 u32", lambda a, b, c: (a << (b & 31)) + c),
    case("v_add_lshl_u32", "u32: u32 u32 u32", lambda a, b, c: (a + b) << (c & 31)),
    case("v_xad_u32", "u32: u32 u32 u32", lambda a, b, c: (a ^ b) + c),
    case("v_lshl_add_u64", "u64: u64 u32 u64", lambda a, b, c: (a << (b & 7).astype(np.uint64)) + c),
    case("v_sad_u32", "u32: u32 u32 u32", integer("u32", lambda a, b, c: abs(a - b) + c)),
    case(
        "v_sad_u16",
        "u32: u32 u32 u32",
        integer("u32", lambda a, b, c: abs((a & 65535) - (b & 65535)) + abs((a >> 16) - (b >> 16)) + c),
    ),
    case(
        "v_sad_u8",
        "u32: u32 u32 u32",
        integer("u32", lambda a, b, c: sum(abs(byte(a, i) - byte(b, i)) for i in range(4)) + c),
    ),
    case("v_add_u16", "u16: u16 u16", lambda a, b: a + b),
    case("v_sub_u16", "u16: u16 u16", lambda a, b: a - b),
    case("v_subrev_u16", "u16: u16 u16", lambda a, b: b - a),
    case("v_add_u16", "u16: u16 u16", integer("u16", lambda a, b: min(a + b, 65535)), modifiers=" clamp"),
    case("v_add_i16", "i16: i16 i16", lambda a, b: a + b),
    case("v_sub_i16", "i16: i16 i16", lambda a, b: a - b),
    case(
        "v_sub_i16",
        "i16: i16 i16",
        integer("i16", lambda a, b: clamp(a - b, -32768, 32767)),
        modifiers=" clamp",
    ),
    case("v_mul_lo_u16", "u16: u16 u16", lambda a, b: a * b),
    case("v_mad_u16", "u16: u16 u16 u16", lambda a, b, c: a * b + c),
    case("v_mad_i16", "i16: i16 i16 i16", lambda a, b, c: a * b + c),
    case("v_mad_legacy_u16", "u16: u16 u16 u16", lambda a, b, c: a * b + c),
    case("v_mad_legacy_i16", "i16: i16 i16 i16", lambda a, b, c: a * b + c),
    case("v_min_u16", "u16: u16 u16", np.minimum),
    case("v_max_u16", "u16: u16 u16", np.maximum),
    case("v_min_i16", "i16: i16 i16", np.minimum),
    case("v_max_i16", "i16: i16 i16", np.maximum),
    case("v_min3_u16", "u16: u16 u16 u16", integer("u16", min)),
    case("v_max3_u16", "u16: u16 u16 u16", integer("u16", max)),
    case("v_min3_i16", "i16: i16 i16 i16", integer("i16", min)),
    case("v_max3_i16", "i16: i16 i16 i16", integer("i16", max)),
    case("v_med3_u16", "u16: u16 u16 u16", integer("u16", median)),
    case("v_med3_i16", "i16: i16 i16 i16", integer("i16", median)),
]

# With a mask besides the result: the reference gives both.
CARRIES = [
    case("v_add_co_u32", "u32: u32 u32", lambda a, b: (a + b, a.astype(np.uint64) + b > 0xFFFFFFFF)),
    case("v_sub_co_u32", "u32: u32 u32", lambda a, b: (a - b, a < b)),
    case("v_subrev_co_u32", "u32: u32 u32", lambda a, b: (b - a, b < a)),
    case(
        "v_addc_co_u32",
        "u32: u32 u32 mask",
        lambda a, b, c: (u32(a + b + c), a.astype(np.int64) + b + c >= 2**32),
    ),
    case(
        "v_subb_co_u32", "u32: u32 u32 mask", lambda a, b, c: (u32(a - b - c), a.astype(np.int64) - b - c < 0)
    ),
    case(
        "v_subbrev_co_u32",
        "u32: u32 u32 mask",
        lambda a, b, c: (u32(b - a - c), b.astype(np.int64) - a - c < 0),
    ),
    case("v_mad_u64_u32", "u64: u32 u32 u64", lambda a, b, c: _mad64("u64", a, b, c)),
    case("v_mad_i64_i32", "i64: i32 i32 i64", lambda a, b, c: _mad64("i64", a, b, c)),
]


def _mad64(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(DTYPES[kind])
    exact = [x * y + z for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    return integer(kind, lambda x, y, z: x * y + z)(a, b, c), np.array(
        [not info.min <= e <= info.max for e in exact]
    )


# -- floats --


def number(function: Callable, sign: Callable) -> Callable[..., np.ndarray]:
    """Minimum or maximum: of two numbers, or the number; of zeros the signed order."""

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        zeros = np.where(sign(np.signbit(a), np.signbit(b)), a.dtype.type(-0.0), a.dtype.type(0.0))
        return np.where((a == 0) & (b == 0), zeros, function(a, b))

    return compute


def signalling(kind: str, a: np.ndarray) -> np.ndarray:
    bits, quiet = {"f32": (np.uint32, 1 << 22), "f16": (np.uint16, 1 << 9), "f64": (np.uint64, 1 << 51)}[kind]
    return np.isnan(a) & (a.view(bits) & bits(quiet) == 0)


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


FLOATS = [
    case("v_add_f32", "f32: f32 f32", lambda a, b: a + b),
    case("v_sub_f32", "f32: f32 f32", lambda a, b: a - b),
    case("v_subrev_f32", "f32: f32 f32", lambda a, b: b - a),
    case("v_mul_f32", "f32: f32 f32", lambda a, b: a * b),
    case("v_mul_legacy_f32", "f32: f32 f32", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b)),
    case("v_fma_f32", "f32: f32 f32 f32", fma(F32)),
    case("v_fmac_f32", "f32: f32 f32", fma(F32), text="{d}, {a}, {b}"),
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
    case("v_fmac_f64", "f64: f64 f64", fma(F64), text="{d}, {a}, {b}"),
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
    case("v_med3_f16", "f16: f16 f16 f16", lambda a, b, c: _median16(a, b, c)),
]


def _median16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    odd = np.isnan(a) | np.isnan(b) | np.isnan(c)
    most = MOST(MOST(a, b), c)
    rest = np.where(most == a, MOST(b, c), np.where(most == b, MOST(a, c), MOST(a, b)))
    return np.where(odd, LEAST(LEAST(a, b), c), rest)


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


# -- conversions --


def to_integer(kind: str, rounding: Callable = np.trunc) -> Callable[..., np.ndarray]:
    info = np.iinfo(DTYPES[kind])

    def convert(a: np.ndarray) -> np.ndarray:
        value = rounding(a.astype(F64))
        return np.array([0 if math.isnan(x) else int(clamp(x, info.min, info.max)) for x in value.tolist()])

    return convert


def norm(low: float, scale: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.rint(np.nan_to_num(np.clip(a.astype(F64), low, 1)) * scale).astype(np.int64) & 0xFFFF


def pack(low: np.ndarray, high: np.ndarray, bits: int = 16) -> np.ndarray:
    mask = (1 << bits) - 1
    return u32((low.astype(np.int64) & mask) | (high.astype(np.int64) & mask) << bits)


def bits_of(x: np.ndarray, dtype: type) -> np.ndarray:
    """The code of x rounded to ``dtype``."""
    return x.astype(dtype).view(np.uint8 if np.dtype(dtype).itemsize == 1 else np.uint16)


def halves(a: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """The two 16-bit floats in each word."""
    pair = a.view(np.uint16).reshape(-1, 2)
    return tuple(np.ascontiguousarray(pair[:, i]).view(dtype).astype(F32) for i in (0, 1))  # type: ignore[return-value]


def toward_zero16(a: np.ndarray) -> np.ndarray:
    near = a.astype(F16)
    beyond = np.abs(near.astype(F64)) > np.abs(a.astype(F64))
    return np.where(beyond & np.isfinite(a), np.nextafter(near, F16(0)), near)


CONVERSIONS = [
    case("v_cvt_f32_i32", "f32: i32", lambda a: a.astype(F32)),
    case("v_cvt_f32_u32", "f32: u32", lambda a: a.astype(F32)),
    case("v_cvt_i32_f32", "i32: f32", to_integer("i32")),
    case("v_cvt_u32_f32", "u32: f32", to_integer("u32")),
    case("v_cvt_rpi_i32_f32", "i32: f32", to_integer("i32", lambda a: np.floor(a + 0.5))),
    case("v_cvt_flr_i32_f32", "i32: f32", to_integer("i32", np.floor)),
    case("v_cvt_f64_i32", "f64: i32", lambda a: a.astype(F64)),
    case("v_cvt_f64_u32", "f64: u32", lambda a: a.astype(F64)),
    case("v_cvt_i32_f64", "i32: f64", to_integer("i32")),
    case("v_cvt_u32_f64", "u32: f64", to_integer("u32")),
    case("v_cvt_f32_f64", "f32: f64", lambda a: a.astype(F32)),
    case("v_cvt_f64_f32", "f64: f32", lambda a: a.astype(F64)),
    *(
        case(f"v_cvt_f32_ubyte{i}", "f32: u32", lambda a, i=i: (a >> np.uint32(8 * i) & 255).astype(F32))
        for i in range(4)
    ),
    case("v_cvt_off_f32_i4", "f32: u32", lambda a: (((a + 8) & 15).astype(F32) - 8) / F32(16)),
    case(
        "v_cvt_pk_u8_f32",
        "u32: f32 u32 u32",
        lambda a, b, c: integer("u32", lambda x, y, z: (z & ~(255 << 8 * (y & 3))) | x << 8 * (y & 3))(
            np.rint(np.nan_to_num(np.clip(a, 0, 255))).astype(np.int64), b, c
        ),
    ),
    case("v_cvt_f16_f32", "f16: f32", lambda a: a.astype(F16)),
    case("v_cvt_f32_f16", "f32: f16", lambda a: a.astype(F32)),
    case("v_cvt_f16_u16", "f16: u16", lambda a: a.astype(F16)),
    case("v_cvt_f16_i16", "f16: i16", lambda a: a.astype(F16)),
    case("v_cvt_u16_f16", "u16: f16", to_integer("u16")),
    case("v_cvt_i16_f16", "i16: f16", to_integer("i16")),
    case("v_cvt_norm_i16_f16", "u16: f16", norm(-1, 32767)),
    case("v_cvt_norm_u16_f16", "u16: f16", norm(0, 65535)),
    case("v_cvt_pknorm_i16_f32", "u32: f32 f32", lambda a, b: pack(norm(-1, 32767)(a), norm(-1, 32767)(b))),
    case("v_cvt_pknorm_u16_f32", "u32: f32 f32", lambda a, b: pack(norm(0, 65535)(a), norm(0, 65535)(b))),
    case(
        "v_cvt_pkrtz_f16_f32",
        "f16x2: f32 f32",
        lambda a, b: pack(bits_of(toward_zero16(a), F16), bits_of(toward_zero16(b), F16)),
    ),
    case("v_cvt_pk_f16_f32", "f16x2: f32 f32", lambda a, b: pack(bits_of(a, F16), bits_of(b, F16))),
    case("v_cvt_pk_bf16_f32", "bf16x2: f32 f32", lambda a, b: pack(bits_of(a, BF16), bits_of(b, BF16))),
    case("v_cvt_f32_bf16", "f32: bf16", lambda a: a.astype(F32)),
    case("v_cvt_pk_u16_u32", "u32: u32 u32", lambda a, b: pack(np.minimum(a, 65535), np.minimum(b, 65535))),
    case(
        "v_cvt_pk_i16_i32",
        "u32: i32 i32",
        lambda a, b: pack(np.clip(a, -32768, 32767), np.clip(b, -32768, 32767)),
    ),
    case(
        "v_sat_pk_u8_i16",
        "u16: u32",
        lambda a: pack(
            *(np.clip(h.view(np.int16), 0, 255) for h in a.view(np.uint16).reshape(-1, 2).T.copy()), 8
        ),
    ),
    case(
        "v_ashr_pk_i8_i32",
        "u16: i32 i32 u32",
        lambda a, b, c: pack(*(np.clip(x >> (c & 31).astype(np.int32), -128, 127) for x in (a, b)), 8),
    ),
    case(
        "v_ashr_pk_u8_i32",
        "u16: i32 i32 u32",
        lambda a, b, c: pack(*(np.clip(x >> (c & 31).astype(np.int32), 0, 255) for x in (a, b)), 8),
    ),
]


# -- 8-bit floats --

SMALL = {"fp8": E4M3, "bf8": E5M2}
FNUZ = {"fp8": ml_dtypes.float8_e4m3fnuz, "bf8": ml_dtypes.float8_e5m2fnuz}


def pack8(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    return pack(bits_of(a, dtype), bits_of(b, dtype), 8).astype(np.uint16)


def small_value(a: np.ndarray, dtype: type, index: int = 0) -> np.ndarray:
    return (a >> np.uint32(8 * index) & 255).astype(np.uint8).view(dtype).astype(F32)


def pair_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    low, high = (np.ascontiguousarray(x, F32).view(np.uint32).astype(np.uint64) for x in (low, high))
    return low | high << np.uint64(32)


def stochastic(a: np.ndarray, b: np.ndarray, shift: int, dtype: type) -> np.ndarray:
    bits = a.view(np.uint32)
    moved = (bits & 0xFF800000) | (bits + (b >> np.uint32(shift)) & 0x7FFFFF)
    return bits_of(moved.view(F32), dtype)


def eight_bit(types: dict[str, type], arch: str) -> list[Case]:
    cases = []
    for name, dtype in types.items():
        pairs = f"{name}x2"
        cases += [
            case(
                f"v_cvt_pk_{name}_f32", f"{pairs}: f32 f32", lambda a, b, t=dtype: pack8(a, b, t), arch=arch
            ),
            case(f"v_cvt_f32_{name}", "f32: u32", lambda a, t=dtype: small_value(a, t), arch=arch),
            case(
                f"v_cvt_pk_f32_{name}",
                "f32x2: u32",
                lambda a, t=dtype: pair_of(small_value(a, t), small_value(a, t, 1)),
                arch=arch,
            ),
            case(
                f"v_cvt_sr_{name}_f32",
                f"{name}: f32 u32",
                lambda a, b, t=dtype, s=12 if name == "fp8" else 11: stochastic(a, b, s, t),
                arch=arch,
            ),
        ]
    return cases


def scale_of(c: np.ndarray) -> np.ndarray:
    """The power of two that a block scale's exponent field says."""
    return np.exp2((c.view(np.uint32) >> np.uint32(23) & 255).astype(F64) - 127)


def unscaled(a: np.ndarray, c: np.ndarray, dtype: type) -> np.ndarray:
    return bits_of((a.astype(F64) / scale_of(c)), dtype)


def saturated4(a: np.ndarray, c: np.ndarray) -> np.ndarray:
    value = a.astype(F64) / scale_of(c)
    code = np.clip(value, -6, 6).astype(F32).astype(E2M1).view(np.uint8) & 15
    return np.where(np.isnan(value), np.where(np.signbit(value), 15, 7), code)


def scaled_codes() -> list[Case]:
    cases = []
    for name, dtype in SMALL.items():
        pk = f"{name}x2"
        cases += [
            case(
                f"v_cvt_scalef32_pk_{name}_f32",
                f"{pk}: f32 f32 f32",
                lambda a, b, c, t=dtype: pack(unscaled(a, c, t), unscaled(b, c, t), 8),
            ),
            *(
                case(
                    f"v_cvt_scalef32_pk_{name}_{wide}",
                    f"{pk}: u32 f32",
                    lambda a, c, t=dtype, h=h: pack(*(unscaled(x, c, t) for x in halves(a, h)), 8),
                )
                for wide, h in (("f16", F16), ("bf16", BF16))
            ),
            case(
                f"v_cvt_scalef32_pk_f32_{name}",
                "f32x2: u32 f32",
                lambda a, c, t=dtype: pair_of(*(scaled(small_value(a, t, i), c) for i in (0, 1))),
            ),
            case(
                f"v_cvt_scalef32_f32_{name}",
                "f32: u32 f32",
                lambda a, c, t=dtype: scaled(small_value(a, t), c),
            ),
            *(
                case(
                    f"v_cvt_scalef32_pk_{wide}_{name}",
                    f"{wide}x2: u32 f32",
                    lambda a, c, t=dtype, h=h: pack(
                        *(bits_of(small_value(a, t, i) * scale_of(c), h) for i in (0, 1))
                    ),
                )
                for wide, h in (("f16", F16), ("bf16", BF16))
            ),
        ]
    return cases + [
        case(
            "v_cvt_scalef32_pk_fp4_f32",
            "byte: f32 f32 f32",
            lambda a, b, c: saturated4(a, c) | saturated4(b, c) << 4,
        ),
        *(
            case(
                f"v_cvt_scalef32_pk_fp4_{wide}",
                "byte: u32 f32",
                lambda a, c, h=h: (lambda x, y: saturated4(x, c) | saturated4(y, c) << 4)(*halves(a, h)),
            )
            for wide, h in (("f16", F16), ("bf16", BF16))
        ),
        case(
            "v_cvt_scalef32_pk_f32_fp4",
            "f32x2: u32 f32",
            lambda a, c: pair_of(*(scaled(x, c) for x in fours(a))),
        ),
        *(
            case(
                f"v_cvt_scalef32_pk_{wide}_fp4",
                f"{wide}x2: u32 f32",
                lambda a, c, h=h: pack(*(bits_of(x * scale_of(c), h) for x in fours(a))),
            )
            for wide, h in (("f16", F16), ("bf16", BF16))
        ),
    ]


def scaled(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (x.astype(F64) * scale_of(c)).astype(F32)


def fours(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = np.arange(16, dtype=np.uint8).view(E2M1).astype(F32)
    return table[a & 15], table[a >> np.uint32(4) & 15]


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


def parts(x: int, width: int, sign: bool) -> list[int]:
    values = [x >> at & (1 << width) - 1 for at in range(0, 32, width)]
    return [sext(v, width) for v in values] if sign else values


def dot(width: int, sign: bool) -> Callable[..., np.ndarray]:
    def one(a: int, b: int, c: int) -> int:
        return sum(x * y for x, y in zip(parts(a, width, sign), parts(b, width, sign), strict=True)) + c

    return integer("u32", one)


DOTS = [
    *(
        case(f"v_dot{32 // width}_{types}", "u32: u32 u32 u32", dot(width, sign))
        for types, width, sign in (
            ("i32_i16", 16, True),
            ("u32_u16", 16, False),
            ("i32_i8", 8, True),
            ("u32_u8", 8, False),
            ("i32_i4", 4, True),
            ("u32_u4", 4, False),
        )
    ),
    *(
        case(f"v_dot{32 // width}c_{types}", "u32: u32 u32", dot(width, True), text="{d}, {a}, {b}")
        for types, width in (("i32_i16", 16), ("i32_i8", 8), ("i32_i4", 4))
    ),
]

# -- comparisons --

_CONDITIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "f": lambda a, b: np.zeros(len(a), bool),
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_OF_INTEGERS = {**_CONDITIONS, "ne": lambda a, b: a != b, "t": lambda a, b: np.ones(len(a), bool)}
_OF_FLOATS = {
    **_CONDITIONS,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
    "tru": lambda a, b: np.ones(len(a), bool),
}


def classified(kind: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        noisy, tiny = signalling(kind, a), np.finfo(a.dtype).tiny
        inf, zero, normal = np.isinf(a), a == 0, np.isfinite(a) & (np.abs(a) >= tiny)
        order = np.select([inf, normal, zero], [0, 1, 3], 2)
        bit = np.where(np.isnan(a), np.where(noisy, 0, 1), np.where(np.signbit(a), 2 + order, 9 - order))
        return (b >> bit.astype(np.uint32) & 1).astype(bool)

    return compute


COMPARISONS = [
    *(
        case(f"v_{cmp}_{condition}_{kind}", f"mask: {kind} {kind}", function)
        for cmp in ("cmp", "cmpx")
        for kinds, conditions in (
            (("i16", "u16", "i32", "u32", "i64", "u64"), _OF_INTEGERS),
            (("f16", "f32", "f64"), _OF_FLOATS),
        )
        for kind in kinds
        for condition, function in conditions.items()
    ),
    *(
        case(f"v_{cmp}_class_{kind}", f"mask: {kind} u32", classified(kind))
        for cmp in ("cmp", "cmpx")
        for kind in ("f16", "f32", "f64")
    ),
]

TABLE = {
    "bits": BITS,
    "integers": INTEGERS,
    "floats": FLOATS,
    "modified": MODIFIED,
    "conversions": CONVERSIONS,
    "eight_bit": eight_bit(SMALL, "gfx950"),
    "fnuz": eight_bit(FNUZ, "gfx942"),
    "scaled": scaled_codes(),
    "packed": PACKED,
    "dots": DOTS,
    "comparisons": COMPARISONS,
    "carries": CARRIES,
}

# -- running them ----------------------------------------------------------------------------------------

_LOAD = """
  s_load_dwordx8 s[4:11], s[0:1], 0x0
  v_lshl_add_u32 v1, s2, 8, v0
  v_lshlrev_b32 v1, 3, v1
  s_waitcnt lgkmcnt(0)
  global_load_dwordx2 v[2:3], v1, s[4:5]
  global_load_dwordx2 v[4:5], v1, s[6:7]
  global_load_dwordx2 v[6:7], v1, s[8:9]
  s_waitcnt vmcnt(0)
  v_mov_b32 v8, v6
  v_mov_b32 v9, v7
  v_cmp_ne_u32 vcc, 0, v6
  {instruction}
"""
_STORE = "  global_store_dwordx2 v1, v[8:9], s[10:11]"
_STORE_MASK = "  s_mov_b64 exec, -1\n  v_cndmask_b32 {d}, 0, 1, vcc\n" + _STORE
_WIDTH = {**{kind: np.dtype(dtype).itemsize for kind, dtype in DTYPES.items()}, "f32x2": 8}


def register(first: int, kind: str) -> str:
    return f"v[{first}:{first + 1}]" if _WIDTH.get(kind, 4) == 8 else f"v{first}"


def body(c: Case, group: str) -> str:
    names = dict(
        zip(
            "abc",
            ("vcc" if k == "mask" else register(2 * i + 2, k) for i, k in enumerate(c.kinds)),
            strict=False,
        )
    )
    d = "vcc" if c.result == "mask" else register(8, c.result)
    listed = [d, *(["vcc"] if group == "carries" else []), *names.values()]
    text = c.text.format(d=d, **names) if c.text else ", ".join(listed)
    start = _LOAD.format(instruction=f"{c.name} {text}{c.modifiers}")
    if c.result == "mask":
        return start + _STORE_MASK.format(d="v8")
    if group == "carries":
        return start + _STORE_MASK.format(d="v9" if _WIDTH[c.result] < 8 else "v7").replace(
            "v[8:9]", "v[8:9]"
        )
    return start + _STORE


def inputs(c: Case) -> list[np.ndarray]:
    """The operands; an accumulator, which is the result's register, is the third."""
    kinds = [*c.kinds]
    if c.text == "{d}, {a}, {b}":
        kinds.append(c.result)
    made = [operands("u32" if kind == "mask" else kind, seed) for seed, kind in enumerate(kinds)]
    return [m % 2 if kind == "mask" else m for m, kind in zip(made, kinds, strict=True)]


def slots(values: np.ndarray) -> np.ndarray:
    """Each value in the low bits of 64."""
    return values.view(f"u{values.dtype.itemsize}").astype(np.uint64)


def launch(code: gfx950.CodeObject, name: str, given: list[np.ndarray]) -> np.ndarray:
    out, memory = np.zeros(COUNT, np.uint64), gfx950.Memory()
    buffers = [slots(v) for v in given] + [np.full(COUNT, 0x1122334455667788, np.uint64)] * (3 - len(given))
    pointers = [memory.add_array(np.ascontiguousarray(b.copy()), writable=False) for b in buffers]
    gfx950.execute(code.kernel(name), (COUNT // 256,), (256,), [*pointers, memory.add_array(out)], memory)
    return out


# How a result is read from the 64 bits: its dtype, the first bit, how many of them, whether the rest is kept.
_VIEWS: dict[str, tuple[type, int]] = {
    **{kind: (dtype, 0) for kind, dtype in DTYPES.items()},
    "mask": (np.uint32, 0),
    "fp8": (E4M3, 0),
    "bf8": (E5M2, 0),
    "byte": (np.uint8, 0),
    "high16": (F16, 16),
}
_PAIRS = {"f16x2": F16, "bf16x2": BF16, "fp8x2": E4M3, "bf8x2": E5M2, "f32x2": F32}


def check(c: Case, out: np.ndarray, expected: np.ndarray) -> None:
    if c.result in _PAIRS:
        dtype = np.dtype(_PAIRS[c.result] if c.arch != "gfx942" else FNUZ.get(c.result[:3], _PAIRS[c.result]))
        code = f"u{2 * dtype.itemsize}"
        actual = out.astype(code).view(dtype)
        wanted = np.asarray(expected).astype(code).view(dtype)
        good = same(actual, wanted).reshape(-1, 2).all(1)
    else:
        dtype, shift = _VIEWS[c.result]
        size = np.dtype(dtype).itemsize
        actual = (out >> np.uint64(shift)).astype(f"u{size}").view(dtype)
        wanted = np.ascontiguousarray(expected)
        wanted = (
            wanted.view(dtype)
            if wanted.dtype == np.uint8 and size == 1
            else wanted.astype(dtype)
            if wanted.dtype.itemsize != size
            else wanted.view(dtype)
            if c.result == "high16"
            else wanted.astype(dtype)
        )
        good = same(actual, wanted)
    where = np.flatnonzero(~good)[:3]
    assert good.all(), (
        f"{c.label}: {(~good).sum()} wrong, at {where}: {out[where]} for {np.asarray(expected)[where]}"
    )


@pytest.mark.parametrize("group", TABLE)
def test_operations(group: str) -> None:
    cases = TABLE[group]
    kernels = [Assembly(f"k{i}", body(c, group), pointers=4) for i, c in enumerate(cases)]
    code = assemble(kernels, cases[0].arch)
    for i, c in enumerate(cases):
        given = inputs(c)
        with np.errstate(all="ignore"):
            expected = c.reference(*given)
        out = launch(code, f"k{i}", given)
        if group == "carries":
            check_carry(c, out, *expected)
        else:
            check(c, out, expected)


def check_carry(c: Case, out: np.ndarray, expected: np.ndarray, carry: np.ndarray) -> None:
    if c.result == "u32":
        assert ((out >> np.uint64(32)).astype(bool) == carry).all(), c.label
    check(c, out, expected)
