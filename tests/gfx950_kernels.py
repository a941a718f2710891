"""Running HIP kernel instances on the gfx950 executor, the way test_kernels.py runs CPU objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lowering import abi, toolchain
from lowering.kernel import KernelInstance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gfx950

Launch = Callable[[Sequence[int], int], None]


def launcher(kernel: KernelInstance, **options: Any) -> Launch:
    """The code object of ``kernel``, checked against its bindings; inputs may only be read, and every byte
    of an output must be written."""
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    entry = gfx950.CodeObject(data).kernel(kernel.entry)

    def launch(pointers: Sequence[int], rows: int) -> None:
        memory = gfx950.Memory()
        sizes = [_bytes(kernel, i, rows) for i in range(len(pointers))]
        for binding, pointer, size in zip(kernel.bindings, pointers, sizes, strict=True):
            reads = binding.access == "read"
            if size:
                memory.add(pointer, size, writable=not reads, defined=reads)
        gfx950.execute(entry, kernel.grid(rows), kernel.block, [*pointers, rows], memory, **options)
        for binding, pointer, size in zip(kernel.bindings, pointers, sizes, strict=True):
            assert not size or not memory.undefined_bytes(pointer, size).any(), (
                f"{binding.name}: not all is written"
            )

    return launch


def _bytes(kernel: KernelInstance, index: int, rows: int) -> int:
    binding = kernel.bindings[index]
    return getattr(torch, binding.dtype).itemsize * torch.Size(kernel.shape(binding, rows)).numel()
