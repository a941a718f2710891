"""Say what a backend is to the compiler: how machine code is made, checked, and embedded in a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iree.compiler import ir

from ..families.instance import KernelInstance
from ..targets import Target
from .commands import Job
from .objects import ObjectAbi

# The operands and results of the function that dispatches a kernel, and its number of rows.
Dispatch = Callable[[KernelInstance, bytes, "list[ir.Value]", ir.Value, "list[ir.Type]"], Sequence[ir.Value]]


def no_device(target: Target) -> ir.Attribute | None:
    """IREE describes the device by itself, from the flags."""
    return None


def nothing_more(kernel: KernelInstance, data: bytes, directory: Path) -> None:
    """The dispatch holds the machine code itself."""


@dataclass(frozen=True)
class Backend:
    """One way to machine code.

    job
        The compilation of an instance, given its source and headers (name, text) and its defines as options.
    check
        What an object says of itself, once it is known to be the instance's; raises CompileError, naming the
        entry, what the object has and what the dispatch passes.
    declare
        Adds what the dispatch refers to, at the insertion point; files go to a directory that IREE reads.
    dispatch
        The operations that call the kernel, at the insertion point.
    executable_format
        Of the objects, in IREE's words.
    flags
        For IREE's compiler; ``{arch}`` stands for the target's.
    device
        The device's description where IREE has none.
    """

    job: Callable[[KernelInstance, tuple[tuple[str, str], ...], tuple[str, ...]], Job]
    check: Callable[[KernelInstance, bytes], ObjectAbi]
    dispatch: Dispatch
    executable_format: str
    flags: tuple[str, ...] = ()
    declare: Callable[[KernelInstance, bytes, Path], None] = nothing_more
    device: Callable[[Target], ir.Attribute | None] = no_device
