"""LDS bank conflicts that the executor counts: accesses whose conflicts one can work out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from tests.gfx950.gfx950_kernels import Assembly, assemble
from tools import gfx950

LANES = 64
# Each lane writes, then reads, at the LDS address it is given.
_BODY = """
  s_load_dwordx2 s[4:5], s[0:1], 0x0
  v_lshlrev_b32 v1, 2, v0
  s_waitcnt lgkmcnt(0)
  global_load_dword v2, v1, s[4:5]
  v_mov_b32 v4, 0
  v_mov_b32 v5, 0
  v_mov_b32 v6, 0
  v_mov_b32 v7, 0
  s_waitcnt vmcnt(0)
  ds_write_b{bits} v2, v{data}
  s_waitcnt lgkmcnt(0)
  ds_read_b{bits} v{data}, v2
  s_waitcnt lgkmcnt(0)
"""
_DATA = {32: "4", 64: "[4:5]", 128: "[4:7]"}


@functools.cache
def kernel(bits: int, arch: str) -> gfx950.Kernel:
    text = _BODY.format(bits=bits, data=_DATA[bits])
    return assemble([Assembly("access", text, lds=65536)], arch).kernel("access")


def conflicts(bits: int, arch: str, address: Callable[[int], int]) -> tuple[int, int]:
    """Turns lost by the write and by the read."""
    addresses, memory = np.array([address(lane) for lane in range(LANES)], np.uint32), gfx950.Memory()
    pointer = memory.add_array(addresses, writable=False)
    found = gfx950.execute(kernel(bits, arch), (1,), (LANES,), [pointer], memory).bank_conflicts
    return found.get(f"DS_WRITE_B{bits}", 0), found.get(f"DS_READ_B{bits}", 0)


@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
@pytest.mark.parametrize("bits", _DATA)
def test_neighbours_and_one_for_all_are_free(bits: int, arch: str) -> None:
    assert conflicts(bits, arch, lambda lane: bits // 8 * lane) == (0, 0)
    assert conflicts(bits, arch, lambda _: 16) == (0, 0)


@pytest.mark.parametrize(
    ("bits", "arch", "lost"),
    [
        # A bank for all: every turn has as many dwords to give as it has lanes.
        (32, "gfx950", (62, 63)),
        (64, "gfx950", (60, 62)),
        (128, "gfx950", (56, 60)),
        (32, "gfx942", (62, 62)),
        (64, "gfx942", (60, 60)),
        (128, "gfx942", (56, 56)),
    ],
)
def test_one_bank_for_all(bits: int, arch: str, lost: tuple[int, int]) -> None:
    assert conflicts(bits, arch, lambda lane: 256 * lane) == lost


def test_banks_of_reads() -> None:
    """64 of them on gfx950, 32 on gfx942; writes have 32 on both."""
    assert conflicts(32, "gfx950", lambda lane: 128 * (lane % 2)) == (2, 0)
    assert conflicts(32, "gfx942", lambda lane: 128 * (lane % 2)) == (2, 2)


def test_lanes_of_a_turn() -> None:
    """Reads of 16 bytes, two lanes at a time at one bank, the others at one dword of another."""

    def meet(arch: str, lane: int, other: int) -> bool:
        pair = {lane: 256, other: 512}
        return conflicts(128, arch, lambda i: pair.get(i, 16))[1] > 0

    assert [i for i in range(1, LANES) if meet("gfx950", 0, i)] == [
        *range(1, 4),
        *range(12, 16),
        *range(20, 28),
    ]
    assert [i for i in range(1, LANES) if meet("gfx942", 0, i)] == [*range(1, 4), *range(20, 24)]
