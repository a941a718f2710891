"""Executes AMD CDNA machine code (gfx950, gfx942) on the host: the very bytes a GPU would run.

    import numpy as np
    from gfx950 import CodeObject, Memory, execute

    code = CodeObject(open("kernel.hsaco", "rb").read())
    x, y = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    memory = Memory()
    pointers = [memory.add_array(x, writable=False), memory.add_array(y, defined=False)]
    statistics = execute(code.kernel("copy"), (4,), (256,), [*pointers, 1000], memory)

Device pointers are host addresses; only what is registered with ``Memory`` may be touched.  A launch
runs to its end before ``execute`` returns.  Whatever a kernel does wrong is an ``ExecutionError`` that
names the kernel, the instruction, the lanes, and what to do.

Reading order: code_object (ELF, descriptors), decode (machine code to records), memory, launch, native
(builds the C library), and in native/ what instructions do: sop.def, vop.def, vopc.def, vop3p.def,
memory.c, lds.c, banks.c, crosslane.c, mfma.c.
"""

from .code_object import CodeObject, Kernel
from .errors import (
    BudgetExceeded,
    CodeObjectError,
    ExecutionError,
    Gfx950Error,
    IllegalInstruction,
    LaunchError,
    LdsRace,
    Misaligned,
    MissingWait,
    OutOfBounds,
    ReadOnlyMemory,
    Undefined,
    UnknownInstruction,
)
from .launch import Statistics, execute
from .memory import Memory

__all__ = [
    "BudgetExceeded",
    "CodeObject",
    "CodeObjectError",
    "ExecutionError",
    "Gfx950Error",
    "IllegalInstruction",
    "Kernel",
    "LaunchError",
    "LdsRace",
    "Memory",
    "Misaligned",
    "MissingWait",
    "OutOfBounds",
    "ReadOnlyMemory",
    "Statistics",
    "Undefined",
    "UnknownInstruction",
    "execute",
]
