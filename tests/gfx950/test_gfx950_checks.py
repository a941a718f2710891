"""What the gfx950 executor catches: a kernel broken on purpose for every check, and what is no kernel."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.gfx950.gfx950_kernels import Assembly, assemble, compile_hip
from tools import gfx950

# s[4:5]: the buffer; v1: four times the work-item.
START = """
  s_load_dwordx2 s[4:5], s[0:1], 0x0
  v_lshlrev_b32 v1, 2, v0
  s_waitcnt lgkmcnt(0)
"""

# name: (what is wrong, words of the message, the body).  256 work-items, a buffer of 1024 bytes, 1024 of LDS.
BROKEN: dict[str, tuple[type[gfx950.ExecutionError], str, str]] = {
    "store_past_the_end": (
        gfx950.OutOfBounds,
        "(?s)a store of 4 bytes .* 1024 bytes past the start .* lane",
        START + "  global_store_dword v1, v0, s[4:5] offset:4",
    ),
    "load_past_the_end": (
        gfx950.OutOfBounds,
        "a load of 16 bytes",
        START + "  global_load_dwordx4 v[4:7], v1, s[4:5]",
    ),
    "store_nowhere": (
        gfx950.OutOfBounds,
        "in no allocation",
        "  v_mov_b32 v2, 0\n  v_mov_b32 v3, 0\n  global_store_dword v[2:3], v0, off offset:64",
    ),
    "lds_past_the_end": (gfx950.OutOfBounds, "LDS address", START + "  ds_write_b32 v1, v0 offset:1024"),
    "scratch_past_the_end": (
        gfx950.OutOfBounds,
        "scratch address 64; a lane has 64",
        START + "  scratch_store_dword off, v0, off offset:64",
    ),
    "store_to_the_arguments": (
        gfx950.ReadOnlyMemory,
        "may only be read",
        START + "  v_mov_b32 v2, 0\n  global_store_dword v2, v0, s[0:1]",
    ),
    "misaligned_atomic": (
        gfx950.Misaligned,
        "no multiple",
        START + "  v_mov_b32 v2, 2\n  global_atomic_add v2, v0, s[4:5]",
    ),
    "misaligned_scalar_load": (
        gfx950.Misaligned,
        "scalar load",
        START + "  s_add_u32 s4, s4, 2\n  s_addc_u32 s5, s5, 0\n  s_load_dword s6, s[4:5], 0x0",
    ),
    "undefined_register_stored": (
        gfx950.Undefined,
        "stored to memory was never defined",
        START + "  v_add_u32 v3, v9, v0\n  global_store_dword v1, v3, s[4:5]",
    ),
    "undefined_half_stored": (
        gfx950.Undefined,
        "byte 2 of 4",
        START + "  v_cvt_f32_u32 v2, v0\n  v_cvt_pk_fp8_f32 v3, v2, v2\n  global_store_dword v1, v3, s[4:5]",
    ),
    "undefined_lds_stored": (
        gfx950.Undefined,
        "stored to memory",
        START + "  ds_read_b32 v3, v1\n  s_waitcnt lgkmcnt(0)\n  global_store_dword v1, v3, s[4:5]",
    ),
    "undefined_memory_stored": (
        gfx950.Undefined,
        "stored to memory",
        START
        + "  global_load_dword v3, v1, s[4:5]\n  s_waitcnt vmcnt(0)\n  global_store_dword v1, v3, s[4:5]",
    ),
    "undefined_scratch_stored": (
        gfx950.Undefined,
        "stored to memory",
        START
        + "  scratch_load_dword v3, off, off\n  s_waitcnt vmcnt(0)\n  global_store_dword v1, v3, s[4:5]",
    ),
    "undefined_address": (gfx950.Undefined, "an address", START + "  global_load_dword v3, v9, s[4:5]"),
    "undefined_branch": (
        gfx950.Undefined,
        "where the program goes",
        START + "  s_cmp_eq_u32 s40, 0\n  s_cbranch_scc1 .Lthere\n  s_nop 0\n.Lthere:",
    ),
    "undefined_exec": (
        gfx950.Undefined,
        "EXEC",
        START + "  v_cmp_gt_u32 vcc, v9, v0\n  s_and_saveexec_b64 s[6:7], vcc",
    ),
    "race_write_read": (
        gfx950.LdsRace,
        "another wave (wrote|read)",
        START
        + "  ds_write_b32 v1, v0\n  s_waitcnt lgkmcnt(0)\n  v_xor_b32 v2, 0x100, v1\n  ds_read_b32 v3, v2\n"
        + "  s_waitcnt lgkmcnt(0)",
    ),
    "race_write_write": (
        gfx950.LdsRace,
        "another wave wrote",
        START + "  v_mov_b32 v2, 0\n  ds_write_b32 v2, v0",
    ),
    "race_read_write": (
        gfx950.LdsRace,
        "another wave read",
        START
        + "  ds_write_b32 v1, v0\n  s_waitcnt lgkmcnt(0)\n  s_barrier\n  v_or_b32 v2, 0x300, v1\n"
        + "  ds_read_b32 v3, v2\n  s_waitcnt lgkmcnt(0)\n  ds_write_b32 v1, v3",
    ),
    "barrier_before_the_store_is_done": (
        gfx950.MissingWait,
        "a barrier before the wave's own LDS stores",
        START + "  ds_write_b32 v1, v0\n  s_barrier",
    ),
    "no_wait_for_a_load": (
        gfx950.MissingWait,
        "v3 .*vmcnt",
        START
        + "  global_store_dword v1, v0, s[4:5]\n  global_load_dword v3, v1, s[4:5]\n  v_add_u32 v4, v3, v3",
    ),
    "wait_for_too_few_loads": (
        gfx950.MissingWait,
        "v4 .*vmcnt",
        START
        + "  global_store_dword v1, v0, s[4:5]\n  global_load_dword v3, v1, s[4:5]\n"
        + "  global_load_dword v4, v1, s[4:5]\n  s_waitcnt vmcnt(1)\n"
        + "  v_add_u32 v5, v3, v3\n  v_add_u32 v5, v4, v4",
    ),
    "no_wait_for_lds": (
        gfx950.MissingWait,
        "v3 .*lgkmcnt",
        START + "  ds_write_b32 v1, v0\n  ds_read_b32 v3, v1\n  v_add_u32 v4, v3, v3",
    ),
    "no_wait_for_a_scalar_load": (
        gfx950.MissingWait,
        "s4 .*lgkmcnt",
        "  s_load_dwordx2 s[4:5], s[0:1], 0x0\n  s_add_u32 s4, s4, 4",
    ),
    "overwritten_by_a_late_load": (
        gfx950.MissingWait,
        "v3 ",
        START + "  global_store_dword v1, v0, s[4:5]\n  global_load_dword v3, v1, s[4:5]\n  v_mov_b32 v3, 0",
    ),
    "endless_loop": (gfx950.BudgetExceeded, "endless loop", "\n.Lloop:\n  s_nop 0\n  s_branch .Lloop"),
    "register_not_asked_for": (gfx950.IllegalInstruction, "v200 is beyond the 64", "  v_mov_b32 v200, 0"),
    "no_instruction": (gfx950.UnknownInstruction, "does not know", "  .long 0xffffffff"),
    "sparse_product": (
        gfx950.UnknownInstruction,
        "smfmac",
        "  v_smfmac_f32_16x16x64_f16 v[0:3], v[4:7], v[8:15], v16",
    ),
}


@pytest.fixture(scope="module")
def broken() -> gfx950.CodeObject:
    """All of them in one code object."""
    bodies = ((name, body.replace(".L", f".L{name}_")) for name, (_, _, body) in BROKEN.items())
    return assemble([Assembly(name, body, lds=1024, scratch=64) for name, body in bodies])


def run(kernel: gfx950.Kernel, buffer: np.ndarray, **options) -> gfx950.Statistics:
    memory = gfx950.Memory()
    address = memory.add_array(buffer, defined=False)
    return gfx950.execute(kernel, (2,), (256,), [address], memory, budget=100_000, **options)


@pytest.mark.parametrize("name", BROKEN)
def test_is_caught(name: str, broken: gfx950.CodeObject) -> None:
    kind, words, _ = BROKEN[name]
    with pytest.raises(kind, match=words) as caught:
        run(broken.kernel(name), np.zeros(256, np.uint32))
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(f"{name}: ") and "from its entry, wave " in message and kind.advice in message


CHECKED = {gfx950.Undefined: "undefined", gfx950.LdsRace: "races", gfx950.MissingWait: "waits"}


@pytest.mark.parametrize("name", [name for name, (kind, *_) in BROKEN.items() if kind in CHECKED])
def test_passes_with_that_check_off(name: str, broken: gfx950.CodeObject) -> None:
    """So it is that check which caught it."""
    checks = set(CHECKED.values()) - {CHECKED[BROKEN[name][0]]}
    if name == "undefined_address":
        with pytest.raises(gfx950.OutOfBounds):
            run(broken.kernel(name), np.zeros(256, np.uint32), checks=checks)
    else:
        run(broken.kernel(name), np.zeros(256, np.uint32), checks=checks)


def test_names_instruction_lanes_and_place(broken: gfx950.CodeObject) -> None:
    with pytest.raises(gfx950.OutOfBounds) as caught:
        run(broken.kernel("store_past_the_end"), np.zeros(256, np.uint32))
    text = str(caught.value)
    assert "wave 3 of workgroup (0, 0, 0), lane 63:" in text and "global_store_dword(" in text


def test_what_is_right_passes() -> None:
    """Waves exchange values through LDS with the barriers and waits it takes; nothing is reported."""
    body = (
        START
        + """
  ds_write_b32 v1, v0
  s_waitcnt lgkmcnt(0)
  s_barrier
  v_xor_b32 v2, 0x300, v1
  ds_read_b32 v3, v2
  s_waitcnt lgkmcnt(0)
  s_barrier
  ds_write_b32 v1, v3
  s_waitcnt lgkmcnt(0)
  v_xor_b32 v3, 0xc0, v3
  global_store_dword v1, v3, s[4:5]
"""
    )
    buffer = np.zeros(256, np.uint32)
    run(assemble([Assembly("right", body, lds=1024)]).kernel("right"), buffer)
    assert (buffer == np.arange(256)).all()


# -- undefined values travel exactly ------------------------------------------------------------------


def test_undefined_bits_that_do_not_matter_are_no_error() -> None:
    """Masked off, not selected, overwritten by halves: what is stored is defined all the same."""
    body = (
        START
        + """
  v_and_b32 v3, 0, v20
  v_lshlrev_b32 v4, 16, v0
  v_and_b32 v5, 0xffff0000, v20
  v_and_b32 v5, 0xffff, v5
  v_or3_b32 v3, v3, v4, v5
  v_cmp_gt_u32 vcc, 1000, v0
  v_cndmask_b32 v3, v20, v3, vcc
  v_mov_b32_sdwa v21, v0 dst_sel:WORD_0 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0
  v_mov_b32_sdwa v21, v0 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0
  v_xor_b32 v3, v3, v21
  global_store_dword v1, v3, s[4:5]
"""
    )
    buffer = np.zeros(256, np.uint32)
    run(assemble([Assembly("fine", body)]).kernel("fine"), buffer)
    item = np.arange(256, dtype=np.uint32)
    assert (buffer == (item << 16 ^ (item | item << 16))).all()


def test_what_was_not_written_is_known_afterwards() -> None:
    body = (
        START
        + "  v_cmp_gt_u32 vcc, 100, v0\n  s_and_saveexec_b64 s[6:7], vcc\n  global_store_dword v1, v0, s[4:5]"
    )
    buffer, memory = np.zeros(256, np.uint32), gfx950.Memory()
    address = memory.add_array(buffer, defined=False)
    gfx950.execute(assemble([Assembly("part", body)]).kernel("part"), (1,), (256,), [address], memory)
    assert memory.undefined_bytes(address, 1024).tolist() == [False] * 400 + [True] * 624
    memory.define(address + 400, 624)
    assert not memory.undefined_bytes(address, 1024).any()


# -- grids and blocks -----------------------------------------------------------------------------------

IDS = """
#define AXIS(d) (__builtin_amdgcn_workgroup_id_##d() * __builtin_amdgcn_workgroup_size_##d() \\
                 + __builtin_amdgcn_workitem_id_##d())
#define KERNEL extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, 1024))) void
KERNEL ids(unsigned *out, int nx, int ny) {
  unsigned x = AXIS(x), y = AXIS(y), z = AXIS(z);
  out[(z * ny + y) * nx + x] = x | y << 8 | z << 16;
}
"""


@pytest.mark.parametrize("optimisation", ["-O1", "-O3"])
def test_three_dimensions(optimisation: str) -> None:
    kernel = compile_hip(IDS, optimisation=optimisation).kernel("ids")
    for grid, block in itertools.product(
        [(1, 1, 1), (3, 2, 4)], [(1, 1, 1), (5, 3, 7), (64, 2, 1), (8, 8, 16)]
    ):
        nx, ny, nz = (g * b for g, b in zip(grid, block, strict=True))
        out, memory = np.full((nz, ny, nx), 0xFFFFFFFF, np.uint32), gfx950.Memory()
        gfx950.execute(kernel, grid, block, [memory.add_array(out, defined=False), nx, ny], memory)
        z, y, x = np.mgrid[:nz, :ny, :nx]
        assert (out == (x | y << 8 | z << 16)).all(), (grid, block)


# -- input that is no kernel ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> gfx950.CodeObject:
    return assemble([Assembly("good", START + "  global_store_dword v1, v0, s[4:5]")])


def test_truncated_elf(good: gfx950.CodeObject) -> None:
    for size in (0, 3, 20, 64, 200, len(good.data) // 2, len(good.data) - 40):
        with pytest.raises(gfx950.CodeObjectError):
            gfx950.CodeObject(good.data[:size])


def test_damaged_bytes_are_refused_or_run_to_a_clear_end(good: gfx950.CodeObject) -> None:
    """Whatever byte is wrong, what comes out is one of this package's errors, or a result."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good.data)
        for at in generator.integers(0, len(data), 3):
            data[at] = int(generator.integers(0, 256))
        try:
            kernel = gfx950.CodeObject(bytes(data)).kernel("good")
            run(kernel, np.zeros(256, np.uint32))
        except gfx950.Gfx950Error as error:
            assert str(error).strip()


def test_other_architectures(good: gfx950.CodeObject) -> None:
    other = bytearray(good.data)
    other[48] = 0x41  # gfx1100
    with pytest.raises(gfx950.CodeObjectError, match="machine 0x41; only gfx942 and gfx950"):
        gfx950.CodeObject(bytes(other))
    with pytest.raises(gfx950.CodeObjectError, match=r"not for an AMD GPU"):
        gfx950.CodeObject(Path(sys.executable).resolve().read_bytes())


LAUNCHES: dict[str, tuple[Callable, type[gfx950.Gfx950Error], str]] = {
    "kernel name": (
        lambda code, m: code.kernel("bad"),
        gfx950.CodeObjectError,
        "no kernel 'bad'.*it has good",
    ),
    "few arguments": (
        lambda code, m: gfx950.execute(code.kernel("good"), (1,), (64,), [], m),
        gfx950.LaunchError,
        "takes 1 arguments, not 0",
    ),
    "short segment": (
        lambda code, m: gfx950.execute(code.kernel("good"), (1,), (64,), b"1234", m),
        gfx950.LaunchError,
        "takes 8 bytes of arguments, not 4",
    ),
    "large workgroup": (
        lambda code, m: gfx950.execute(code.kernel("good"), (1,), (64, 64), [0], m),
        gfx950.LaunchError,
        "4096 work-items",
    ),
    "empty grid": (
        lambda code, m: gfx950.execute(code.kernel("good"), (0,), (64,), [0], m),
        gfx950.LaunchError,
        "at least 1",
    ),
    "LDS": (
        lambda code, m: gfx950.execute(code.kernel("good"), (1,), (64,), [0], m, dynamic_lds=200_000),
        gfx950.LaunchError,
        "gfx950 has 163840",
    ),
    "overlap": (lambda code, m: m.add(m.add(1 << 40, 64) + 32, 64), gfx950.LaunchError, "overlap"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_that_cannot_be(name: str, good: gfx950.CodeObject) -> None:
    attempt, kind, words = LAUNCHES[name]
    with pytest.raises(kind, match=words):
        attempt(good, gfx950.Memory())
