"""Tests of single lane-wise instructions: what a case is, the kernel it becomes, how results are compared.

LLVM's assembler encodes each instruction, so decoding is tested by an independent encoder too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.gfx950.gfx950_kernels import Assembly, assemble
from tests.gfx950.gfx950_operands import COUNT, DTYPES, operands, same
from tools import gfx950

Reference = Callable[..., np.ndarray | tuple[np.ndarray, np.ndarray]]

F32, F64, F16, BF16 = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
OCP = {"fp8": ml_dtypes.float8_e4m3fn, "bf8": ml_dtypes.float8_e5m2}
FNUZ = {"fp8": ml_dtypes.float8_e4m3fnuz, "bf8": ml_dtypes.float8_e5m2fnuz}


@dataclass(frozen=True)
class Case:
    """An instruction, the kinds of its result and operands, and what it computes.

    A kind is one of DTYPES; ``mask`` (a bit per lane); or of a result: two of a kind (``f16x2``), a code of 8
    bits (``fp8``, ``byte``), the upper half of a register (``high16``), or any of them and a mask
    (``u32 mask``).
    ``text`` is how the operands are written where that is not the usual way.
    """

    name: str
    result: str
    kinds: tuple[str, ...]
    reference: Reference
    text: str = ""
    modifiers: str = ""

    @property
    def accumulates(self) -> bool:
        """Whether the destination is an operand too, the last one."""
        return self.text == ACCUMULATING


ACCUMULATING = "{d}, {a}, {b}"


def case(name: str, kinds: str, reference: Reference, **fields: str) -> Case:
    """``kinds``: "result: operands"."""
    result, _, rest = kinds.partition(":")
    return Case(name, result, tuple(rest.split()), reference, **fields)


# -- the kernel ---------------------------------------------------------------------------------------

_BODY = """
  s_load_dwordx8 s[4:11], s[0:1], 0x0
  v_lshl_add_u32 v1, s2, 8, v0
  v_lshlrev_b32 v12, 4, v1
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
  s_mov_b64 exec, -1
  v_cndmask_b32 v10, 0, 1, vcc
  v_mov_b32 v11, 0
  global_store_dwordx4 v12, v[8:11], s[10:11]
"""
_BYTES = {**{kind: np.dtype(dtype).itemsize for kind, dtype in DTYPES.items()}, "f32x2": 8}


def _register(first: int, kind: str) -> str:
    return f"v[{first}:{first + 1}]" if _BYTES.get(kind, 4) == 8 else f"v{first}"


def body(c: Case) -> str:
    """Operands come in v[2:3], v[4:5] and v[6:7] (a mask in vcc), the result goes to v[8:9] and vcc."""
    written = ["vcc" if kind == "mask" else _register(2 * i + 2, kind) for i, kind in enumerate(c.kinds)]
    results = ["vcc" if kind == "mask" else _register(8, kind) for kind in c.result.split()]
    names = dict(zip("abc", written, strict=False))
    text = c.text.format(d=results[0], **names) if c.text else ", ".join([*results, *written])
    return _BODY.format(instruction=f"{c.name} {text}{c.modifiers}")


# -- values in and out ----------------------------------------------------------------------------------


def inputs(c: Case) -> list[np.ndarray]:
    """The operands; what an accumulating instruction starts from is the third."""
    kinds = [*c.kinds, *([c.result] if c.accumulates else [])]
    made = [operands("u32" if kind == "mask" else kind, seed) for seed, kind in enumerate(kinds)]
    return [m % 2 if kind == "mask" else m for m, kind in zip(made, kinds, strict=True)]


def _slots(values: np.ndarray) -> np.ndarray:
    """Each value in the low bits of 64."""
    return np.ascontiguousarray(values.view(f"u{values.dtype.itemsize}").astype(np.uint64))


def _launch(kernel: gfx950.Kernel, given: Sequence[np.ndarray]) -> np.ndarray:
    """For each lane v[8:9], and vcc."""
    out, memory = np.zeros((COUNT, 2), np.uint64), gfx950.Memory()
    rest = [np.full(COUNT, 0x1122334455667788, np.uint64) for _ in range(3 - len(given))]
    pointers = [memory.add_array(x, writable=False) for x in [*map(_slots, given), *rest]]
    gfx950.execute(kernel, (COUNT // 256,), (256,), [*pointers, memory.add_array(out)], memory)
    return out


def _dtype(kind: str, arch: str) -> np.dtype:
    eight_bits = OCP if arch == "gfx950" else FNUZ
    names = {**DTYPES, **eight_bits, "mask": np.uint32, "byte": np.uint8, "high16": np.float16}
    return np.dtype(names[kind])


def _as(kind: str, values: np.ndarray, arch: str) -> np.ndarray:
    """Results of ``kind`` as an array of its dtype, pairs side by side; integers are codes of them."""
    pair = kind.endswith("x2")
    dtype = _dtype(kind.removesuffix("x2"), arch)
    code = f"u{dtype.itemsize * (2 if pair else 1)}"
    values = np.asarray(values)
    is_code = pair or values.dtype.kind == "u" or values.dtype == np.uint64
    if not is_code:
        return np.ascontiguousarray(values.astype(dtype)).reshape(COUNT, -1)
    if not pair and dtype.kind not in "fV":
        return values.astype(code).view(dtype).reshape(COUNT, -1)
    return np.ascontiguousarray(values.astype(code)).view(dtype).reshape(COUNT, -1)


def check(c: Case, out: np.ndarray, expected: np.ndarray, arch: str) -> None:
    """``out`` is one column of what ``_launch`` gives."""
    for kind, wanted in zip(
        c.result.split(), expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        column = out[:, 1 if kind == "mask" else 0] >> np.uint64(16 if kind == "high16" else 0)
        good = same(_as(kind, column, arch), _as(kind, wanted, arch)).all(1)
        where = np.flatnonzero(~good)[:3]
        message = f"{c.name}{c.modifiers} {c.text}: {(~good).sum()} wrong, at {where}"
        assert good.all(), f"{message}: {out[where]} for {np.asarray(wanted)[where]}"


def check_cases(cases: Sequence[Case], arch: str = "gfx950") -> None:
    """Run every case on COUNT operands and compare."""
    code = assemble([Assembly(f"k{i}", body(c), pointers=4) for i, c in enumerate(cases)], arch)
    for i, c in enumerate(cases):
        given = inputs(c)
        with np.errstate(all="ignore"):
            expected = c.reference(*given)
        check(c, _launch(code.kernel(f"k{i}"), given), expected, arch)


# -- what references are written with ---------------------------------------------------------------------


def integer(kind: str, function: Callable[..., int]) -> Callable[..., np.ndarray]:
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


def sext(x: int, bits: int) -> int:
    """The low ``bits`` of x as a signed number."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def pack(low: np.ndarray, high: np.ndarray, bits: int = 16) -> np.ndarray:
    """Two codes side by side."""
    mask = (1 << bits) - 1
    low, high = low.astype(np.int64) & mask, high.astype(np.int64) & mask
    return (low | high << bits).astype(np.uint32)


def pair_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two float32 side by side."""
    low, high = (np.ascontiguousarray(x, F32).view(np.uint32).astype(np.uint64) for x in (low, high))
    return low | high << np.uint64(32)


def bits_of(x: np.ndarray, dtype: type) -> np.ndarray:
    """The code of x rounded to ``dtype``."""
    return x.astype(dtype).view(np.uint8 if np.dtype(dtype).itemsize == 1 else np.uint16)


def halves(a: np.ndarray, dtype: type) -> tuple[np.ndarray, ...]:
    """The two 16-bit floats in each word."""
    pair = a.view(np.uint16).reshape(-1, 2)
    return tuple(np.ascontiguousarray(pair[:, i]).view(dtype).astype(F32) for i in (0, 1))


def signalling(kind: str, a: np.ndarray) -> np.ndarray:
    """Which are signalling NaNs."""
    bits, quiet = {"f32": (np.uint32, 1 << 22), "f16": (np.uint16, 1 << 9), "f64": (np.uint64, 1 << 51)}[kind]
    return np.isnan(a) & (a.view(bits) & bits(quiet) == 0)
