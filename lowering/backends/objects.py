"""Read objects: what one says of its parameters, compared with what its dispatch passes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CompileError
from ..families.instance import KernelInstance

_POINTER_BYTES = 8


_CONSTANTS = ("rows",)  # i32 each, after the bindings


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: ``kind`` is 'pointer', 'value', AMD's word, or 'any' if not told."""

    offset: int
    size: int
    kind: str = "any"

    def accepts(self, other: Parameter) -> bool:
        kinds_agree = "any" in (self.kind, other.kind) or self.kind == other.kind
        return (self.offset, self.size) == (other.offset, other.size) and kinds_agree


@dataclass(frozen=True)
class ObjectAbi:
    """Hold what an object says of itself: its architecture and the entry's parameters.

    ``prototype`` is the C declaration a CPU object was compiled against (``parameters`` is empty there).
    """

    arch: str
    parameters: tuple[Parameter, ...] = ()
    prototype: str | None = None


def passed(instance: KernelInstance) -> tuple[Parameter, ...]:
    """The parameters a GPU dispatch of ``instance`` passes: a pointer per binding, then the i32 constants."""
    count = len(instance.bindings)
    pointers = (Parameter(_POINTER_BYTES * i, _POINTER_BYTES, "pointer") for i in range(count))
    constants = (Parameter(_POINTER_BYTES * count + 4 * i, 4, "value") for i in range(len(_CONSTANTS)))
    return (*pointers, *constants)


def check_parameters(
    read: Callable[[KernelInstance, bytes], ObjectAbi], instance: KernelInstance, data: bytes
) -> ObjectAbi:
    """Read an object with ``read``; CompileError unless it takes what a GPU dispatch passes."""
    abi = read(instance, data)
    _compare_parameters(instance, abi)
    return abi


def _compare_parameters(instance: KernelInstance, abi: ObjectAbi) -> None:
    expected = passed(instance)
    if abi.arch != instance.target.arch:
        raise mismatch(instance, f"is for {abi.arch}", f"is for {instance.target.arch}")
    agree = len(abi.parameters) == len(expected) and all(
        has.accepts(want) for has, want in zip(abi.parameters, expected, strict=True)
    )
    if not agree:
        names = ", ".join([*(binding.name for binding in instance.bindings), *_CONSTANTS])
        raise mismatch(
            instance, f"takes {_describe(abi.parameters)}", f"passes {_describe(expected)} ({names})"
        )


def _describe(parameters: tuple[Parameter, ...]) -> str:
    listed = (
        f"{'parameter' if p.kind == 'any' else p.kind} of {p.size} bytes at {p.offset}" for p in parameters
    )
    return f"{len(parameters)} parameters: {', '.join(listed)}"


def mismatch(instance: KernelInstance, has: str, passes: str) -> CompileError:
    """An object that is one for the target, and not the instance's."""
    return CompileError(f"Kernel {instance.entry}: the object {has}; the dispatch {passes}.")


def unreadable(instance: KernelInstance, why: str) -> CompileError:
    """Refuse what is no object for the target."""
    return CompileError(f"Kernel {instance.entry}: the object is no {instance.target.arch} object: {why}.")


def elf_of(instance: KernelInstance, data: bytes, machine: int | None = None) -> Any:
    """Open ``data`` with pyelftools; CompileError where it is no ELF file, or none for ``machine``."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(data))
    except ELFError as error:
        raise unreadable(instance, str(error) or "not ELF") from error
    if machine not in (None, machine_of(elf)):
        raise unreadable(instance, f"its machine is {elf.header['e_machine']}")
    return elf


def machine_of(elf: Any) -> int:
    """``e_machine`` as a number: pyelftools names the ones it knows."""
    from elftools.elf.enums import ENUM_E_MACHINE

    machine = elf.header["e_machine"]
    return machine if isinstance(machine, int) else ENUM_E_MACHINE[machine]


def section(elf: Any, name: str) -> bytes | None:
    """The bytes of the section called ``name``; None if there is none."""
    found = elf.get_section_by_name(name)
    return found.data() if found is not None else None
