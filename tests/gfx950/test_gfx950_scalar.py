"""Every scalar instruction of the gfx950 executor against Python integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.gfx950.gfx950_kernels import Assembly, assemble
from tools import gfx950

COUNT = 192
EDGES = [
    0,
    1,
    2,
    5,
    31,
    32,
    63,
    64,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 63,
    (1 << 64) - 1,
    0x10005,
    0x200004,
]
M32, M64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class Values:
    """What an instruction reads: operands a and b, its destination as it was, SCC."""

    a: int
    b: int
    old: int
    scc: int


@dataclass(frozen=True)
class Case:
    """``result`` gives d, or (d, scc); SCC stays where it says nothing.  Widths are those of d, a, b."""

    name: str
    result: Callable[[Values], int | tuple[int, bool]]
    widths: tuple[int, ...]
    text: str = ""


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def nonzero(function: Callable[[Values], int], bits: int) -> Callable[[Values], tuple[int, bool]]:
    """SCC says whether d is zero."""
    return lambda v: (d := function(v) & (1 << bits) - 1, d != 0)


def both(name: str, function: Callable[[int, int], int]) -> list[Case]:
    """A bitwise operation of 32 and of 64 bits."""
    return [
        Case(f"s_{name}_b{bits}", nonzero(lambda v: function(v.a, v.b), bits), (bits,) * 3)
        for bits in (32, 64)
    ]


def field(x: int, b: int, bits: int, sign: bool) -> int:
    at, width = b & bits - 1, min(b >> 16 & 127, bits)
    value = x >> at & (1 << width) - 1
    if sign and width:
        top = min(at + width, bits) - 1
        value = signed(x >> at, top - at + 1)
    return value


def count(bits: int, of: str) -> Callable[[Values], int]:
    return lambda v: f"{v.a & (1 << bits) - 1:0{bits}b}".count(of)


def first(bits: int, of: str, from_top: bool) -> Callable[[Values], int]:
    def find(v: Values) -> int:
        text = f"{v.a & (1 << bits) - 1:0{bits}b}"
        return (text if from_top else text[::-1]).find(of)

    return find


def sign_bits(bits: int) -> Callable[[Values], int]:
    def find(v: Values) -> int:
        text = f"{v.a & (1 << bits) - 1:0{bits}b}"
        return text.find("0" if text[0] == "1" else "1")

    return find


def overflowing(exact: Callable[[Values], int]) -> Callable[[Values], tuple[int, bool]]:
    return lambda v: (e := exact(v), not -(2**31) <= e < 2**31)


def carrying(exact: Callable[[Values], int]) -> Callable[[Values], tuple[int, bool]]:
    return lambda v: (e := exact(v), not 0 <= e <= M32)


BITS = [
    Case("s_mov_b32", lambda v: v.a, (32, 32)),
    Case("s_mov_b64", lambda v: v.a, (64, 64)),
    Case("s_cmov_b32", lambda v: v.a if v.scc else v.old, (32, 32)),
    Case("s_cmov_b64", lambda v: v.a if v.scc else v.old, (64, 64)),
    Case("s_cselect_b32", lambda v: v.a if v.scc else v.b, (32,) * 3),
    Case("s_cselect_b64", lambda v: v.a if v.scc else v.b, (64,) * 3),
    *both("and", lambda a, b: a & b),
    *both("or", lambda a, b: a | b),
    *both("xor", lambda a, b: a ^ b),
    *both("andn2", lambda a, b: a & ~b),
    *both("orn2", lambda a, b: a | ~b),
    *both("nand", lambda a, b: ~(a & b)),
    *both("nor", lambda a, b: ~(a | b)),
    *both("xnor", lambda a, b: ~(a ^ b)),
    *(Case(f"s_not_b{n}", nonzero(lambda v: ~v.a, n), (n, n)) for n in (32, 64)),
    *(Case(f"s_lshl_b{n}", nonzero(lambda v, n=n: v.a << (v.b & n - 1), n), (n, n, 32)) for n in (32, 64)),
    *(Case(f"s_lshr_b{n}", nonzero(lambda v, n=n: v.a >> (v.b & n - 1), n), (n, n, 32)) for n in (32, 64)),
    *(
        Case(f"s_ashr_i{n}", nonzero(lambda v, n=n: signed(v.a, n) >> (v.b & n - 1), n), (n, n, 32))
        for n in (32, 64)
    ),
    *(
        Case(f"s_bfm_b{n}", lambda v, n=n: ((1 << (v.a & n - 1)) - 1) << (v.b & n - 1), (n, 32, 32))
        for n in (32, 64)
    ),
    *(
        Case(f"s_bfe_u{n}", nonzero(lambda v, n=n: field(v.a, v.b, n, False), n), (n, n, 32))
        for n in (32, 64)
    ),
    *(Case(f"s_bfe_i{n}", nonzero(lambda v, n=n: field(v.a, v.b, n, True), n), (n, n, 32)) for n in (32, 64)),
    *(Case(f"s_brev_b{n}", lambda v, n=n: int(f"{v.a:0{n}b}"[::-1], 2), (n, n)) for n in (32, 64)),
    *(Case(f"s_bcnt0_i32_b{n}", nonzero(count(n, "0"), 32), (32, n)) for n in (32, 64)),
    *(Case(f"s_bcnt1_i32_b{n}", nonzero(count(n, "1"), 32), (32, n)) for n in (32, 64)),
    *(Case(f"s_ff0_i32_b{n}", first(n, "0", False), (32, n)) for n in (32, 64)),
    *(Case(f"s_ff1_i32_b{n}", first(n, "1", False), (32, n)) for n in (32, 64)),
    *(Case(f"s_flbit_i32_b{n}", first(n, "1", True), (32, n)) for n in (32, 64)),
    Case("s_flbit_i32", sign_bits(32), (32, 32)),
    Case("s_flbit_i32_i64", sign_bits(64), (32, 64)),
    Case("s_sext_i32_i8", lambda v: signed(v.a, 8), (32, 32)),
    Case("s_sext_i32_i16", lambda v: signed(v.a, 16), (32, 32)),
    *(Case(f"s_bitset0_b{n}", lambda v, n=n: v.old & ~(1 << (v.a & n - 1)), (n, 32)) for n in (32, 64)),
    *(Case(f"s_bitset1_b{n}", lambda v, n=n: v.old | 1 << (v.a & n - 1), (n, 32)) for n in (32, 64)),
    Case("s_bitreplicate_b64_b32", lambda v: sum((v.a >> i & 1) * 3 << 2 * i for i in range(32)), (64, 32)),
    *(
        Case(
            f"s_wqm_b{n}",
            nonzero(lambda v, n=n: sum((15 if v.a >> i & 15 else 0) << i for i in range(0, n, 4)), n),
            (n, n),
        )
        for n in (32, 64)
    ),
    Case("s_pack_ll_b32_b16", lambda v: (v.a & 0xFFFF) | v.b << 16, (32,) * 3),
    Case("s_pack_lh_b32_b16", lambda v: (v.a & 0xFFFF) | (v.b & 0xFFFF0000), (32,) * 3),
    Case("s_pack_hh_b32_b16", lambda v: v.a >> 16 | (v.b & 0xFFFF0000), (32,) * 3),
]

INTEGERS = [
    Case("s_add_u32", carrying(lambda v: v.a + v.b), (32,) * 3),
    Case("s_sub_u32", carrying(lambda v: v.a - v.b), (32,) * 3),
    Case("s_addc_u32", carrying(lambda v: v.a + v.b + v.scc), (32,) * 3),
    Case("s_subb_u32", carrying(lambda v: v.a - v.b - v.scc), (32,) * 3),
    Case("s_add_i32", overflowing(lambda v: signed(v.a) + signed(v.b)), (32,) * 3),
    Case("s_sub_i32", overflowing(lambda v: signed(v.a) - signed(v.b)), (32,) * 3),
    Case("s_mul_i32", lambda v: v.a * v.b, (32,) * 3),
    Case("s_mul_hi_u32", lambda v: v.a * v.b >> 32, (32,) * 3),
    Case("s_mul_hi_i32", lambda v: signed(v.a) * signed(v.b) >> 32, (32,) * 3),
    *(Case(f"s_lshl{n}_add_u32", carrying(lambda v, n=n: (v.a << n) + v.b), (32,) * 3) for n in (1, 2, 3, 4)),
    Case("s_min_u32", lambda v: (min(v.a, v.b), v.a < v.b), (32,) * 3),
    Case("s_max_u32", lambda v: (max(v.a, v.b), v.a > v.b), (32,) * 3),
    Case("s_min_i32", lambda v: (min(signed(v.a), signed(v.b)), signed(v.a) < signed(v.b)), (32,) * 3),
    Case("s_max_i32", lambda v: (max(signed(v.a), signed(v.b)), signed(v.a) > signed(v.b)), (32,) * 3),
    Case("s_abs_i32", nonzero(lambda v: abs(signed(v.a)), 32), (32, 32)),
    Case("s_absdiff_i32", nonzero(lambda v: abs(signed(v.a) - signed(v.b)), 32), (32,) * 3),
    Case("s_movk_i32", lambda v: -300, (32,), text="{d}, -300"),
    Case("s_cmovk_i32", lambda v: 77 if v.scc else v.old, (32,), text="{d}, 77"),
    Case("s_addk_i32", overflowing(lambda v: signed(v.old) - 5), (32,), text="{d}, -5"),
    Case("s_mulk_i32", lambda v: v.old * -3, (32,), text="{d}, -3"),
    Case("s_add_u32", carrying(lambda v: v.a + 0x12345678), (32, 32), text="{d}, {a}, 0x12345678"),
    Case("s_mov_b64", lambda v: -16 & M64, (64,), text="{d}, -16"),
    Case("s_mov_b32", lambda v: 0x3F000000, (32,), text="{d}, 0.5"),
]

_CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
COMPARISONS = [
    *(
        Case(f"s_cmp_{c}_u32", lambda v, f=f: (v.old, f(v.a, v.b)), (0, 32, 32))
        for c, f in _CONDITIONS.items()
    ),
    *(
        Case(f"s_cmp_{c}_i32", lambda v, f=f: (v.old, f(signed(v.a), signed(v.b))), (0, 32, 32))
        for c, f in _CONDITIONS.items()
    ),
    *(
        Case(f"s_cmpk_{c}_i32", lambda v, f=f: (v.old, f(signed(v.a), -1)), (0, 32), text="{a}, 0xffff")
        for c, f in _CONDITIONS.items()
    ),
    *(
        Case(f"s_cmpk_{c}_u32", lambda v, f=f: (v.old, f(v.a, 0x8001)), (0, 32), text="{a}, 0x8001")
        for c, f in _CONDITIONS.items()
    ),
    *(
        Case(f"s_cmp_{c}_u64", lambda v, f=_CONDITIONS[c]: (v.old, f(v.a, v.b)), (0, 64, 64))
        for c in ("eq", "lg")
    ),
    *(
        Case(f"s_bitcmp0_b{n}", lambda v, n=n: (v.old, not v.a >> (v.b & n - 1) & 1), (0, n, 32))
        for n in (32, 64)
    ),
    *(
        Case(f"s_bitcmp1_b{n}", lambda v, n=n: (v.old, bool(v.a >> (v.b & n - 1) & 1)), (0, n, 32))
        for n in (32, 64)
    ),
]

_BODY = """
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  s_lshl_b32 s20, s2, 5
  s_waitcnt lgkmcnt(0)
  s_load_dwordx8 s[12:19], s[4:5], s20
  s_waitcnt lgkmcnt(0)
  s_cmp_lg_u32 s18, 0
  {instruction}
  s_cselect_b32 s19, 1, 0
  v_mov_b32 v0, s16
  v_mov_b32 v1, s17
  v_mov_b32 v2, s19
  v_mov_b32 v3, s19
  v_mov_b32 v4, s20
  global_store_dwordx4 v4, v[0:3], s[6:7]
"""


def register(first_register: int, width: int) -> str:
    return f"s[{first_register}:{first_register + 1}]" if width == 64 else f"s{first_register}"


def body(case: Case) -> str:
    wide, *operands = case.widths
    names = {
        "d": register(16, wide),
        **dict(zip("ab", (register(12 + 2 * i, w) for i, w in enumerate(operands)), strict=False)),
    }
    text = case.text.format(**names) if case.text else ", ".join(list(names.values())[0 if wide else 1 :])
    return _BODY.format(instruction=f"{case.name} {text}")


def inputs() -> np.ndarray:
    generator = np.random.default_rng(1)
    values = generator.integers(0, 1 << 64, (COUNT, 4), np.uint64)
    edges = np.array(EDGES, np.uint64)[generator.integers(0, len(EDGES), (COUNT, 4))]
    mixed = np.where(generator.integers(0, 3, (COUNT, 4)) > 0, edges, values)
    mixed[: COUNT // 4, 1] = mixed[: COUNT // 4, 0]
    mixed[:, 3] &= np.uint64(1)
    return np.ascontiguousarray(mixed)


def test_arithmetic() -> None:
    cases = [*BITS, *INTEGERS, *COMPARISONS]
    code = assemble([Assembly(f"k{i}", body(case), pointers=2) for i, case in enumerate(cases)])
    given = inputs()
    for i, case in enumerate(cases):
        out, memory = np.zeros((COUNT, 4), np.uint64), gfx950.Memory()
        pointers = [memory.add_array(given, writable=False), memory.add_array(out)]
        gfx950.execute(code.kernel(f"k{i}"), (COUNT,), (64,), pointers, memory)
        for row, result in zip(given.tolist(), out.tolist(), strict=True):
            check(case, row, result[0], result[1] & 1)


def check(case: Case, row: list[int], d: int, scc: int) -> None:
    a, b, old, scc_before = row
    widths = [*case.widths[1:], 64, 64]
    values = Values(a & (1 << widths[0]) - 1, b & (1 << widths[1]) - 1, old, scc_before)
    wide = case.widths[0]
    expected = case.result(values)
    if not isinstance(expected, tuple):
        expected = (expected, bool(scc_before))
    full = old if wide == 0 else expected[0] & M64 if wide == 64 else old >> 32 << 32 | expected[0] & M32
    assert (d, scc) == (full, expected[1]), (
        f"{case.name} {case.text} of {values}: {d:#x} {scc}, not {expected}"
    )


# -- the rest: EXEC, jumps, hardware registers ------------------------------------------------------------

_SAVEEXEC: dict[str, Callable[[int, int], int]] = {
    "and": lambda e, a: e & a,
    "or": lambda e, a: e | a,
    "xor": lambda e, a: e ^ a,
    "nand": lambda e, a: ~(e & a),
    "nor": lambda e, a: ~(e | a),
    "xnor": lambda e, a: ~(e ^ a),
    "andn2": lambda e, a: a & ~e,
    "orn2": lambda e, a: a | ~e,
    "andn1": lambda e, a: ~a & e,
    "orn1": lambda e, a: ~a | e,
}
_WREXEC: dict[str, Callable[[int, int], int]] = {"andn1": lambda e, a: ~a & e, "andn2": lambda e, a: a & ~e}
_EXEC_BODY = """
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  s_waitcnt lgkmcnt(0)
  s_load_dwordx4 s[12:15], s[4:5], 0x0
  v_mov_b32 v4, 0
  s_waitcnt lgkmcnt(0)
  s_mov_b64 exec, s[14:15]
  {name} s[16:17], s[12:13]
  s_cselect_b32 s20, 1, 0
  s_mov_b64 s[18:19], exec
  s_mov_b64 exec, -1
  v_mov_b32 v0, s16
  v_mov_b32 v1, s17
  v_mov_b32 v2, s18
  v_mov_b32 v3, s19
  v_mov_b32 v5, s20
  global_store_dwordx4 v4, v[0:3], s[6:7]
  global_store_dword v4, v5, s[6:7] offset:16
"""


def test_exec() -> None:
    named = {f"s_{n}_saveexec_b64": f for n, f in _SAVEEXEC.items()} | {
        f"s_{n}_wrexec_b64": f for n, f in _WREXEC.items()
    }
    code = assemble([Assembly(name, _EXEC_BODY.format(name=name), pointers=2) for name in named])
    for name, function in named.items():
        for a, e in [(0x123456789ABCDEF0, 0xFF00FF00FFFF0000), (0, 5), (M64, M64), (1 << 63, M64)]:
            out, given, memory = np.zeros(3, np.uint64), np.array([a, e], np.uint64), gfx950.Memory()
            pointers = [memory.add_array(given, writable=False), memory.add_array(out)]
            gfx950.execute(code.kernel(name), (1,), (64,), pointers, memory)
            now = function(e, a) & M64
            saved = now if "wrexec" in name else e
            assert out.tolist() == [saved, now, int(now != 0)], name


_FLOW = """
  s_load_dwordx2 s[4:5], s[0:1], 0x0
  s_mov_b32 s10, 0
  s_getpc_b64 s[6:7]
  s_add_u32 s6, s6, .Lfunction-.Lflow_here
.Lflow_here_is_next:
  s_addc_u32 s7, s7, 0
  s_swappc_b64 s[8:9], s[6:7]
  s_call_b64 s[8:9], .Lfunction
  s_cmp_eq_u32 s10, 2
  s_cbranch_scc0 .Lwrong
  s_cbranch_scc1 .Lscc
  s_branch .Lwrong
.Lscc:
  s_mov_b64 vcc, 0
  s_cbranch_vccnz .Lwrong
  s_cbranch_vccz .Lvcc
  s_branch .Lwrong
.Lvcc:
  s_cbranch_execz .Lwrong
  s_cbranch_execnz .Lright
.Lwrong:
  s_add_u32 s10, s10, 100
.Lright:
  s_getreg_b32 s11, hwreg(HW_REG_MODE, 0, 4)
  s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 3
  s_getreg_b32 s12, hwreg(HW_REG_MODE, 0, 8)
  s_mov_b32 s13, 0
  s_setreg_b32 hwreg(HW_REG_MODE, 0, 2), s13
  s_getreg_b32 s14, hwreg(HW_REG_MODE, 0, 2)
  s_setprio 1
  s_sleep 1
  s_sethalt 0
  s_icache_inv
  s_dcache_inv
  s_dcache_wb
  v_nop
  v_mov_b32 v0, s10
  v_mov_b32 v1, s11
  v_mov_b32 v2, s12
  v_mov_b32 v3, s14
  v_mov_b32 v4, 0
  s_waitcnt lgkmcnt(0)
  global_store_dwordx4 v4, v[0:3], s[4:5]
  s_endpgm
.Lfunction:
  s_add_u32 s10, s10, 1
  s_setpc_b64 s[8:9]
"""


def test_control_flow_and_mode() -> None:
    # s_getpc gives the address after itself.
    text = _FLOW.replace("  s_add_u32 s6,", ".Lflow_here:\n  s_add_u32 s6,").replace(
        ".Lflow_here_is_next:\n", ""
    )
    out, memory = np.zeros(4, np.uint32), gfx950.Memory()
    kernel = assemble([Assembly("flow", text)]).kernel("flow")
    gfx950.execute(kernel, (1,), (64,), [memory.add_array(out)], memory)
    assert out.tolist() == [2, 0, 0xF3, 0]


_ROUNDING = """
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  v_lshlrev_b32 v1, 3, v0
  s_waitcnt lgkmcnt(0)
  global_load_dwordx2 v[2:3], v1, s[4:5]
  s_waitcnt vmcnt(0)
  s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 8), {mode}
  v_mul_f32 v4, v2, v3
  v_cvt_f16_f32 v5, v2
  global_store_dwordx2 v1, v[4:5], s[6:7]
"""


def test_rounding_modes_and_flushed_subnormals() -> None:
    """MODE says how float32 and float16 round, and whether subnormals are zeros."""
    rounds = {"near": 0xF0, "up": 0xF5, "down": 0xFA, "zero": 0xFF, "flush": 0x00}
    code = assemble(
        [Assembly(name, _ROUNDING.format(mode=mode), pointers=2) for name, mode in rounds.items()]
    )
    generator = np.random.default_rng(2)
    given = (generator.standard_normal((64, 2)) * np.exp2(generator.integers(-75, 9, (64, 1)))).astype(
        np.float32
    )
    results = {}
    for name in rounds:
        out, memory = np.zeros((64, 2), np.uint32), gfx950.Memory()
        pointers = [memory.add_array(given, writable=False), memory.add_array(out)]
        gfx950.execute(code.kernel(name), (1,), (64,), pointers, memory)
        results[name] = (
            out[:, 0].copy().view(np.float32).astype(np.float64),
            out[:, 1].astype(np.uint16).view(np.float16),
        )
    exact = given.astype(np.float64).prod(1)
    product = {name: result[0] for name, result in results.items()}
    assert (product["near"] == given.prod(1)).all()
    assert (product["down"] <= exact).all() and (exact <= product["up"]).all()
    assert (np.abs(product["zero"]) <= np.abs(exact)).all()
    assert (product["up"] - product["down"] > 0).any()
    near, tiny = product["near"], np.finfo(np.float32).tiny
    assert (product["flush"] == np.where(np.abs(near) < tiny, 0, near)).all()
    assert (np.abs(near[near != 0]) < tiny).any()
    half = {name: result[1].astype(np.float64) for name, result in results.items()}
    first = given[:, 0].astype(np.float64)
    assert (half["near"] == given[:, 0].astype(np.float16)).all()
    assert (half["down"] <= first).all() and (first <= half["up"]).all()
