"""Conversions of the gfx950 executor: integers, 16-bit floats, 8-bit floats of both kinds, block scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from tests.gfx950.gfx950_cases import (
    BF16,
    F16,
    F32,
    F64,
    FNUZ,
    OCP,
    Case,
    bits_of,
    case,
    check_cases,
    clamp,
    halves,
    integer,
    pack,
    pair_of,
)
from tests.gfx950.gfx950_operands import DTYPES

E2M1 = ml_dtypes.float4_e2m1fn
WIDE = (("f16", F16), ("bf16", BF16))


def to_integer(kind: str, rounding: Callable = np.trunc) -> Callable[..., np.ndarray]:
    info = np.iinfo(DTYPES[kind])

    def convert(a: np.ndarray) -> np.ndarray:
        value = rounding(a.astype(F64))
        return np.array([0 if math.isnan(x) else int(clamp(x, info.min, info.max)) for x in value.tolist()])

    return convert


def norm(low: float, scale: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.rint(np.nan_to_num(np.clip(a.astype(F64), low, 1)) * scale).astype(np.int64) & 0xFFFF


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


def pack8(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    return pack(bits_of(a, dtype), bits_of(b, dtype), 8).astype(np.uint16)


def small_value(a: np.ndarray, dtype: type, index: int = 0) -> np.ndarray:
    return (a >> np.uint32(8 * index) & 255).astype(np.uint8).view(dtype).astype(F32)


def stochastic(a: np.ndarray, b: np.ndarray, shift: int, dtype: type) -> np.ndarray:
    bits = a.view(np.uint32)
    moved = (bits & 0xFF800000) | (bits + (b >> np.uint32(shift)) & 0x7FFFFF)
    return bits_of(moved.view(F32), dtype)


def eight_bit(types: dict[str, type]) -> list[Case]:
    cases = []
    for name, dtype in types.items():
        pairs = f"{name}x2"
        cases += [
            case(f"v_cvt_pk_{name}_f32", f"{pairs}: f32 f32", lambda a, b, t=dtype: pack8(a, b, t)),
            case(f"v_cvt_f32_{name}", "f32: u32", lambda a, t=dtype: small_value(a, t)),
            case(
                f"v_cvt_pk_f32_{name}",
                "f32x2: u32",
                lambda a, t=dtype: pair_of(small_value(a, t), small_value(a, t, 1)),
            ),
            case(
                f"v_cvt_sr_{name}_f32",
                f"{name}: f32 u32",
                lambda a, b, t=dtype, s=12 if name == "fp8" else 11: stochastic(a, b, s, t),
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
    for name, dtype in OCP.items():
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
                for wide, h in WIDE
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
                for wide, h in WIDE
            ),
        ]
    return [
        *cases,
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
            for wide, h in WIDE
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
            for wide, h in WIDE
        ),
    ]


def scaled(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (x.astype(F64) * scale_of(c)).astype(F32)


def fours(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = np.arange(16, dtype=np.uint8).view(E2M1).astype(F32)
    return table[a & 15], table[a >> np.uint32(4) & 15]


GROUPS = {
    "plain": (CONVERSIONS, "gfx950"),
    "eight_bit": (eight_bit(OCP), "gfx950"),
    "fnuz": (eight_bit(FNUZ), "gfx942"),
    "scaled": (scaled_codes(), "gfx950"),
}


@pytest.mark.parametrize("group", GROUPS)
def test_conversions(group: str) -> None:
    check_cases(*GROUPS[group])
