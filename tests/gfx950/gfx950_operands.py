"""Operand values and exact arithmetic for tests of single instructions, independent of the executor's C."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np

COUNT = 1024  # operands of one instruction: 4 workgroups of 256

DTYPES: dict[str, type] = {
    "u32": np.uint32,
    "i32": np.int32,
    "f32": np.float32,
    "u64": np.uint64,
    "i64": np.int64,
    "f64": np.float64,
    "u16": np.uint16,
    "i16": np.int16,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
_FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -2.5,
    448.0,
    464.0,
    3e38,
    1e-38,
    -1e-40,
    math.inf,
    -math.inf,
    math.nan,
]
_INTEGERS = [0, 1, 2, 7, 31, 32, 127, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def operands(kind: str, seed: int) -> np.ndarray:
    """COUNT values of ``kind``: edge cases, random bits, and numbers of everyday size."""
    generator = np.random.default_rng(seed)
    dtype = np.dtype(DTYPES[kind])
    bits = np.frombuffer(generator.bytes(COUNT * dtype.itemsize), dtype).copy()
    third = COUNT // 3
    with np.errstate(all="ignore"):
        if kind in _FLOATS:
            bits[:third] = (
                generator.standard_normal(third) * np.exp2(generator.integers(-8, 9, third))
            ).astype(dtype)
            edges = np.array(_SPECIAL).astype(dtype)
        else:
            bits[:third] = generator.integers(0, 100, third).astype(dtype)
            edges = (
                (np.array(_INTEGERS, np.uint64) & np.uint64(2 ** (8 * dtype.itemsize) - 1))
                .astype(f"u{dtype.itemsize}")
                .view(dtype)
            )
    bits[third : 2 * third] = edges[generator.integers(0, len(edges), third)]
    return generator.permutation(bits)


def rounded(exact: Fraction, dtype: type) -> float:
    """``exact`` rounded to nearest even in the format of ``dtype``."""
    info = ml_dtypes.finfo(dtype)
    if exact == 0:
        return 0.0
    exponent = max(_exponent(abs(exact)), int(info.minexp))
    unit = Fraction(2) ** (exponent - int(info.nmant))
    value = round(abs(exact) / unit) * unit  # round() of a Fraction ties to even
    magnitude = math.inf if value > Fraction(float(info.max)) else float(value)
    return -magnitude if exact < 0 else magnitude


def _exponent(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def exactly(dtype: type, function: Callable[..., Fraction]) -> Callable[..., np.ndarray]:
    """``function`` in rational arithmetic, rounded once; the rest, and signs of zero, are float64's."""

    def compute(*arrays: np.ndarray) -> np.ndarray:
        out = []
        for values in zip(*(array.astype(np.float64).tolist() for array in arrays), strict=True):
            plain = _plain(function, values)
            finite = all(map(math.isfinite, values))
            exact = rounded(function(*map(Fraction, values)), dtype) if finite else plain
            out.append(math.copysign(0.0, plain) if exact == 0 and plain == 0 else exact)
        with np.errstate(all="ignore"):
            return np.array(out).astype(dtype)

    return compute


def _plain(function: Callable[..., Fraction], values: tuple[float, ...]) -> float:
    with np.errstate(all="ignore"):
        return float(function(*map(np.float64, values)))  # type: ignore[arg-type]


def same(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Equal bit for bit, any NaN being as good as another."""
    expected = np.ascontiguousarray(expected, actual.dtype)
    unsigned = f"u{actual.dtype.itemsize}"
    equal = actual.view(unsigned) == expected.view(unsigned)
    if actual.dtype.kind in "fV":
        with np.errstate(invalid="ignore"):  # a signalling NaN
            equal |= np.isnan(actual.astype(np.float64)) & np.isnan(expected.astype(np.float64))
    return equal
