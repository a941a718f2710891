"""The executor as the machine behind the worker: its code objects, kernels and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import errors
from ..code_object import CodeObject
from ..code_object import Kernel as Code
from ..launch import execute
from ..memory import Memory
from .worker import Block, Failure, HipError, Kernel, KernelInfo, Launch

_HIP_ERRORS = (
    (errors.OutOfBounds, HipError.ILLEGAL_ADDRESS),
    (errors.Misaligned, HipError.ILLEGAL_ADDRESS),
    (errors.ReadOnlyMemory, HipError.ILLEGAL_ADDRESS),
    (errors.BudgetExceeded, HipError.LAUNCH_TIMEOUT),
    (errors.Gfx950Error, HipError.LAUNCH_FAILURE),
)


class Gpu:
    """A machine of one architecture; ``worker.Gpu``."""

    def __init__(self, arch: str):
        self._arch = arch
        self._memory = Memory()
        self._blocks: frozenset[Block] = frozenset()

    def load(self, image: bytes) -> dict[str, Kernel]:
        try:
            code = CodeObject(image)
        except errors.CodeObjectError as error:
            raise Failure(HipError.INVALID_IMAGE, str(error)) from error
        if code.arch != self._arch:
            sentence = f"the code object is for {code.arch}, this device is an emulated {self._arch}"
            raise Failure(HipError.NO_BINARY_FOR_GPU, sentence)
        return {name: _Kernel(self, kernel) for name, kernel in code.kernels.items()}

    def run(self, kernel: Code, launch: Launch) -> None:
        """Run ``kernel``; raises Failure with what the executor found wrong."""
        self._update(launch.blocks, launch.written)
        try:
            execute(
                kernel,
                launch.grid,
                launch.block,
                launch.arguments,
                self._memory,
                dynamic_lds=launch.dynamic_lds,
            )
        except errors.Gfx950Error as error:
            code = next(code for kind, code in _HIP_ERRORS if isinstance(error, kind))
            raise Failure(code, str(error)) from error

    def _update(self, blocks: Sequence[Block], written: Sequence[tuple[int, int]]) -> None:
        """Follow what was allocated, freed and written since the launch before."""
        now = frozenset(blocks)
        for block in self._blocks - now:
            self._memory.remove(block.base)
        for block in now - self._blocks:
            self._memory.add(block.base, block.size, defined=block.written_by_host)
        self._blocks = now
        for address, size in written:
            self._memory.define(address, size)


@dataclass(frozen=True)
class _Kernel:
    """One kernel of a loaded code object; ``worker.Kernel``."""

    gpu: Gpu
    code: Code

    @property
    def info(self) -> KernelInfo:
        explicit = [(a.offset, a.size) for a in self.code.arguments if not a.hidden]
        return KernelInfo(
            argument_bytes=max((offset + size for offset, size in explicit), default=0),
            lds_bytes=self.code.lds_bytes,
            scratch_bytes=self.code.scratch_bytes,
            registers=self.code.vgprs + self.code.agprs,
            max_threads=self.code.max_workgroup_size,
            arguments=explicit,
        )

    def launch(self, launch: Launch) -> None:
        self.gpu.run(self.code, launch)
