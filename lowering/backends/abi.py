"""Whether an object takes what its dispatch passes.

IREE launches a kernel by name and trusts it: a wrong number of bindings shows as corrupt memory at
run time.  So the parameters are read back from the object itself, before it is embedded, and
compared with the instance.  A CPU object does not record them; there the compiler checks its
definition against ``prototype(instance)`` and the object keeps the text of that declaration.
"""

from __future__ import annotations

import io
import platform
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import CompileError
from ..families.instance import Binding, KernelInstance

_POINTER_BYTES = 8
_CONSTANTS = ("rows",)  # i32 each, after the bindings
_C_TYPES = {"bfloat16": "u16", "float16": "u16", "float32": "float", "int8": "u8"}
_C_TYPES |= {"int32": "i32", "int64": "i64"}
_C_TYPES |= dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"), "u8")
_CPU_ABI_SECTION = ".vmfuse.abi"

_EM_CUDA, _EM_AMDGPU = 190, 224
_EM_CPU = {62: "x86_64", 183: "aarch64", 243: "riscv64", 40: "arm", 3: "i386"}


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
    """What an object says of itself: its architecture and the entry's parameters.

    ``prototype`` is the C declaration a CPU object was compiled against (``parameters`` is empty there).
    """

    arch: str
    parameters: tuple[Parameter, ...] = ()
    prototype: str | None = None


def check(instance: KernelInstance, data: bytes) -> ObjectAbi:
    """What ``data`` says of itself, once it is known to be the object of ``instance``.

    Raises CompileError, naming the entry, what the object has and what the dispatch passes, if the
    object is of another architecture, lacks the entry, needs symbols nobody provides or takes
    other parameters.
    """
    readers = {"cuda": _read_cubin, "hip": _read_code_object, "cpu": _read_cpu_object}
    abi = readers[instance.target.backend](instance, data)
    if instance.target.backend == "cpu":
        _compare_prototypes(instance, abi)
    else:
        _compare_parameters(instance, abi)
    return abi


def prototype(instance: KernelInstance) -> str:
    """The C declaration of a CPU instance: a pointer and an element offset each, then rows and workgroup."""
    pairs = [f"{_pointer(binding)}, i64" for binding in instance.bindings]
    return f"void {instance.entry}({', '.join([*pairs, 'i32', 'i32'])})"


def passed(instance: KernelInstance) -> tuple[Parameter, ...]:
    """The parameters a GPU dispatch of ``instance`` passes: a pointer per binding, then the i32 constants."""
    count = len(instance.bindings)
    pointers = (Parameter(_POINTER_BYTES * i, _POINTER_BYTES, "pointer") for i in range(count))
    constants = (Parameter(_POINTER_BYTES * count + 4 * i, 4, "value") for i in range(len(_CONSTANTS)))
    return (*pointers, *constants)


def _pointer(binding: Binding) -> str:
    constant = "const " if binding.access == "read" else ""
    return f"{constant}{_C_TYPES[binding.dtype]} *"


# -- comparing -------------------------------------------------------------------------------------


def _compare_parameters(instance: KernelInstance, abi: ObjectAbi) -> None:
    expected = passed(instance)
    if abi.arch != instance.target.arch:
        raise _mismatch(instance, f"is for {abi.arch}", f"is for {instance.target.arch}")
    agree = len(abi.parameters) == len(expected) and all(
        has.accepts(want) for has, want in zip(abi.parameters, expected, strict=True)
    )
    if not agree:
        names = ", ".join([*(binding.name for binding in instance.bindings), *_CONSTANTS])
        raise _mismatch(
            instance, f"takes {_describe(abi.parameters)}", f"passes {_describe(expected)} ({names})"
        )


def _compare_prototypes(instance: KernelInstance, abi: ObjectAbi) -> None:
    expected = prototype(instance)
    if abi.prototype is not None and abi.prototype != expected:
        raise _mismatch(instance, f"is '{abi.prototype}'", f"calls '{expected}'")


def _describe(parameters: tuple[Parameter, ...]) -> str:
    listed = (
        f"{'parameter' if p.kind == 'any' else p.kind} of {p.size} bytes at {p.offset}" for p in parameters
    )
    return f"{len(parameters)} parameters: {', '.join(listed)}"


def _mismatch(instance: KernelInstance, has: str, passes: str) -> CompileError:
    return CompileError(f"Kernel {instance.entry}: the object {has}; the dispatch {passes}.")


def _unreadable(instance: KernelInstance, why: str) -> CompileError:
    return CompileError(f"Kernel {instance.entry}: the object is no {instance.target.arch} object: {why}.")


# -- reading ELF -----------------------------------------------------------------------------------


def _elf(instance: KernelInstance, data: bytes) -> Any:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        return ELFFile(io.BytesIO(data))
    except ELFError as error:
        raise _unreadable(instance, str(error) or "not ELF") from error


def _machine(elf: Any) -> int:
    """``e_machine`` as a number: pyelftools names the ones it knows."""
    from elftools.elf.enums import ENUM_E_MACHINE

    machine = elf.header["e_machine"]
    return machine if isinstance(machine, int) else ENUM_E_MACHINE[machine]


def _section(elf: Any, name: str) -> bytes | None:
    section = elf.get_section_by_name(name)
    return section.data() if section is not None else None


# -- NVIDIA: .nv.info.<entry> ----------------------------------------------------------------------

_NV_SIZED = 4  # the format whose payload follows; the others carry at most two bytes
_NV_KPARAM_INFO, _NV_CBANK_PARAM_SIZE = 0x17, 0x19


def _read_cubin(instance: KernelInstance, data: bytes) -> ObjectAbi:
    elf = _elf(instance, data)
    if _machine(elf) != _EM_CUDA:
        raise _unreadable(instance, f"its machine is {elf.header['e_machine']}")
    info = _section(elf, f".nv.info.{instance.entry}")
    if info is None:
        raise _unreadable(instance, "it does not define the entry")
    attributes = list(_nv_attributes(info))
    parameters = sorted(
        (_nv_parameter(payload) for kind, payload in attributes if kind == _NV_KPARAM_INFO),
        key=lambda parameter: parameter.offset,
    )
    total = [int.from_bytes(size, "little") for kind, size in attributes if kind == _NV_CBANK_PARAM_SIZE]
    end = max((p.offset + p.size for p in parameters), default=0)
    if total != [end]:
        raise _unreadable(instance, f"its parameters end at byte {end}, their bank at {total}")
    return ObjectAbi(_nv_arch(elf), tuple(parameters))


def _nv_attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) pairs of .nv.info: format and attribute bytes, then a value or a sized blob."""
    at = 0
    while at + 4 <= len(info):
        form, kind, half = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _NV_SIZED:
            yield kind, info[at : at + half]
            at += half
        else:
            yield kind, info[at - 2 : at]


def _nv_parameter(payload: bytes) -> Parameter:
    """KPARAM_INFO: u32 index, u16 ordinal, u16 offset, u32 flags with the size above bit 18."""
    _, _, offset, flags = struct.unpack("<IHHI", payload)
    return Parameter(offset, flags >> 18)


def _nv_arch(elf: Any) -> str:
    """The -arch ptxas ran with, which its note keeps; the ELF flags alone do not tell sm_90a from sm_90."""
    note = _section(elf, ".note.nv.tkinfo") or b""
    if found := re.search(rb"-arch (sm_\w+)", note):
        return found[1].decode()
    flags = elf.header["e_flags"]
    newer = elf.header["e_ident"]["EI_ABIVERSION"] >= 8
    return f"sm_{flags >> 8 & 0xFF if newer else flags & 0xFF}"


# -- AMD: the metadata note ------------------------------------------------------------------------

_NT_AMDGPU_METADATA = 32


def _read_code_object(instance: KernelInstance, data: bytes) -> ObjectAbi:
    elf = _elf(instance, data)
    if _machine(elf) != _EM_AMDGPU:
        raise _unreadable(instance, f"its machine is {elf.header['e_machine']}")
    metadata = _amd_metadata(instance, elf)
    kernels = {kernel[".name"]: kernel for kernel in metadata["amdhsa.kernels"]}
    if instance.entry not in kernels:
        raise _unreadable(instance, f"it defines {sorted(kernels)}, not the entry")
    # Hidden arguments are the launcher's to fill, and IREE fills none.
    arguments = kernels[instance.entry][".args"]
    arch = metadata["amdhsa.target"].split("--")[-1].split(":")[0]
    return ObjectAbi(arch, tuple(_amd_parameter(argument) for argument in arguments))


def _amd_metadata(instance: KernelInstance, elf: Any) -> dict[str, Any]:
    import msgpack

    for segment in elf.iter_segments("PT_NOTE"):
        for note in segment.iter_notes():
            if note["n_name"] == "AMDGPU" and note["n_type"] in (_NT_AMDGPU_METADATA, "NT_AMDGPU_METADATA"):
                return msgpack.unpackb(note["n_descdata"])
    raise _unreadable(instance, "it has no AMDGPU metadata note")


def _amd_parameter(argument: dict[str, Any]) -> Parameter:
    kinds = {"global_buffer": "pointer", "by_value": "value"}
    kind: str = argument[".value_kind"]
    return Parameter(argument[".offset"], argument[".size"], kinds.get(kind, kind))


# -- CPU: symbols and the recorded declaration -----------------------------------------------------


def _read_cpu_object(instance: KernelInstance, data: bytes) -> ObjectAbi:
    if platform.system() != "Linux":  # Mach-O or COFF: the compiler's check of the prototype has to do
        return ObjectAbi(platform.machine())
    elf = _elf(instance, data)
    arch = _EM_CPU.get(_machine(elf), str(elf.header["e_machine"]))
    if arch != platform.machine():
        raise _mismatch(instance, f"is for {arch}", f"runs on {platform.machine()}")
    symbols = [s for s in elf.get_section_by_name(".symtab").iter_symbols() if s.name]
    undefined = sorted(s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF")
    if undefined:
        raise _unreadable(instance, f"it needs {', '.join(undefined)}, and nothing else is linked")
    if not any(s.name == instance.entry and s["st_info"]["bind"] == "STB_GLOBAL" for s in symbols):
        raise _unreadable(instance, "it does not define the entry")
    text = _section(elf, _CPU_ABI_SECTION)
    if text is None:
        raise _unreadable(instance, "it does not record its parameters")
    return ObjectAbi(arch, prototype=text.rstrip(b"\0").decode())
