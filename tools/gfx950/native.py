"""Builds the native executor with the system's C compiler, once per change, and binds it.

The library is kept beside the compiled kernels (``VMFUSE_CACHE_DIR``) under a hash of its sources, the
compiler and this host's features.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lowering import object_cache
from lowering.backends import commands, cpu
from lowering.host_compiler import c_compiler, hosted

_SOURCES = Path(__file__).with_name("native")
_OPTIONS = (
    *("-std=gnu11", "-O2", "-ftree-vectorize", "-shared", "-fPIC", "-w"),
    # Every operation rounds on its own, in the mode at hand.
    *("-ffp-contract=off", "-frounding-math", "-fno-math-errno", "-fno-trapping-math"),
)

SGPR_SLOTS = 32
CHECK_UNDEFINED, CHECK_RACES, CHECK_WAITS = 1, 2, 4

WORKS = (
    *("salu", "branch", "sync", "smem_load", "valu", "packed", "convert", "transcendental"),
    *("cross_lane", "matrix", "lds", "load", "store", "atomic"),
)


class AllocationStruct(ctypes.Structure):
    """``Allocation`` of machine.h."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("shadow", ctypes.c_void_p),
        ("writable", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class FailureStruct(ctypes.Structure):
    """``Failure`` of machine.h."""

    _fields_ = (
        ("code", ctypes.c_uint32),
        ("pc", ctypes.c_uint32),
        ("wave", ctypes.c_uint32),
        ("workgroup", ctypes.c_uint32 * 3),
        ("lanes", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("text", ctypes.c_char * 160),
    )


class MachineStruct(ctypes.Structure):
    """``Machine`` of machine.h."""

    _fields_ = (
        ("code", ctypes.c_char_p),
        ("records", ctypes.c_uint64),
        ("record_at", ctypes.c_void_p),
        ("code_bytes", ctypes.c_uint64),
        ("code_address", ctypes.c_uint64),
        ("allocations", ctypes.POINTER(AllocationStruct)),
        ("allocation_count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("vgprs", ctypes.c_uint32),
        ("agprs", ctypes.c_uint32),
        ("lds_bytes", ctypes.c_uint32),
        ("scratch_bytes", ctypes.c_uint32),
        ("user_sgprs", ctypes.c_uint32 * SGPR_SLOTS),
        ("user_sgpr_count", ctypes.c_uint32),
        ("workgroup_ids", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("entry", ctypes.c_uint64),
        ("budget", ctypes.c_uint64),
        ("ulp", ctypes.c_int32),
        ("fnuz", ctypes.c_uint32),
        ("checks", ctypes.c_uint32),
        ("executed", ctypes.c_uint64),
        ("bytes_loaded", ctypes.c_uint64),
        ("bytes_stored", ctypes.c_uint64),
        ("waves_by_op", ctypes.c_void_p),
        ("lanes_by_op", ctypes.c_void_p),
        ("conflicts_by_op", ctypes.c_void_p),
        ("failure", FailureStruct),
        # What the library keeps for itself.
        ("workgroup", ctypes.c_uint32 * 3),
        ("wave_count", ctypes.c_uint32),
        ("barrier_epoch", ctypes.c_uint32),
        ("pointers", ctypes.c_void_p * 8),
    )


class Library:
    """The native executor: ``numbers`` and ``works`` are its table of operations."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.cdna_operation_name.restype = ctypes.c_char_p
        self._library.cdna_execute.argtypes = (ctypes.POINTER(MachineStruct),)
        assert self._library.cdna_machine_bytes() == ctypes.sizeof(MachineStruct), (
            "Machine differs from machine.h"
        )
        count = self._library.cdna_operation_count()
        names = [self._library.cdna_operation_name(i).decode() for i in range(count)]
        self.names = tuple(names)
        self.numbers: Mapping[str, int] = {name: i for i, name in enumerate(names)}
        self.works = tuple(WORKS[self._library.cdna_operation_work(i)] for i in range(count))

    def execute(self, machine: MachineStruct) -> int:
        """Run the launch; the failure's code, or 0."""
        return self._library.cdna_execute(ctypes.byref(machine))


@functools.cache
def library() -> Library:
    """The native executor, built if there is none for these sources yet; ToolchainError if that fails."""
    return Library(_built())


def _built() -> Path:
    compiler = hosted(c_compiler())
    machine = cpu.machine_option("native")
    files = sorted(_SOURCES.iterdir())
    key = hashlib.sha256(cpu.features(compiler, machine).encode())
    for file in files:
        key.update(file.name.encode() + file.read_bytes())
    key.update(repr(_OPTIONS).encode())
    directory = object_cache.place()
    path = directory / f"gfx950-{key.hexdigest()[:32]}.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            out = Path(scratch) / path.name
            sources = [str(file) for file in files if file.suffix == ".c"]
            commands.call([*compiler, *_OPTIONS, machine, *sources, "-o", str(out), "-lm"], Path(scratch))
            os.replace(out, path)  # noqa: PTH105
    return path
