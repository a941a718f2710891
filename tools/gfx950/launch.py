"""Launches a kernel: lays out its arguments, starts the native executor, and explains what went wrong."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import errors, native
from .code_object import Argument, CodeObject, Kernel
from .decode import Code, decode, disassemble
from .memory import Memory

Dim3 = tuple[int, int, int]

MAX_WORKGROUP = 1024
MAX_SCRATCH = 1 << 30  # bytes of one workgroup
LDS_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10}
DEFAULT_BUDGET = 1 << 32
CHECKS = {"undefined": native.CHECK_UNDEFINED, "races": native.CHECK_RACES, "waits": native.CHECK_WAITS}

_ERRORS: tuple[type[errors.ExecutionError], ...] = (  # by enum Error of machine.h
    *(errors.ExecutionError, errors.OutOfBounds, errors.Misaligned, errors.Undefined, errors.LdsRace),
    *(errors.MissingWait, errors.BudgetExceeded, errors.UnknownInstruction, errors.IllegalInstruction),
    errors.ReadOnlyMemory,
)


@dataclass(frozen=True)
class Statistics:
    """Hold what a launch executed.

    ``instructions`` counts, by operation, what waves executed; ``lanes`` the active lanes of those.
    ``by_work`` sums the former by kind of work (native.WORKS).  ``bank_conflicts`` are the turns that lanes
    lost to each other at LDS banks, by operation (native/banks.c).  Bytes are those of global memory.
    """

    instructions: dict[str, int] = field(repr=False)
    lanes: dict[str, int] = field(repr=False)
    by_work: dict[str, int]
    bank_conflicts: dict[str, int]
    bytes_loaded: int
    bytes_stored: int

    @property
    def total(self) -> int:
        return sum(self.instructions.values())


def execute(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[int] | bytes,
    memory: Memory,
    *,
    dynamic_lds: int = 0,
    checks: Sequence[str] = tuple(CHECKS),
    budget: int = DEFAULT_BUDGET,
    ulp: int = 0,
) -> Statistics:
    """Run ``grid`` workgroups of ``block`` work-items each, to the end.

    ``arguments`` are integers (addresses, or values as their bits) for the arguments the kernel declares, or
    the packed argument segment.  ``checks`` says what to watch for besides bounds: reads of what is
    ``undefined``, LDS ``races``, missing ``waits``.  ``budget`` bounds the instructions of all waves.
    ``ulp`` is what approximate instructions (v_rcp_f32, v_exp_f32, ...) are off by in the last place.
    Raises LaunchError, or an ExecutionError that says where the kernel went wrong.
    """
    grid3, block3 = _three(grid), _three(block)
    _check_launch(kernel, grid3, block3, dynamic_lds)
    segment = _kernarg(kernel, arguments, grid3, block3, dynamic_lds)
    kernarg = _aligned(segment)
    packet = _dispatch_packet(kernel, grid3, block3, dynamic_lds, kernarg.ctypes.data)
    code = _decoded(kernel.code)
    with memory.temporarily(kernarg, packet), _image_of(kernel.code, memory):
        memory.define(kernarg.ctypes.data, len(segment))
        memory.define(packet.ctypes.data, packet.nbytes)
        machine, keep = _machine(kernel, code, memory, kernarg, packet)
        machine.grid[:], machine.block[:] = grid3, block3
        machine.lds_bytes = kernel.lds_bytes + dynamic_lds
        machine.budget, machine.ulp = budget, ulp
        machine.checks = sum(CHECKS[check] for check in checks)
        if native.library().execute(machine):
            raise _explained(kernel, code, machine.failure)
        return _statistics(machine, *keep)


# -- the launch ------------------------------------------------------------------------------------


def _three(sizes: Sequence[int]) -> Dim3:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _check_launch(kernel: Kernel, grid: Dim3, block: Dim3, dynamic_lds: int) -> None:
    if min(*grid, *block) < 1:
        raise errors.LaunchError(
            f"{kernel.name}: grid {grid} and block {block} must be at least 1 in every dimension."
        )
    items = math.prod(block)
    if items > min(kernel.max_workgroup_size, MAX_WORKGROUP):
        raise errors.LaunchError(
            f"{kernel.name}: a workgroup of {items} work-items; it was compiled for at most "
            f"{kernel.max_workgroup_size}."
        )
    if kernel.scratch_bytes * items > MAX_SCRATCH:
        raise errors.LaunchError(f"{kernel.name}: {kernel.scratch_bytes} bytes of scratch memory a lane.")
    if kernel.lds_bytes + dynamic_lds > LDS_BYTES[kernel.code.arch]:
        raise errors.LaunchError(
            f"{kernel.name}: {kernel.lds_bytes} + {dynamic_lds} bytes of LDS; {kernel.code.arch} has "
            f"{LDS_BYTES[kernel.code.arch]}."
        )


def _kernarg(
    kernel: Kernel, arguments: Sequence[int] | bytes, grid: Dim3, block: Dim3, dynamic_lds: int
) -> bytes:
    segment = bytearray(kernel.kernarg_bytes)
    declared = [a for a in kernel.arguments if not a.hidden]
    if isinstance(arguments, (bytes, bytearray)):
        needed = max((a.offset + a.size for a in declared), default=0)
        if len(arguments) < needed:
            raise errors.LaunchError(
                f"{kernel.name} takes {needed} bytes of arguments, not {len(arguments)}."
            )
        segment[: len(arguments)] = arguments
    else:
        if len(arguments) != len(declared):
            raise errors.LaunchError(f"{kernel.name} takes {len(declared)} arguments, not {len(arguments)}.")
        for argument, value in zip(declared, arguments, strict=True):
            _put(segment, argument, value)
    for argument in kernel.arguments:
        if argument.hidden:
            _put(segment, argument, _hidden(argument.kind, grid, block, dynamic_lds))
    return bytes(segment)


def _aligned(segment: bytes) -> np.ndarray:
    """A copy at a multiple of 64, padded to one: compilers load past the last argument, up to there."""
    size = max(64, -(-len(segment) // 64) * 64)
    backing = np.zeros(size + 64, np.uint8)
    start = -backing.ctypes.data % 64
    backing[start : start + len(segment)] = np.frombuffer(segment, np.uint8)
    return backing[start : start + size]


def _put(segment: bytearray, argument: Argument, value: int) -> None:
    data = (value & (1 << 8 * argument.size) - 1).to_bytes(argument.size, "little")
    segment[argument.offset : argument.offset + argument.size] = data


def _hidden(kind: str, grid: Dim3, block: Dim3, dynamic_lds: int) -> int:
    """Give what a runtime fills in by itself; what has no meaning here is zero."""
    axis = "xyz".find(kind[-1])
    if kind.startswith("hidden_block_count_"):
        return grid[axis]
    if kind.startswith("hidden_group_size_"):
        return block[axis]
    return {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": dynamic_lds}.get(kind, 0)


def _dispatch_packet(kernel: Kernel, grid: Dim3, block: Dim3, dynamic_lds: int, kernarg: int) -> np.ndarray:
    """The queue's packet for this launch, which kernels may read; its grid is in work-items."""
    items = [g * b for g, b in zip(grid, block, strict=True)]
    lds = kernel.lds_bytes + dynamic_lds
    head = struct.pack("<HH3HH3III", 0, 3, *block, 0, *items, kernel.scratch_bytes, lds)
    return _aligned((head + struct.pack("<QQ", 0, kernarg)).ljust(64, b"\0"))


class _image_of:
    """The code object's segments as memory, unless they are registered already."""

    def __init__(self, code: CodeObject, memory: Memory) -> None:
        self._code, self._memory, self._added = code, memory, []

    def __enter__(self) -> None:
        for segment in self._code.segments:
            address = self._code.base + segment.offset
            if segment.size and self._memory.find(address) is None:
                self._added.append(self._memory.add(address, segment.size, writable=segment.writable))

    def __exit__(self, *_: object) -> None:
        for address in self._added:
            self._memory.remove(address)


# -- the machine -----------------------------------------------------------------------------------


@functools.lru_cache(64)
def _decoded(code: CodeObject) -> Code:
    return decode(code.text, native.library().numbers)


def _machine(
    kernel: Kernel, code: Code, memory: Memory, kernarg: np.ndarray, packet: np.ndarray
) -> tuple[native.MachineStruct, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    count = len(native.library().names)
    waves, lanes, conflicts = (np.zeros(count, np.uint64) for _ in range(3))
    machine = native.MachineStruct()
    machine.code, machine.records = code.records, code.count
    machine.record_at, machine.code_bytes = code.record_at.ctypes.data, len(code.text)
    machine.code_address = kernel.code.base + kernel.code.text_offset
    machine.entry = max(0, int(code.record_at[kernel.entry // 4]))
    machine.allocations, machine.allocation_count = memory.table(), len(memory)  # type: ignore[assignment]
    machine.vgprs, machine.agprs, machine.scratch_bytes = kernel.vgprs, kernel.agprs, kernel.scratch_bytes
    machine.mode, machine.workgroup_ids = kernel.mode, kernel.workgroup_ids
    values = _user_sgprs(kernel, kernarg, packet)
    machine.user_sgprs[: len(values)] = values
    machine.user_sgpr_count = kernel.user_sgpr_count
    machine.fnuz = int(kernel.code.arch == "gfx942")
    machine.waves_by_op, machine.lanes_by_op = waves.ctypes.data, lanes.ctypes.data
    machine.conflicts_by_op = conflicts.ctypes.data
    return machine, (waves, lanes, conflicts)


def _user_sgprs(kernel: Kernel, kernarg: np.ndarray, packet: np.ndarray) -> list[int]:
    pointers = {"dispatch_ptr": packet.ctypes.data, "kernarg_segment_ptr": kernarg.ctypes.data}
    values: list[int] = []
    for name, count in kernel.user_sgprs:
        value = kernel.scratch_bytes if name == "private_segment_size" else pointers.get(name, 0)
        values += [value >> 32 * i & 0xFFFFFFFF for i in range(count)]
    first, count = kernel.preload
    values += [int(word) for word in kernarg.view(np.uint32)[first : first + count]]
    return values[: native.SGPR_SLOTS]


def _statistics(machine: Any, waves: np.ndarray, lanes: np.ndarray, conflicts: np.ndarray) -> Statistics:
    library = native.library()
    executed = [i for i in range(len(waves)) if waves[i]]
    by_work = dict.fromkeys(native.WORKS, 0)
    for i in executed:
        by_work[library.works[i]] += int(waves[i])
    return Statistics(
        {library.names[i]: int(waves[i]) for i in executed},
        {library.names[i]: int(lanes[i]) for i in executed},
        by_work,
        {library.names[i]: int(conflicts[i]) for i in executed if conflicts[i]},
        machine.bytes_loaded,
        machine.bytes_stored,
    )


# -- failures --------------------------------------------------------------------------------------


def _explained(kernel: Kernel, code: Code, failure: Any) -> errors.ExecutionError:
    kind = _ERRORS[failure.code]
    lines = [f"{kernel.name}: {failure.text.decode()}."]
    if failure.pc != 0xFFFFFFFF:
        wave = f"wave {failure.wave} of workgroup ({', '.join(map(str, failure.workgroup))})"
        lines.append(f"  at {failure.pc - kernel.entry:+#x} from its entry, {wave}{_lanes(failure.lanes)}:")
        lines.append(f"  {disassemble(code.text[failure.pc : failure.pc + 16])}")
    return kind("\n".join([*lines, f"  {kind.advice}"]))


def _lanes(mask: int) -> str:
    lanes = [str(i) for i in range(64) if mask >> i & 1]
    if not lanes or len(lanes) == 64:
        return ""
    shown = ", ".join(lanes[:6]) + (f" and {len(lanes) - 6} more" if len(lanes) > 6 else "")
    return f", lane{'s' if len(lanes) > 1 else ''} {shown}"
