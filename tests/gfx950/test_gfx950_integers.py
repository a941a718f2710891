"""Lane-wise integer instructions and comparisons of the gfx950 executor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.gfx950.gfx950_cases import ACCUMULATING, case, check_cases, clamp, integer, sext, signalling
from tests.gfx950.gfx950_operands import COUNT, DTYPES


def u32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.uint64).astype(np.uint32)


def reverse(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


def byte(x: int, i: int) -> int:
    return x >> 8 * i & 255


def perm(a: int, b: int, select: int) -> int:
    data = [byte(b, i) for i in range(4)] + [byte(a, i) for i in range(4)]
    signs = [255 if data[i] & 128 else 0 for i in (1, 3, 5, 7)]
    table = [*data, *signs, 0, 255, 255, 255]
    return sum(table[min(byte(select, i), 15)] << 8 * i for i in range(4))


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
    case("v_add_co_u32", "u32 mask: u32 u32", lambda a, b: (a + b, a.astype(np.uint64) + b > 0xFFFFFFFF)),
    case("v_sub_co_u32", "u32 mask: u32 u32", lambda a, b: (a - b, a < b)),
    case("v_subrev_co_u32", "u32 mask: u32 u32", lambda a, b: (b - a, b < a)),
    case(
        "v_addc_co_u32",
        "u32 mask: u32 u32 mask",
        lambda a, b, c: (u32(a + b + c), a.astype(np.int64) + b + c >= 2**32),
    ),
    case(
        "v_subb_co_u32",
        "u32 mask: u32 u32 mask",
        lambda a, b, c: (u32(a - b - c), a.astype(np.int64) - b - c < 0),
    ),
    case(
        "v_subbrev_co_u32",
        "u32 mask: u32 u32 mask",
        lambda a, b, c: (u32(b - a - c), b.astype(np.int64) - a - c < 0),
    ),
    case("v_mad_u64_u32", "u64 mask: u32 u32 u64", lambda a, b, c: _mad64("u64", a, b, c)),
    case("v_mad_i64_i32", "i64 mask: i32 i32 i64", lambda a, b, c: _mad64("i64", a, b, c)),
]


def _mad64(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(DTYPES[kind])
    exact = [x * y + z for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    return integer(kind, lambda x, y, z: x * y + z)(a, b, c), np.array(
        [not info.min <= e <= info.max for e in exact]
    )


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
        case(f"v_dot{32 // width}c_{types}", "u32: u32 u32", dot(width, True), text=ACCUMULATING)
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


GROUPS = {"bits": BITS, "integers": INTEGERS, "carries": CARRIES, "dots": DOTS, "comparisons": COMPARISONS}


@pytest.mark.parametrize("group", GROUPS)
def test_integers(group: str) -> None:
    check_cases(GROUPS[group])
