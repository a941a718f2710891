"""Every memory and LDS instruction of the gfx950 executor against NumPy views of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from tests.gfx950.gfx950_kernels import Assembly, assemble
from tools import gfx950

LANES, SLOT = 64, 32  # a lane has 32 bytes of its own

# name: bytes, then what becomes of them: zero-extended, sign-extended, or one half of a register.
LOADS = {
    "ubyte": (1, "zero"),
    "sbyte": (1, "sign"),
    "ushort": (2, "zero"),
    "sshort": (2, "sign"),
    "dword": (4, "zero"),
    "dwordx2": (8, "zero"),
    "dwordx3": (12, "zero"),
    "dwordx4": (16, "zero"),
    "ubyte_d16": (1, "low"),
    "ubyte_d16_hi": (1, "high"),
    "sbyte_d16": (1, "low sign"),
    "sbyte_d16_hi": (1, "high sign"),
    "short_d16": (2, "low"),
    "short_d16_hi": (2, "high"),
}
STORES = {
    "byte": (1, 0),
    "short": (2, 0),
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "byte_d16_hi": (1, 2),
    "short_d16_hi": (2, 2),
}
LDS_LOADS = {
    "u8": LOADS["ubyte"],
    "i8": LOADS["sbyte"],
    "u16": LOADS["ushort"],
    "i16": LOADS["sshort"],
    "b32": LOADS["dword"],
    "b64": LOADS["dwordx2"],
    "b96": LOADS["dwordx3"],
    "b128": LOADS["dwordx4"],
    "u8_d16": LOADS["ubyte_d16"],
    "u8_d16_hi": LOADS["ubyte_d16_hi"],
    "i8_d16": LOADS["sbyte_d16"],
    "i8_d16_hi": LOADS["sbyte_d16_hi"],
    "u16_d16": LOADS["short_d16"],
    "u16_d16_hi": LOADS["short_d16_hi"],
}
LDS_STORES = {
    "b8": (1, 0),
    "b16": (2, 0),
    "b32": (4, 0),
    "b64": (8, 0),
    "b96": (12, 0),
    "b128": (16, 0),
    "b8_d16_hi": (1, 2),
    "b16_d16_hi": (2, 2),
}

# s[4:5]: bytes to read; s[6:7]: bytes to write; v1: the lane's slot; v[2:3], v[4:5]: its addresses in both.
_START = """
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  v_lshlrev_b32 v1, 5, v0
  v_mov_b32 v20, 0
  s_waitcnt lgkmcnt(0)
  v_mov_b32 v2, s4
  v_mov_b32 v3, s5
  v_add_co_u32 v2, vcc, v2, v1
  v_addc_co_u32 v3, vcc, 0, v3, vcc
  v_mov_b32 v4, s6
  v_mov_b32 v5, s7
  v_add_co_u32 v4, vcc, v4, v1
  v_addc_co_u32 v5, vcc, 0, v5, vcc
  s_mov_b32 s12, s4
  s_mov_b32 s13, s5
  s_mov_b32 s14, 2048
  s_mov_b32 s15, 0x27000
  s_mov_b32 s16, s6
  s_mov_b32 s17, s7
  s_mov_b32 s18, 2048
  s_mov_b32 s19, 0x27000
  v_mov_b32 v8, 0x11111111
  v_mov_b32 v9, 0x22222222
  v_mov_b32 v10, 0x33333333
  v_mov_b32 v11, 0x44444444
"""
_STORE_ALL = "  s_waitcnt vmcnt(0) lgkmcnt(0)\n  global_store_dwordx4 v[4:5], v[8:11], off\n"
_FILL = """
  global_load_dwordx4 v[12:15], v1, s[4:5]
  global_load_dwordx4 v[16:19], v1, s[4:5] offset:16
  s_waitcnt vmcnt(0)
"""
_FILL_SCRATCH = (
    _FILL
    + "  scratch_store_dwordx4 off, v[12:15], off\n  scratch_store_dwordx4 off, v[16:19], off offset:16\n"
)
_FILL_LDS = _FILL + "  ds_write_b128 v1, v[12:15]\n  ds_write_b128 v1, v[16:19] offset:16\n"

OFFSET = 5  # bytes: nothing but atomics and scalar loads needs alignment


def registers(first: int, size: int) -> str:
    last = first + max(1, size // 4) - 1
    return f"v{first}" if last == first else f"v[{first}:{last}]"


def load_bodies() -> dict[str, tuple[str, int, str]]:
    """name: (body, bytes, extension) of every load of every address space."""
    bodies = {}
    for name, (size, how) in LOADS.items():
        d = registers(8, size)
        forms = {
            f"global_load_{name}": f"global_load_{name} {d}, v1, s[4:5] offset:{OFFSET}",
            f"global_load_{name} off": f"global_load_{name} {d}, v[2:3], off offset:{OFFSET}",
            f"flat_load_{name}": f"flat_load_{name} {d}, v[2:3] offset:{OFFSET}",
            f"buffer_load_{name}": f"buffer_load_{name} {d}, v1, s[12:15], 0 offen offset:{OFFSET}",
        }
        bodies |= {form: (f"  {text}\n", size, how) for form, text in forms.items()}
        scratch = f"  s_mov_b32 s20, {OFFSET}\n  v_mov_b32 v21, 0\n  s_waitcnt vmcnt(0)\n"
        for form, text in {
            "": f"scratch_load_{name} {d}, off, off offset:{OFFSET}",
            " saddr": f"scratch_load_{name} {d}, off, s20",
            " vaddr": f"scratch_load_{name} {d}, v21, off offset:{OFFSET}",
        }.items():
            bodies[f"scratch_load_{name}{form}"] = (_FILL_SCRATCH + scratch + f"  {text}\n", size, how)
    for name, (size, how) in LDS_LOADS.items():
        text = f"  ds_read_{name} {registers(8, size)}, v1 offset:{OFFSET}\n"
        bodies[f"ds_read_{name}"] = (_FILL_LDS + text, size, how)
    return bodies


def expected_load(data: np.ndarray, size: int, how: str) -> np.ndarray:
    """The four result registers of every lane."""
    out = np.tile(np.array([0x11111111, 0x22222222, 0x33333333, 0x44444444], np.uint32), (LANES, 1))
    chosen = np.ascontiguousarray(data[:, OFFSET : OFFSET + size])
    if size >= 4:
        out[:, : size // 4] = chosen.view(np.uint32)
        return out
    value = chosen.view(f"{'i' if 'sign' in how else 'u'}{size}")[:, 0].astype(np.int64)
    if "low" in how:
        out[:, 0] = 0x11110000 | (value & 0xFFFF)
    elif "high" in how:
        out[:, 0] = 0x1111 | (value & 0xFFFF) << 16
    else:
        out[:, 0] = value & 0xFFFFFFFF
    return out


def run(kernel: gfx950.Kernel, data: np.ndarray, out: np.ndarray) -> gfx950.Statistics:
    memory = gfx950.Memory()
    pointers = [memory.add_array(data, writable=False), memory.add_array(out)]
    return gfx950.execute(kernel, (1,), (LANES,), pointers, memory)


def bytes_of(seed: int) -> np.ndarray:
    return (
        np.frombuffer(np.random.default_rng(seed).bytes(LANES * SLOT), np.uint8).reshape(LANES, SLOT).copy()
    )


def kernels(bodies: dict[str, str]) -> dict[str, gfx950.Kernel]:
    options = {"pointers": 2, "lds": LANES * SLOT, "scratch": SLOT}
    code = assemble([Assembly(f"k{i}", _START + body, **options) for i, body in enumerate(bodies.values())])
    return {name: code.kernel(f"k{i}") for i, name in enumerate(bodies)}


def test_loads() -> None:
    bodies = load_bodies()
    built = kernels({name: body + _STORE_ALL for name, (body, _, _) in bodies.items()})
    data = bytes_of(1)
    for name, (_, size, how) in bodies.items():
        out = np.zeros((LANES, SLOT // 4), np.uint32)
        run(built[name], data, out)
        assert (out[:, :4] == expected_load(data, size, how)).all(), name


def test_stores() -> None:
    bodies, sizes = {}, {}
    for name, (size, skip) in STORES.items():
        d = registers(12, size)
        forms = {
            f"global_store_{name}": f"global_store_{name} v1, {d}, s[6:7] offset:{OFFSET}",
            f"flat_store_{name}": f"flat_store_{name} v[4:5], {d} offset:{OFFSET}",
            f"buffer_store_{name}": f"buffer_store_{name} {d}, v1, s[16:19], 0 offen offset:{OFFSET}",
            f"scratch_store_{name}": f"scratch_store_{name} off, {d}, off offset:{OFFSET}\n"
            "  s_waitcnt vmcnt(0)\n  scratch_load_dwordx4 v[8:11], off, off\n  s_waitcnt vmcnt(0)\n"
            "  global_store_dwordx4 v[4:5], v[8:11], off",
        }
        bodies |= {form: _fill_with_ones(form) + _FILL + f"  {text}\n" for form, text in forms.items()}
        sizes |= dict.fromkeys(forms, (size, skip))
    for name, (size, skip) in LDS_STORES.items():
        text = (
            f"  ds_write_{name} v1, {registers(12, size)} offset:{OFFSET}\n  ds_read_b128 v[8:11], v1\n"
            + _STORE_ALL
        )
        bodies[f"ds_write_{name}"] = _fill_with_ones("ds") + _FILL + text
        sizes[f"ds_write_{name}"] = (size, skip)
    built, data = kernels(bodies), bytes_of(2)
    for name, (size, skip) in sizes.items():
        out = np.full((LANES, SLOT), 0xFF, np.uint8)
        run(built[name], data, out)
        expected = np.full((LANES, SLOT), 0xFF, np.uint8)
        expected[:, OFFSET : OFFSET + size] = data[:, skip : skip + size]
        shown = 16 if name.startswith(("scratch", "ds")) else SLOT
        assert (out[:, :shown] == expected[:, :shown]).all(), name


def _fill_with_ones(form: str) -> str:
    ones = "".join(f"  v_mov_b32 v{i}, -1\n" for i in range(12, 16))
    if form.startswith("scratch"):
        return ones + "".join(f"  scratch_store_dwordx4 off, v[12:15], off offset:{o}\n" for o in (0, 16))
    if form.startswith("ds"):
        return ones + "".join(f"  ds_write_b128 v1, v[12:15] offset:{o}\n" for o in (0, 16))
    return ""


def test_pairs_of_lds() -> None:
    """Two offsets, in units of the element, or of 64 of them."""
    bodies = {
        "read2_b32": "  ds_read2_b32 v[8:9], v1 offset0:1 offset1:3\n",
        "read2_b64": "  ds_read2_b64 v[8:11], v1 offset0:1 offset1:2\n",
        "read2st64_b32": "  v_lshlrev_b32 v21, 2, v0\n  ds_read2st64_b32 v[8:9], v21 offset0:1 offset1:2\n",
        "read2st64_b64": "  v_lshlrev_b32 v21, 3, v0\n  ds_read2st64_b64 v[8:11], v21 offset0:1 offset1:2\n",
        "write2_b32": "  ds_write2_b32 v1, v17, v18 offset0:1 offset1:3\n  ds_read_b128 v[8:11], v1\n",
        "write2_b64": "  ds_write2_b64 v1, v[16:17], v[18:19] offset0:1\n  ds_read_b128 v[8:11], v1\n",
        "write2st64_b32": "  v_lshlrev_b32 v21, 2, v0\n"
        "  ds_write2st64_b32 v21, v16, v17 offset0:1 offset1:2\n"
        "  ds_read2st64_b32 v[8:9], v21 offset0:2 offset1:1\n",
        "write2st64_b64": "  v_lshlrev_b32 v21, 3, v0\n"
        "  ds_write2st64_b64 v21, v[16:17], v[18:19] offset0:1 offset1:2\n"
        "  ds_read2st64_b64 v[8:11], v21 offset0:2 offset1:1\n",
        "overlapping": "  v_mov_b32 v8, v1\n  ds_read2_b32 v[8:9], v8 offset0:1 offset1:3\n",
    }
    built = kernels({name: _FILL_LDS + body + _STORE_ALL for name, body in bodies.items()})
    data = bytes_of(3)
    words, flat4, flat8 = (
        data.view(np.uint32),
        data.view(np.uint32).reshape(-1),
        data.view(np.uint64).reshape(-1),
    )
    lane = np.arange(LANES)
    expected = {
        "read2_b32": words[:, [1, 3]],
        "read2_b64": words[:, [2, 3, 4, 5]],
        "read2st64_b32": np.stack([flat4[lane + 64], flat4[lane + 128]], 1),
        "read2st64_b64": np.stack([flat8[lane + 64], flat8[lane + 128]], 1).view(np.uint32),
        "write2_b32": np.stack([words[:, 0], words[:, 5], words[:, 2], words[:, 6]], 1),
        "write2_b64": words[:, [6, 7, 4, 5]],
        "write2st64_b32": words[:, [5, 4]],
        "write2st64_b64": words[:, [6, 7, 4, 5]],
        "overlapping": words[:, [1, 3]],
    }
    for name, kernel in built.items():
        out = np.zeros((LANES, SLOT // 4), np.uint32)
        run(kernel, data, out)
        wanted = expected[name]
        assert (out[:, : wanted.shape[1]] == wanted).all(), name


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.uint16), (8, np.uint8)])
def test_transposing_reads(bits: int, dtype: type) -> None:
    """Sixteen lanes read a matrix with rows of 16; each gets a column."""
    body = _FILL_LDS + f"  v_lshlrev_b32 v21, 3, v0\n  ds_read_b64_tr_b{bits} v[8:9], v21\n" + _STORE_ALL
    out, data = np.zeros((LANES, SLOT // 4), np.uint32), bytes_of(4)
    run(kernels({"tr": body})["tr"], data, out)
    matrices = data.reshape(-1)[: LANES * 8].view(dtype).reshape(4, -1, 16)
    columns = np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(LANES, -1)
    assert (np.ascontiguousarray(out[:, :2]).view(dtype) == columns).all()


def test_transposing_reads_of_nibbles() -> None:
    body = _FILL_LDS + "  v_lshlrev_b32 v21, 3, v0\n  ds_read_b64_tr_b4 v[8:9], v21\n" + _STORE_ALL
    out, data = np.zeros((LANES, SLOT // 4), np.uint32), bytes_of(4)
    run(kernels({"tr": body})["tr"], data, out)

    def nibbles(x: np.ndarray) -> np.ndarray:
        return np.stack([x & 15, x >> 4], -1).reshape(*x.shape[:-1], -1)

    matrices = nibbles(data.reshape(-1)[: LANES * 8].reshape(4, 16, 8))
    got = nibbles(np.ascontiguousarray(out[:, :2]).view(np.uint8)).reshape(4, 16, 16)
    assert (got == matrices.transpose(0, 2, 1)).all()


# -- scalar loads, LDS filled straight from memory, buffers ------------------------------------------------


def test_scalar_loads() -> None:
    bodies, expected, data = {}, {}, bytes_of(5)
    words = data.view(np.uint32).reshape(-1)
    for count, suffix in [(1, ""), (2, "x2"), (4, "x4"), (8, "x8"), (16, "x16")]:
        target = "s32" if count == 1 else f"s[32:{31 + count}]"
        for base, prefix in (("s[4:5]", "s_load"), ("s[12:15]", "s_buffer_load")):
            for form, address, first in [
                ("imm", "0x14", 5),
                ("sgpr", "s20", 7),
                ("both", "s20 offset:0x8", 9),
            ]:
                name = f"{prefix}_dword{suffix} {form}"
                moves = "".join(f"  v_mov_b32 v{8 + i}, s{32 + i}\n" for i in range(min(4, count)))
                text = f"  s_mov_b32 s20, 28\n  {prefix}_dword{suffix} {target}, {base}, {address}\n"
                moves += f"  v_mov_b32 v{7 + min(4, count)}, s{31 + count}\n"
                bodies[name] = text + "  s_waitcnt lgkmcnt(0)\n" + moves + _STORE_ALL
                expected[name] = [*words[first : first + min(4, count) - 1], words[first + count - 1]]
    for name, kernel in kernels(bodies).items():
        out = np.zeros((LANES, SLOT // 4), np.uint32)
        run(kernel, data, out)
        assert (out[:, : len(expected[name])] == expected[name]).all(), name


def test_loads_to_lds() -> None:
    """Lanes' data lie side by side from M0 on, in units of a dword at least."""
    bodies, sizes = {}, {"ubyte": 1, "ushort": 2, "dword": 4, "dwordx3": 12, "dwordx4": 16}
    for name, size in sizes.items():
        step = max(4, size)
        text = f"  s_mov_b32 m0, 64\n  global_load_lds_{name} v[2:3], off\n  s_waitcnt vmcnt(0)\n"
        text += (
            f"  v_mul_u32_u24 v21, {step}, v0\n  ds_read_b{8 * step} {registers(8, step)}, v21 offset:64\n"
        )
        bodies[name] = text + _STORE_ALL
    data = bytes_of(6)
    for name, kernel in kernels(bodies).items():
        out = np.zeros((LANES, SLOT), np.uint8)
        run(kernel, data, out)
        size = sizes[name]
        assert (out[:, :size] == data[:, :size]).all(), name
        assert not out[:, size : max(4, size)].any(), name


def test_buffer_bounds() -> None:
    """Beyond num_records a load gives zero and a store does nothing; index times stride is added."""
    body = """
  s_mov_b32 s14, 1000
  buffer_load_dwordx4 v[8:11], v1, s[12:15], 0 offen
  s_waitcnt vmcnt(0)
  s_mov_b32 s18, 512
  buffer_store_dwordx4 v[8:11], v1, s[16:19], 0 offen
"""
    strided = (
        """
  s_or_b32 s13, s13, 0x200000
  s_mov_b32 s14, 40
  buffer_load_dword v8, v0, s[12:15], 0 idxen offset:4
"""
        + _STORE_ALL
    )
    data, built = bytes_of(7), kernels({"raw": body, "strided": strided})
    out = np.full((LANES, SLOT), 0xEE, np.uint8)
    run(built["raw"], data, out)
    expected = np.full((LANES, SLOT), 0xEE, np.uint8)
    expected[:16, :16] = data[:16, :16]
    assert (out == expected).all()
    out = np.zeros((LANES, SLOT // 4), np.uint32)
    run(built["strided"], data, out)
    assert (out[:, 0] == np.where(np.arange(LANES) < 40, data.view(np.uint32)[:, 1], 0)).all()


def test_buffer_bounds_cut_by_the_dword() -> None:
    """Of an access that the end goes through, what is before the end is done."""
    body = """
  s_movk_i32 s14, {records}
  buffer_load_dwordx4 v[8:11], v1, s[12:15], 0 offen
  s_waitcnt vmcnt(0)
  s_movk_i32 s18, {records}
  buffer_store_dwordx4 v[8:11], v1, s[16:19], 0 offen
"""
    data, ends = bytes_of(7), [3 * SLOT + left for left in (0, 3, 4, 11, 12, 16)]
    built = kernels({f"to{records}": body.format(records=records) for records in ends})
    for records in ends:
        out = np.full((LANES, SLOT), 0xEE, np.uint8)
        run(built[f"to{records}"], data, out)
        expected, end = np.full((LANES, SLOT), 0xEE, np.uint8), (records - 3 * SLOT) // 4 * 4
        expected[:3, :16] = data[:3, :16]
        expected[3, :end] = data[3, :end]
        assert (out == expected).all(), records


def test_buffer_offsets_wrap_before_the_bounds_are_checked() -> None:
    """A lane's offset may be negative: it wraps with the instruction's, not with the scalar one."""
    load = "  v_add_u32 v20, 0xfffffff0, v1\n  buffer_load_dword v8, v20, s[12:15], {}\n" + _STORE_ALL
    built = kernels(
        {
            "instruction": load.format("0 offen offset:20"),
            "scalar": "  s_movk_i32 s20, 16\n" + load.format("s20 offen offset:4"),
        }
    )
    data, out = bytes_of(11), np.zeros((LANES, SLOT // 4), np.uint32)
    run(built["instruction"], data, out)
    assert (out[:, 0] == data.view(np.uint32)[:, 1]).all()
    run(built["scalar"], data, out)
    assert out[0, 0] == 0
    assert (out[1:, 0] == data.view(np.uint32)[1:, 1]).all()


def test_flat_reaches_lds_and_scratch() -> None:
    body = (
        _FILL_LDS
        + _FILL_SCRATCH
        + """
  s_waitcnt vmcnt(0) lgkmcnt(0)
  s_mov_b64 s[20:21], src_shared_base
  v_mov_b32 v22, v1
  v_mov_b32 v23, s21
  flat_load_dwordx2 v[8:9], v[22:23]
  s_mov_b64 s[20:21], src_private_base
  v_mov_b32 v24, 0
  v_mov_b32 v25, s21
  flat_load_dwordx2 v[10:11], v[24:25] offset:8
"""
        + _STORE_ALL
    )
    out, data = np.zeros((LANES, SLOT // 4), np.uint32), bytes_of(8)
    run(kernels({"flat": body})["flat"], data, out)
    assert (out[:, :4] == data.view(np.uint32)[:, :4]).all()


def test_statistics_count_bytes() -> None:
    built = kernels({"copy": "  global_load_dwordx4 v[8:11], v[2:3], off\n" + _STORE_ALL})
    statistics = run(built["copy"], bytes_of(9), np.zeros((LANES, SLOT), np.uint8))
    assert statistics.bytes_loaded == 64 * 16 + 16 and statistics.bytes_stored == 64 * 16
    assert (
        statistics.instructions["GLOBAL_LOAD_DWORDX4"] == 1 and statistics.lanes["GLOBAL_STORE_DWORDX4"] == 64
    )
    assert statistics.by_work["load"] == statistics.by_work["store"] == 1


# -- atomics ----------------------------------------------------------------------------------------------

Atomic = Callable[[int, int, int], int]  # what was there, the operand, what is compared with


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def of_signed(function: Callable[[int, int], int]) -> Callable[[int], Atomic]:
    return lambda bits: lambda old, data, _: function(signed(old, bits), signed(data, bits))


INTEGER_ATOMICS: dict[str, Callable[[int], Atomic]] = {
    "swap": lambda bits: lambda old, data, _: data,
    "cmpswap": lambda bits: lambda old, data, compare: data if old == compare else old,
    "add": lambda bits: lambda old, data, _: old + data,
    "sub": lambda bits: lambda old, data, _: old - data,
    "smin": of_signed(min),
    "smax": of_signed(max),
    "umin": lambda bits: lambda old, data, _: min(old, data),
    "umax": lambda bits: lambda old, data, _: max(old, data),
    "and": lambda bits: lambda old, data, _: old & data,
    "or": lambda bits: lambda old, data, _: old | data,
    "xor": lambda bits: lambda old, data, _: old ^ data,
    "inc": lambda bits: lambda old, data, _: 0 if old >= data else old + 1,
    "dec": lambda bits: lambda old, data, _: data if old == 0 or old > data else old - 1,
}
_LDS_NAMES = {"smin": "min_i", "smax": "max_i", "umin": "min_u", "umax": "max_u"}
_LDS_NAMES |= {name: f"{name}_u" for name in ("add", "sub", "inc", "dec")}
_LDS_NAMES |= {name: f"{name}_b" for name in ("and", "or", "xor")}

# In a lane's slot: the operand and what is compared with first, from byte 16 on what is there before.
_ATOMIC_START = _FILL + "  global_store_dwordx4 v1, v[16:19], s[6:7] offset:16\n  s_waitcnt vmcnt(0)\n"


def float_atomics() -> dict[str, tuple[str, int, Callable[[np.ndarray, np.ndarray], np.ndarray]]]:
    """suffix: (LDS name, bytes, function of what was there and the operand)."""

    def of(dtype: type, function: Callable) -> Callable:
        return lambda old, data: function(old.view(dtype), data.view(dtype)).astype(dtype).view(old.dtype)

    def pairs(dtype: type) -> Callable:
        return lambda old, data: (
            (old.view(dtype).astype(np.float32) + data.view(dtype).astype(np.float32))
            .astype(dtype)
            .view(old.dtype)
        )

    return {
        "add_f32": ("add_f32", 4, of(np.float32, np.add)),
        "add_f64": ("add_f64", 8, of(np.float64, np.add)),
        "min_f64": ("min_f64", 8, of(np.float64, np.fmin)),
        "max_f64": ("max_f64", 8, of(np.float64, np.fmax)),
        "pk_add_f16": ("pk_add_f16", 4, pairs(np.float16)),
        "pk_add_bf16": ("pk_add_bf16", 4, pairs(ml_dtypes.bfloat16)),
    }


def atomic_forms(name: str, lds: str, size: int, compares: bool) -> dict[str, str]:
    """The instruction in every space, returning what was there in v8 (and v9)."""
    d, data = registers(8, size), registers(12, size)
    both = f"v[12:{11 + size // 2}]" if compares else data
    forms = {
        f"global_atomic_{name}": f"  global_atomic_{name} {d}, v1, {both}, s[6:7] offset:16 sc0\n",
        f"flat_atomic_{name}": f"  flat_atomic_{name} {d}, v[4:5], {both} offset:16 sc0\n",
        f"buffer_atomic_{name}": f"  buffer_atomic_{name} {both}, v1, s[16:19], 0 offen offset:16 sc0\n"
        + "  s_waitcnt vmcnt(0)\n"
        + "".join(f"  v_mov_b32 v{8 + i}, v{12 + i}\n" for i in range(size // 4)),
    }
    if lds:
        second = registers(12 + size // 4, size)
        operands = f"{second}, {data}" if compares else data
        back = "  s_waitcnt lgkmcnt(0)\n  ds_read_b64 v[16:17], v1 offset:16\n  s_waitcnt lgkmcnt(0)\n"
        back += "  global_store_dwordx2 v1, v[16:17], s[6:7] offset:16\n"
        write = "  ds_write_b128 v1, v[16:19] offset:16\n"
        forms[f"ds_{lds}"] = write + f"  ds_{lds} {d}, v1, {operands} offset:16\n" + back
        plain = lds.replace("_rtn", "")
        if plain != lds and "xchg" not in lds:
            forms[f"ds_{plain}"] = write + f"  ds_{plain} v1, {operands} offset:16\n" + back
    return forms


def atomic_data(size: int) -> np.ndarray:
    data = bytes_of(10)
    values = data.view(f"u{size}")
    values[:16, 16 // size] = values[:16, 1]  # equal to what is compared with
    values[16:24, 16 // size] = 0
    values[24:40, [0, 16 // size]] %= 7
    return data


def lds_name(name: str, bits: int) -> str:
    if name == "swap":
        return f"wrxchg_rtn_b{bits}"
    if name == "cmpswap":
        return f"cmpst_rtn_b{bits}"
    operation, _, kind = _LDS_NAMES[name].partition("_")
    return f"{operation}_rtn_{kind}{bits}"


@pytest.mark.parametrize("bits", [32, 64])
def test_integer_atomics(bits: int) -> None:
    size, suffix = bits // 8, "" if bits == 32 else "_x2"
    bodies, functions = {}, {}
    for name, function in INTEGER_ATOMICS.items():
        forms = atomic_forms(name + suffix, lds_name(name, bits), size, name == "cmpswap")
        bodies |= {form: _ATOMIC_START + body + _STORE_ALL for form, body in forms.items()}
        functions |= dict.fromkeys(forms, function(bits))
    reverse = {f"ds_rsub_{rtn}u{bits}": lambda old, data, _: data - old for rtn in ("", "rtn_")}
    for name in reverse:
        form = atomic_forms("add", f"rsub_rtn_u{bits}", size, False)[name]
        bodies[name] = _ATOMIC_START + form + _STORE_ALL
    functions |= reverse
    built, data = kernels(bodies), atomic_data(size)
    values = data.view(f"u{size}").astype(object)
    for name, function in functions.items():
        out = np.zeros((LANES, SLOT), np.uint8)
        run(built[name], data, out)
        result = out.view(f"u{size}")
        old = values[:, 16 // size]
        wanted = [function(o, row[0], row[1]) & (1 << bits) - 1 for o, row in zip(old, values, strict=True)]
        assert (result[:, 16 // size] == np.array(wanted, f"u{size}")).all(), name
        returned = name.startswith("ds_") and "rtn" not in name
        assert returned or (result[:, 0] == old.astype(f"u{size}")).all(), name


def test_float_atomics() -> None:
    bodies, checks = {}, {}
    table = float_atomics()
    for name, (lds, size, function) in table.items():
        operation = lds.replace("_f", "_rtn_f").replace("_bf16", "_rtn_bf16")
        forms = atomic_forms(name, operation, size, False)
        bodies |= {form: _ATOMIC_START + body + _STORE_ALL for form, body in forms.items()}
        checks |= dict.fromkeys(forms, (size, function))
    for name, function in (("min", np.fmin), ("max", np.fmax)):
        forms = atomic_forms("add_f32", f"{name}_rtn_f32", 4, False)
        only = {form: body for form, body in forms.items() if form.startswith("ds_")}
        bodies |= {form: _ATOMIC_START + body + _STORE_ALL for form, body in only.items()}
        checks |= dict.fromkeys(
            only,
            (4, lambda old, data, f=function: f(old.view(np.float32), data.view(np.float32)).view(old.dtype)),
        )
    built = kernels(bodies)
    generator = np.random.default_rng(11)
    for name, (size, function) in checks.items():
        dtype = {4: np.float32, 8: np.float64}[size]
        if "pk" in name:
            dtype = ml_dtypes.bfloat16 if "bf16" in name else np.float16
        data = (
            generator.standard_normal((LANES, SLOT // np.dtype(dtype).itemsize)).astype(dtype).view(np.uint8)
        )
        out = np.zeros((LANES, SLOT), np.uint8)
        run(built[name], data, out)
        code = f"u{size}"
        values, result = data.view(code), out.view(code)
        wanted = function(np.ascontiguousarray(values[:, 16 // size]), np.ascontiguousarray(values[:, 0]))
        assert (result[:, 16 // size] == wanted).all(), name


def test_atomics_of_all_lanes_add_up() -> None:
    body = "  v_mov_b32 v21, 0\n  v_add_u32 v22, 1, v0\n"
    body += "  global_atomic_add v8, v21, v22, s[6:7] sc0\n  s_waitcnt vmcnt(0)\n"
    out = np.zeros((LANES, SLOT // 4), np.uint32)
    run(kernels({"sum": body})["sum"], bytes_of(1), out)
    assert out[0, 0] == sum(range(1, 65))


def test_times_do_not_run_backwards() -> None:
    body = "  s_memtime s[20:21]\n  s_waitcnt lgkmcnt(0)\n  s_memrealtime s[22:23]\n  s_waitcnt lgkmcnt(0)\n"
    body += "".join(f"  v_mov_b32 v{8 + i}, s{20 + i}\n" for i in range(4))
    out = np.zeros((LANES, SLOT // 4), np.uint32)
    run(kernels({"time": body + _STORE_ALL})["time"], bytes_of(1), out)
    first, second = out[0, :4].view(np.uint64).tolist()
    assert 0 < first < second


def test_cache_controls_are_accepted() -> None:
    body = "  buffer_wbl2 sc1\n  s_waitcnt vmcnt(0)\n  buffer_inv sc1\n" + _STORE_ALL
    out = np.zeros((LANES, SLOT // 4), np.uint32)
    run(kernels({"cache": body})["cache"], bytes_of(1), out)
    assert (out[:, 0] == 0x11111111).all()
