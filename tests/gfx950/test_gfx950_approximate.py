"""Instructions whose results are documented as approximate, and division, which is made of several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.gfx950.gfx950_kernels import Assembly, assemble, compile_hip
from tests.gfx950.gfx950_operands import operands
from tools import gfx950

F32, F64 = np.float32, np.float64
COUNT = 1024

_BODY = """
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  v_lshl_add_u32 v1, s2, 8, v0
  v_lshlrev_b32 v1, 3, v1
  s_waitcnt lgkmcnt(0)
  global_load_dwordx2 v[2:3], v1, s[4:5]
  s_waitcnt vmcnt(0)
  v_mov_b32 v5, 0
  {instruction}
  global_store_dwordx2 v1, v[4:5], s[6:7]
"""


def turn(function: Callable) -> Callable:
    """Of revolutions, exact to more than float32 is; beyond 256 of them, as of 0."""
    return lambda a: np.where(
        np.abs(a) <= 256,
        function((a - np.rint(a)) * 2 * np.pi),
        np.where(np.isfinite(a), function(0.0), np.nan),
    )


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rcp": lambda a: 1 / a,
    "rcp_iflag": lambda a: 1 / a,
    "rsq": lambda a: 1 / np.sqrt(a),
    "sqrt": np.sqrt,
    "exp": np.exp2,
    "log": np.log2,
    "exp_legacy": np.exp2,
    "log_legacy": np.log2,
    "sin": turn(np.sin),
    "cos": turn(np.cos),
}
OF_KIND = {
    "f32": list(FUNCTIONS),
    "f16": ["rcp", "rsq", "sqrt", "exp", "log", "sin", "cos"],
    "f64": ["rcp", "rsq", "sqrt"],
}


def run(kernel: gfx950.Kernel, given: np.ndarray, ulp: int) -> np.ndarray:
    out, memory = np.zeros(COUNT, np.uint64), gfx950.Memory()
    slots = np.ascontiguousarray(given.view(f"u{given.dtype.itemsize}").astype(np.uint64))
    pointers = [memory.add_array(slots, writable=False), memory.add_array(out)]
    gfx950.execute(kernel, (COUNT // 256,), (256,), pointers, memory, ulp=ulp)
    return out.astype(f"u{given.dtype.itemsize}").view(given.dtype)


def flushed(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < np.finfo(F32).tiny, np.copysign(F32(0), a), a)


@pytest.mark.parametrize("kind", OF_KIND)
def test_functions(kind: str) -> None:
    """Correctly rounded; float32 takes and gives no subnormals; ``ulp`` moves the last place."""
    text = {
        name: f"v_{name}_{kind} {'v[4:5], v[2:3]' if kind == 'f64' else 'v4, v2'}" for name in OF_KIND[kind]
    }
    code = assemble([Assembly(name, _BODY.format(instruction=t), pointers=2) for name, t in text.items()])
    given = operands(kind, 1)
    for name in text:
        with np.errstate(all="ignore"):
            exact = FUNCTIONS[name]((flushed(given) if kind == "f32" else given).astype(F64))
            near = flushed(exact.astype(F32)) if kind == "f32" else exact.astype(given.dtype)
        actual = run(code.kernel(name), given, 0)
        both_nan = np.isnan(actual) & np.isnan(near)
        with np.errstate(invalid="ignore"):  # NumPy's own last bit may be off before rounding
            close = np.abs(actual.astype(F64) - near.astype(F64)) <= np.spacing(np.abs(near)).astype(F64)
        assert ((actual == near) | both_nan | close).all(), name
        assert ((actual == near) | both_nan).mean() > 0.999, name
        if kind == "f32":
            check_moved(name, actual, run(code.kernel(name), given, 1), run(code.kernel(name), given, -1))


def check_moved(name: str, near: np.ndarray, more: np.ndarray, less: np.ndarray) -> None:
    """One place up and down in magnitude, where that stays a normal number."""
    inner = np.isfinite(near) & (np.abs(near) > 1.2e-38) & (np.abs(near) < 3e38)
    bits = [x.view(np.uint32)[inner].astype(np.int64) for x in (near, more, less)]
    assert inner.any() and (bits[1] - bits[0] == 1).all() and (bits[2] - bits[0] == -1).all(), name
    rest = ~inner & (np.isnan(near) | np.isinf(near) | (near == 0))
    assert (near.view(np.uint32)[rest] == more.view(np.uint32)[rest]).all(), name


# -- division and square root as the compiler expands them ---------------------------------------------------

_SOURCE = """
#define KERNEL extern "C" __attribute__((global, amdgpu_flat_work_group_size(256, 256))) void
#define AT (__builtin_amdgcn_workgroup_id_x() * 256 + __builtin_amdgcn_workitem_id_x())
KERNEL divide(const T *a, const T *b, T *c) { c[AT] = a[AT] / b[AT]; }
KERNEL root(const T *a, const T *, T *c) { c[AT] = __builtin_elementwise_sqrt(a[AT]); }
"""


def extremes(dtype: type, seed: int) -> np.ndarray:
    """All magnitudes, subnormals included, and special values."""
    generator = np.random.default_rng(seed)
    bits = np.frombuffer(generator.bytes(COUNT * np.dtype(dtype).itemsize), dtype).copy()
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, np.finfo(dtype).max, np.finfo(dtype).tiny]
    ).astype(dtype)
    bits[:128] = special[generator.integers(0, len(special), 128)]
    tiny = generator.integers(1, 1 << 20, 128).astype(f"u{np.dtype(dtype).itemsize}")
    bits[128:256] = tiny.view(dtype)
    return generator.permutation(bits)


@pytest.mark.parametrize("optimisation", ["-O1", "-O3"])
@pytest.mark.parametrize(("name", "dtype"), [("float", F32), ("double", F64), ("_Float16", np.float16)])
def test_division_and_root_are_correctly_rounded(name: str, dtype: type, optimisation: str) -> None:
    """Whatever the approximations' last place: the sequences correct it."""
    code = compile_hip(f"typedef {name} T;{_SOURCE}", optimisation=optimisation)
    for seed, ulp in [(1, 0), (2, 1), (3, -1)]:
        a, b = extremes(dtype, seed), extremes(dtype, seed + 10)
        # Some whose quotients are subnormal and whose divisors have inverses that are.
        b[:64] = np.finfo(dtype).max / np.arange(1, 65).astype(dtype)
        a[:64] = np.linspace(1, 3, 64).astype(dtype)
        with np.errstate(all="ignore"):
            expected = {"divide": a / b, "root": np.sqrt(a)}
        for kernel, wanted in expected.items():
            out, memory = np.zeros(COUNT, dtype), gfx950.Memory()
            pointers = [
                memory.add_array(a, writable=False),
                memory.add_array(b, writable=False),
                memory.add_array(out),
            ]
            gfx950.execute(code.kernel(kernel), (COUNT // 256,), (256,), pointers, memory, ulp=ulp)
            wrong = ~((out == wanted) | (np.isnan(out) & np.isnan(wanted)))
            # A float64 quotient that is subnormal is rounded twice (see V_DIV_FMAS_F64).
            if dtype is F64 and kernel == "divide":
                wrong &= np.abs(wanted) >= np.finfo(F64).tiny
            assert not wrong.any(), (kernel, a[wrong][:3], b[wrong][:3], out[wrong][:3], wanted[wrong][:3])
            assert (np.signbit(out) == np.signbit(wanted))[~np.isnan(wanted)].all()
