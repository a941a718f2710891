"""Instructions that move values between lanes, and the modifiers DPP and SDWA, lane by lane."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.gfx950.gfx950_kernels import Assembly, assemble
from tools import gfx950

LANES = 64
LANE = np.arange(LANES)

# v2, v3: words of two arrays; the result goes to v8 and v9, which start as v3 and v2.
_START = """
  s_load_dwordx8 s[4:11], s[0:1], 0x0
  v_lshlrev_b32 v1, 2, v0
  s_waitcnt lgkmcnt(0)
  global_load_dword v2, v1, s[4:5]
  global_load_dword v3, v1, s[6:7]
  s_waitcnt vmcnt(0)
  v_mov_b32 v8, v3
  v_mov_b32 v9, v2
"""
_STORE = """
  s_mov_b64 exec, -1
  s_waitcnt lgkmcnt(0)
  global_store_dword v1, v8, s[8:9]
  global_store_dword v1, v9, s[10:11]
"""


def words(seed: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(4 * LANES), np.uint32).copy()


def results(bodies: dict[str, str], a: np.ndarray, b: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """v8 and v9 of every body."""
    code = assemble(
        [
            Assembly(f"k{i}", _START + body + _STORE, pointers=4, agprs=8)
            for i, body in enumerate(bodies.values())
        ]
    )
    out = {}
    for i, name in enumerate(bodies):
        first, second, memory = np.zeros(LANES, np.uint32), np.zeros(LANES, np.uint32), gfx950.Memory()
        pointers = [memory.add_array(x, writable=False) for x in (a, b)]
        pointers += [memory.add_array(x) for x in (first, second)]
        gfx950.execute(code.kernel(f"k{i}"), (1,), (LANES,), pointers, memory)
        out[name] = first, second
    return out


# -- DPP --------------------------------------------------------------------------------------------------

ROW, IN_ROW = LANE // 16 * 16, LANE % 16


def within(lane: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return np.where(inside, lane, -1)


# Control: which lane a lane reads, -1 for none.
DPP: dict[str, np.ndarray] = {
    "quad_perm:[1,0,3,2]": LANE ^ 1,
    "quad_perm:[0,0,3,1]": LANE // 4 * 4 + np.array([0, 0, 3, 1])[LANE % 4],
    "row_shl:3": within(LANE + 3, IN_ROW + 3 < 16),
    "row_shr:5": within(LANE - 5, IN_ROW >= 5),
    "row_ror:7": ROW + (IN_ROW - 7) % 16,
    "row_mirror": ROW + 15 - IN_ROW,
    "row_half_mirror": LANE // 8 * 8 + 7 - LANE % 8,
    "wave_shl:1": within(LANE + 1, LANE < 63),
    "wave_rol:1": (LANE + 1) % 64,
    "wave_shr:1": LANE - 1,
    "wave_ror:1": (LANE - 1) % 64,
    "row_bcast:15": within(ROW - 1, LANE >= 16),
    "row_bcast:31": within(np.full(LANES, 31), LANE >= 32),
    "row_newbcast:9": ROW + 9,
}


def moved(a: np.ndarray, source: np.ndarray, old: np.ndarray, zeros: bool) -> np.ndarray:
    """Where no lane is read: zero, or nothing is written."""
    return np.where(source >= 0, a[source], 0 if zeros else old)


def test_dpp() -> None:
    a, b = words(1), words(2)
    bodies, expected = {}, {}
    masks = np.isin(LANE // 16, [0, 2]) & np.isin(LANE // 4 % 4, [1, 2, 3])
    active = LANE % 3 != 1
    for control, source in DPP.items():
        for zeros in (False, True):
            bound = " bound_ctrl:0" if zeros else ""
            name = f"{control}{bound}"
            bodies[name] = f"  v_mov_b32_dpp v8, v2 {control} row_mask:0xf bank_mask:0xf{bound}\n"
            expected[name] = moved(a, source, b, zeros)
            bodies[f"{name} add"] = (
                f"  v_add_u32_dpp v8, v2, v3 {control} row_mask:0xf bank_mask:0xf{bound}\n"
            )
            expected[f"{name} add"] = np.where((source >= 0) | zeros, moved(a, source, b, True) + b, b)
            bodies[f"{name} masked"] = f"  v_mov_b32_dpp v8, v2 {control} row_mask:0x5 bank_mask:0xe{bound}\n"
            expected[f"{name} masked"] = np.where(masks, moved(a, source, b, zeros), b)
            bodies[f"{name} partial"] = (
                f"  s_mov_b32 exec_lo, 0x{_mask(active[:32]):x}\n"
                f"  s_mov_b32 exec_hi, 0x{_mask(active[32:]):x}\n"
                f"  v_mov_b32_dpp v8, v2 {control} row_mask:0xf bank_mask:0xf{bound}\n"
            )
            readable = np.where((source >= 0) & active[source], source, -1)
            expected[f"{name} partial"] = np.where(active, moved(a, readable, b, zeros), b)
    for name, (first, _) in results(bodies, a, b).items():
        assert (first == expected[name]).all(), name


def _mask(lanes: np.ndarray) -> int:
    return sum(1 << i for i, active in enumerate(lanes) if active)


def test_dpp_changes_signs() -> None:
    a, b = (np.random.default_rng(s).standard_normal(LANES).astype(np.float32) for s in (3, 4))
    body = "  v_add_f32_dpp v8, -v2, |v3| row_mirror row_mask:0xf bank_mask:0xf\n"
    first, _ = results({"add": body}, a.view(np.uint32), b.view(np.uint32))["add"]
    assert (first.view(np.float32) == -a[DPP["row_mirror"]] + abs(b)).all()


# -- SDWA -------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{f"BYTE_{i}": (lambda x, i=i: x >> np.uint32(8 * i) & 255) for i in range(4)},
    **{f"WORD_{i}": (lambda x, i=i: x >> np.uint32(16 * i) & 0xFFFF) for i in range(2)},
    "DWORD": lambda x: x,
}
_BITS = {"B": 8, "W": 16, "D": 32}


def extended(x: np.ndarray, part: str) -> np.ndarray:
    bits = _BITS[part[0]]
    value = x.astype(np.int64)
    return (np.where(value >> (bits - 1) & 1, value - (1 << bits), value) & 0xFFFFFFFF).astype(np.uint32)


def placed(value: np.ndarray, part: str, old: np.ndarray, preserve: bool) -> np.ndarray:
    if part == "DWORD":
        return value
    bits, at = _BITS[part[0]], _BITS[part[0]] * int(part[-1])
    mask = np.uint32((1 << bits) - 1 << at)
    return (old & ~mask if preserve else np.uint32(0)) | (value << np.uint32(at) & mask)


def test_sdwa() -> None:
    a, b = words(5), words(6)
    bodies, expected = {}, {}
    for part, other in [
        ("BYTE_0", "BYTE_3"),
        ("BYTE_1", "WORD_1"),
        ("BYTE_2", "DWORD"),
        ("WORD_0", "BYTE_2"),
        ("WORD_1", "WORD_0"),
        ("DWORD", "BYTE_1"),
    ]:
        for unused in ("UNUSED_PAD", "UNUSED_PRESERVE"):
            name = f"{part} {other} {unused}"
            bodies[name] = (
                f"  v_add_u32_sdwa v8, v2, v3 dst_sel:{other} dst_unused:{unused} "
                f"src0_sel:{part} src1_sel:{other}\n"
            )
            expected[name] = placed(PARTS[part](a) + PARTS[other](b), other, b, unused == "UNUSED_PRESERVE")
        bodies[f"sext {part}"] = f"  v_mov_b32_sdwa v8, sext(v2) dst_sel:DWORD src0_sel:{part}\n"
        expected[f"sext {part}"] = extended(PARTS[part](a), part)
    bodies["compare"] = (
        "  v_cmp_lt_u32_sdwa s[20:21], v2, v3 src0_sel:BYTE_1 src1_sel:BYTE_2\n"
        "  v_cndmask_b32 v8, 0, 1, s[20:21]\n"
    )
    expected["compare"] = (PARTS["BYTE_1"](a) < PARTS["BYTE_2"](b)).astype(np.uint32)
    bodies["compare to vcc"] = (
        "  v_cmp_eq_u32_sdwa vcc, v2, v2 src0_sel:BYTE_1 src1_sel:BYTE_1\n  v_cndmask_b32 v8, 0, 1, vcc\n"
    )
    expected["compare to vcc"] = np.ones(LANES, np.uint32)
    bodies["half to float"] = "  v_cvt_f32_f16_sdwa v8, v2 dst_sel:DWORD src0_sel:WORD_1\n"
    expected["half to float"] = a.view(np.float16)[1::2].astype(np.float32).view(np.uint32)
    bodies["scalar"] = (
        "  s_mov_b32 s20, 0x01020304\n"
        "  v_or_b32_sdwa v8, s20, v3 dst_sel:DWORD src0_sel:BYTE_2 src1_sel:DWORD\n"
    )
    expected["scalar"] = b | 2
    for name, (first, _) in results(bodies, a, b).items():
        nan = np.isnan(expected[name].view(np.float32)) & np.isnan(first.view(np.float32))
        assert ((first == expected[name]) | (nan & (name == "half to float"))).all(), name


def test_halves_in_vop3() -> None:
    """op_sel takes the upper half of an operand, and writes the upper half of the result."""
    a, b = words(7), words(8)
    bodies = {
        "source": "  v_mad_u16 v8, v2, v3, v3 op_sel:[1,0,1,0]\n",
        "result": "  v_mad_u16 v8, v2, v3, v3 op_sel:[0,1,0,1]\n",
        "zeroing": "  v_add_u16 v8, v2, v3\n",
        "fp8 high": "  v_cvt_pk_fp8_f32 v8, 1.0, 2.0 op_sel:[0,0,1]\n",
        "fp8 byte": "  v_cvt_sr_fp8_f32 v8, 1.0, 0 op_sel:[0,0,1,1]\n",
        "from fp8": "  v_mov_b32 v8, 0x40003800\n  v_cvt_scalef32_f32_fp8 v8, v8, 1.0 op_sel:[1,0,0]\n",
    }
    low, high = (lambda x: x & np.uint32(0xFFFF)), (lambda x: x >> np.uint32(16))
    expected = {
        "source": (b & np.uint32(0xFFFF0000)) | low(high(a) * low(b) + high(b)),
        "result": low(b) | low(low(a) * high(b) + low(b)) << np.uint32(16),
        "zeroing": low(low(a) + low(b)),
        "fp8 high": low(b) | np.uint32(0x40380000),
        "fp8 byte": (b & np.uint32(0xFFFFFF)) | np.uint32(0x38000000),
        "from fp8": np.full(LANES, 0x3F800000, np.uint32),
    }
    for name, (first, _) in results(bodies, a, b).items():
        assert (first == expected[name]).all(), name


# -- permutations -----------------------------------------------------------------------------------------

PERMUTED = (LANE * 5 + 3) % 64


def test_lds_exchanges() -> None:
    a, b = words(9), words(10)
    index = "  v_mul_u32_u24 v4, 5, v0\n  v_add_lshl_u32 v4, v4, 3, 2\n"
    half = "  s_mov_b32 exec_lo, 0xffff\n  s_mov_b32 exec_hi, 0\n"
    bodies = {
        "bpermute": index + "  ds_bpermute_b32 v8, v4, v2\n",
        "bpermute offset": index + "  ds_bpermute_b32 v8, v4, v2 offset:8\n",
        "bpermute partial": index + half + "  ds_bpermute_b32 v8, v4, v2\n",
        "permute": index + "  ds_permute_b32 v8, v4, v2\n",
        "permute partial": index + half + "  ds_permute_b32 v8, v4, v2\n",
        "swizzle xor": "  ds_swizzle_b32 v8, v2 offset:swizzle(SWAP,16)\n",
        "swizzle broadcast": "  ds_swizzle_b32 v8, v2 offset:swizzle(BROADCAST,8,3)\n",
        "swizzle bits": '  ds_swizzle_b32 v8, v2 offset:swizzle(BITMASK_PERM, "01p0i")\n',
        "swizzle quad": "  ds_swizzle_b32 v8, v2 offset:swizzle(QUAD_PERM, 3, 1, 0, 2)\n",
    }
    inside = PERMUTED < 16
    scattered = np.zeros(LANES, np.uint32)
    scattered[PERMUTED] = a
    few = np.zeros(LANES, np.uint32)
    few[PERMUTED[:16]] = a[:16]
    expected = {
        "bpermute": a[PERMUTED],
        "bpermute offset": a[(PERMUTED + 2) % 64],
        "bpermute partial": np.where(LANE < 16, np.where(inside, a[PERMUTED], 0), b),
        "permute": scattered,
        "permute partial": np.where(LANE < 16, few, b),
        "swizzle xor": a[LANE ^ 16],
        "swizzle broadcast": a[LANE // 8 * 8 + 3],
        "swizzle bits": a[(LANE & 32) | ((LANE & 0b00101 | 0b01000) ^ 0b00001)],
        "swizzle quad": a[LANE // 4 * 4 + np.array([3, 1, 0, 2])[LANE % 4]],
    }
    for name, (first, _) in results(bodies, a, b).items():
        assert (first == expected[name]).all(), name


def test_vector_exchanges() -> None:
    a, b = words(11), words(12)
    bodies = {
        "swap16": "  v_permlane16_swap_b32 v8, v9\n",
        "swap32": "  v_permlane32_swap_b32 v8, v9\n",
        "swap": "  v_swap_b32 v8, v9\n",
        "readfirstlane": "  v_readfirstlane_b32 s20, v2\n  v_mov_b32 v8, s20\n",
        "readfirstlane partial": "  s_mov_b32 exec_lo, 0xff000\n"
        "  v_readfirstlane_b32 s20, v2\n  v_mov_b32 v8, s20\n",
        "readlane": "  s_mov_b32 s21, 37\n  v_readlane_b32 s20, v2, s21\n  v_mov_b32 v8, s20\n",
        "writelane": "  s_mov_b32 s20, 7\n  v_writelane_b32 v8, s20, 40\n",
        "accumulation": "  v_accvgpr_write_b32 a2, v2\n  v_accvgpr_mov_b32 a5, a2\n"
        "  s_nop 4\n  v_accvgpr_read_b32 v8, a5\n",
        "accumulation constant": "  v_accvgpr_write_b32 a3, 1.0\n  s_nop 4\n  v_accvgpr_read_b32 v8, a3\n",
    }
    even, odd = LANE // 16 % 2 == 0, LANE // 16 % 2 == 1
    expected = {
        "swap16": (np.where(odd, a[LANE - 16], b), np.where(even, b[(LANE + 16) % 64], a)),
        "swap32": (np.where(LANE >= 32, a[LANE - 32], b), np.where(LANE < 32, b[(LANE + 32) % 64], a)),
        "swap": (a, b),
        "readfirstlane": (np.full(LANES, a[0]), a),
        "readfirstlane partial": (np.where(np.isin(LANE, [*range(12, 20), *range(32, 64)]), a[12], b), a),
        "readlane": (np.full(LANES, a[37]), a),
        "writelane": (np.where(LANE == 40, 7, b), a),
        "accumulation": (a, a),
        "accumulation constant": (np.full(LANES, 0x3F800000), a),
    }
    for name, (first, second) in results(bodies, a, b).items():
        wanted = expected[name]
        assert (first == wanted[0]).all() and (second == wanted[1]).all(), name


@pytest.mark.parametrize("body", ["  v_mov_b32_dpp v8, v20 row_shr:1 row_mask:0xf bank_mask:0xf\n"])
def test_an_undefined_lane_spreads(body: str) -> None:
    with pytest.raises(gfx950.Undefined, match="stored to memory"):
        results({"undefined": body}, words(1), words(2))
