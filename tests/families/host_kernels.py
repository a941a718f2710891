"""Kernel instances on this host: CPU kernels natively, GPU kernels in emulation.

``row_emulation.cpp`` and ``topk_emulation.cpp`` run the shared GPU source in lockstep, with waves of 32 and
of 64 lanes, so its numerics, lane mapping and stores are tested on a machine without a GPU.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from lowering.backends import abi, commands, toolchain
from lowering.families.instance import KernelInstance
from lowering.families.registry import family_of

Launch = Callable[[Sequence[int], int], None]

GUARD = 64  # poisoned bytes on either side of every tensor
POISON = 0xA5


def launcher(kernel: KernelInstance, directory: Path) -> Launch:
    """What launches ``kernel``, built in ``directory``."""
    return (_native if kernel.target.backend == "cpu" else emulated)(kernel, directory)


def _native(kernel: KernelInstance, directory: Path) -> Launch:
    """The CPU object linked into a library and called the way IREE calls it, workgroup by workgroup."""
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    (directory / "kernel.o").write_bytes(data)
    library = directory / "kernel.so"
    subprocess.run(
        [c_compiler(), "-shared", "-nostdlib", "kernel.o", "-o", library], cwd=directory, check=True
    )
    entry = getattr(ctypes.CDLL(str(library)), kernel.entry)
    entry.restype = None

    def launch(pointers: Sequence[int], rows: int) -> None:
        # A base pointer and an element offset.
        pairs = []
        for pointer, binding in zip(pointers, kernel.bindings, strict=True):
            size = getattr(torch, binding.dtype).itemsize
            pairs += [ctypes.c_void_p(pointer - 3 * size), ctypes.c_int64(3)]
        for workgroup in range(kernel.grid(rows)[0]):
            entry(*pairs, ctypes.c_int32(rows), ctypes.c_int32(workgroup))

    return launch


def emulated(kernel: KernelInstance, directory: Path, beside: Path = Path(__file__)) -> Launch:
    """The GPU source compiled for the host, with fibers for lanes: by the emulation ``beside`` that file."""
    library = directory / "emulation.so"
    source = beside.with_name(f"{Path(kernel.source).stem}_emulation.cpp")
    headers = family_of(kernel.spec).directory or commands.kernel_source_dir()
    build_emulation(source, library, {**dict(kernel.defines), "WAVE": kernel.target.wave}, headers)
    entry = ctypes.CDLL(str(library)).launch

    def launch(pointers: Sequence[int], rows: int) -> None:
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        entry(array, ctypes.c_int(rows), ctypes.c_int(kernel.grid(rows)[0]))

    return launch


def build_emulation(
    source: Path, library: Path, defines: Mapping[str, object], headers: Path, level: str = "-O0"
) -> None:
    """Compile the emulation ``source`` of a kernel whose own source is in ``headers``."""
    flags = [*_flags(level), "-shared", "-w", *(f"-D{name}={value}" for name, value in defines.items())]
    include = [f"-I{path}" for path in (_precompiled(level), headers, Path(__file__).parent)]
    subprocess.run([cxx_compiler(), *flags, *include, source, "-o", library], check=True)


def _flags(level: str) -> list[str]:
    return ["-std=c++17", level, "-ffp-contract=off", "-fPIC"]


@cache
def _precompiled(level: str) -> Path:
    """A directory with standard.h, and with it precompiled for a compiler that can use it."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    header = Path(shutil.copy(Path(__file__).with_name("standard.h"), directory))
    made = header.with_suffix(".h.gch")
    subprocess.run([cxx_compiler(), *_flags(level), "-x", "c++-header", header, "-o", made], check=True)
    return directory


def c_compiler() -> str:
    return next(found for name in ("cc", "gcc", "clang") if (found := shutil.which(name)))


def cxx_compiler() -> str:
    return next(found for name in ("c++", "g++", "clang++") if (found := shutil.which(name)))


def run(
    kernel: KernelInstance,
    launch: Launch,
    inputs: Sequence[torch.Tensor],
    rows: int,
    shift: int = 0,
    aligned: Sequence[str] = (),
) -> list[torch.Tensor]:
    """The outputs for ``inputs``; every tensor starts ``shift`` elements off a 64-byte boundary.

    Those named in ``aligned`` do not.  Outputs start poisoned, and what surrounds a tensor must be untouched
    afterwards.
    """
    given = iter(inputs)
    buffers, tensors = [], []
    for binding in kernel.bindings:
        dtype = getattr(torch, binding.dtype)
        shape = kernel.shape(binding, rows)
        size = dtype.itemsize * torch.Size(shape).numel()
        buffer = torch.full((size + 64 + 2 * GUARD + 16 * dtype.itemsize,), POISON, dtype=torch.uint8)
        off = 0 if binding.name in aligned else shift * dtype.itemsize
        start = GUARD + -(buffer.data_ptr() + GUARD) % 64 + off
        tensor = buffer[start : start + size]
        if binding.access == "read":
            tensor.copy_(next(given).reshape(-1).view(torch.uint8))
        buffers.append((buffer, start, size))
        tensors.append((binding, tensor, dtype, shape))
    launch([buffer.data_ptr() + start for buffer, start, _ in buffers], rows)
    for buffer, start, size in buffers:
        assert (buffer[:start] == POISON).all() and (buffer[start + size :] == POISON).all(), (
            "wrote outside a tensor"
        )
    return [t.clone().view(dtype).reshape(shape) for b, t, dtype, shape in tensors if b.access == "write"]


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: object = "") -> None:
    """Equal bit for bit, except that any NaN is as good as another."""
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
        equal = a.contiguous().view(bits) == e.contiguous().view(bits)
        both_nan = a.float().isnan() & e.float().isnan()
        wrong = ~(equal | both_nan)
        where = wrong.nonzero()[:3].tolist()
        assert not wrong.any(), (
            f"{what} output {index}: {int(wrong.sum())} of {wrong.numel()} differ, first at {where}"
        )
