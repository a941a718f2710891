"""Loads an AMD code object: an ELF image in host memory, and what its kernels ask of a launch.

The image is laid out as the loader of a GPU would lay it out, so code that addresses its constants
relative to the program counter works.  Sources: the AMDGPU backend's documentation of code object
version 5 (kernel descriptor, metadata note, register setup).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from .errors import CodeObjectError

_EM_AMDGPU = 224
_ARCHITECTURES = {0x04C: "gfx942", 0x04F: "gfx950"}
_ABS64, _RELATIVE64 = 3, 13  # relocations
_NOTE = ("NT_AMDGPU_METADATA", 32)
_DESCRIPTOR_BYTES = 64
# Where a kernel with preloaded arguments starts: after code for firmware that does not preload.
_PRELOADED_ENTRY = 256

# What the first user SGPRs hold, in order: the bit that asks for it, its name, its registers.
_USER_SGPRS = (
    (0, "private_segment_buffer", 4),
    (1, "dispatch_ptr", 2),
    (2, "queue_ptr", 2),
    (3, "kernarg_segment_ptr", 2),
    (4, "dispatch_id", 2),
    (5, "flat_scratch_init", 2),
    (6, "private_segment_size", 1),
)


@dataclass(frozen=True)
class Argument:
    """One kernel argument as the metadata declares it; ``kind`` is the ``.value_kind``."""

    offset: int
    size: int
    kind: str

    @property
    def hidden(self) -> bool:
        return self.kind.startswith("hidden_")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a code object.

    ``vgprs`` and ``agprs`` are what the hardware allocates to a lane, ``lds_bytes`` what a workgroup
    needs before any dynamic LDS, ``scratch_bytes`` what a lane needs.  ``mode`` is the initial MODE
    register, ``user_sgprs`` names with their numbers of registers, ``preload`` (first, count) the dwords of
    the kernel arguments that are put into SGPRs.
    """

    name: str
    code: CodeObject = field(repr=False)
    entry: int  # offset in the code section
    arguments: tuple[Argument, ...]
    kernarg_bytes: int
    vgprs: int
    agprs: int
    sgprs: int
    lds_bytes: int
    scratch_bytes: int
    mode: int
    user_sgpr_count: int
    user_sgprs: tuple[tuple[str, int], ...]
    workgroup_ids: int
    preload: tuple[int, int]
    max_workgroup_size: int


@dataclass(frozen=True)
class Segment:
    """A loaded range of the image: offset, size, and whether kernels may write it."""

    offset: int
    size: int
    writable: bool


# What reading bytes that are no code object ends in.
_UNREADABLE = (ELFError, LookupError, ValueError, AttributeError, TypeError, ArithmeticError, struct.error)
_LARGEST_IMAGE = 1 << 32
_LARGEST_KERNARG = 1 << 16


class CodeObject:
    """A loaded code object.  Raises CodeObjectError when the bytes are not one for gfx950 or gfx942."""

    def __init__(self, data: bytes) -> None:
        self.data = bytes(data)
        try:
            self._elf = ELFFile(io.BytesIO(self.data))
            self.arch = self._architecture()
            self.segments, self.image = self._load()
            text = self._section(".text")
            self.text_offset, self.text_bytes = text["sh_addr"], text["sh_size"]
            self._relocate()
            self.kernels = {kernel.name: kernel for kernel in self._read_kernels()}
        except _UNREADABLE as error:
            raise CodeObjectError(
                f"These {len(data)} bytes are no complete AMD code object ({error!r}). "
                "Compile the kernel again, and link it: a relocatable .o will not do."
            ) from error

    @property
    def base(self) -> int:
        """The host address of the image."""
        return self.image.ctypes.data

    @property
    def text(self) -> bytes:
        return self.image[self.text_offset : self.text_offset + self.text_bytes].tobytes()

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``; CodeObjectError names those there are."""
        if name not in self.kernels:
            known = ", ".join(sorted(self.kernels)) or "none"
            raise CodeObjectError(f"There is no kernel {name!r} in this code object; it has {known}.")
        return self.kernels[name]

    def _architecture(self) -> str:
        machine = self._elf.header["e_machine"]
        if machine not in ("EM_AMDGPU", _EM_AMDGPU):
            raise CodeObjectError(f"This is an ELF file for {machine}, not for an AMD GPU.")
        mach = self._elf.header["e_flags"] & 0xFF
        if mach not in _ARCHITECTURES:
            known = " and ".join(sorted(_ARCHITECTURES.values()))
            raise CodeObjectError(f"This code object is for AMD machine {mach:#x}; only {known} can be run.")
        return _ARCHITECTURES[mach]

    def _load(self) -> tuple[tuple[Segment, ...], np.ndarray]:
        loads = list(self._elf.iter_segments("PT_LOAD"))
        size = max(segment["p_vaddr"] + segment["p_memsz"] for segment in loads)
        if size > _LARGEST_IMAGE:
            raise ValueError(f"its segments reach to byte {size}")
        backing = np.zeros(size + 4096, np.uint8)
        start = -backing.ctypes.data % 4096
        image = backing[start : start + size]
        for segment in loads:
            data = np.frombuffer(segment.data(), np.uint8)
            if len(data) != segment["p_filesz"]:
                raise ValueError(f"a segment of {segment['p_filesz']} bytes has {len(data)}")
            image[segment["p_vaddr"] : segment["p_vaddr"] + len(data)] = data
        segments = (Segment(s["p_vaddr"], s["p_memsz"], bool(s["p_flags"] & 2)) for s in loads)
        return tuple(segments), image

    def _section(self, name: str) -> Any:
        section = self._elf.get_section_by_name(name)
        if section is None:
            raise ValueError(f"it has no section {name}")
        return section

    def _relocate(self) -> None:
        for name in (".rela.dyn", ".rela.plt"):
            section: Any = self._elf.get_section_by_name(name)
            for relocation in section.iter_relocations() if section else ():
                value = self.base + relocation["r_addend"]
                if relocation["r_info_type"] == _ABS64:
                    symbol = self._section(".dynsym").get_symbol(relocation["r_info_sym"])
                    if symbol["st_shndx"] == "SHN_UNDEF":
                        raise CodeObjectError(f"This code object needs {symbol.name}, which nothing defines.")
                    value += symbol["st_value"]
                elif relocation["r_info_type"] != _RELATIVE64:
                    raise ValueError(f"a relocation of type {relocation['r_info_type']}")
                at = relocation["r_offset"]
                self.image[at : at + 8] = np.frombuffer(struct.pack("<Q", value), np.uint8)

    def _metadata(self) -> dict[str, Any]:
        elf: Any = self._elf
        for segment in elf.iter_segments("PT_NOTE"):
            for note in segment.iter_notes():
                if note["n_name"] == "AMDGPU" and note["n_type"] in _NOTE:
                    return msgpack.unpackb(note["n_descdata"])
        raise ValueError("it has no AMDGPU metadata note")

    def _read_kernels(self) -> list[Kernel]:
        symbols = {s.name: s["st_value"] for s in self._section(".dynsym").iter_symbols()}
        return [self._read_kernel(entry, symbols) for entry in self._metadata()["amdhsa.kernels"]]

    def _read_kernel(self, metadata: dict[str, Any], symbols: dict[str, int]) -> Kernel:
        at = symbols[metadata[".symbol"]]
        raw = self.image[at : at + _DESCRIPTOR_BYTES].tobytes()
        lds, scratch, kernarg, entry = struct.unpack_from("<III4xq", raw)
        rsrc3, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", raw, 44)
        total = ((rsrc1 & 0x3F) + 1) * 8
        vgprs = min(((rsrc3 & 0x3F) + 1) * 4, total)
        start = at + entry - self.text_offset + (_PRELOADED_ENTRY if preload & 0x7F else 0)
        if not 0 <= start < self.text_bytes or start % 4:
            raise ValueError(f"the kernel {metadata['.name']} starts at byte {start} of its code")
        kernarg = max(kernarg, metadata.get(".kernarg_segment_size", 0))
        return Kernel(
            name=metadata[".name"],
            code=self,
            entry=start,
            arguments=_arguments(metadata, kernarg),
            kernarg_bytes=kernarg,
            vgprs=vgprs,
            agprs=total - vgprs,
            sgprs=metadata[".sgpr_count"],
            lds_bytes=lds,
            scratch_bytes=scratch,
            mode=_mode(rsrc1),
            user_sgpr_count=rsrc2 >> 1 & 0x1F,
            user_sgprs=tuple((name, size) for bit, name, size in _USER_SGPRS if properties >> bit & 1),
            workgroup_ids=rsrc2 >> 7 & 7,
            preload=(preload >> 7, preload & 0x7F),
            max_workgroup_size=metadata[".max_flat_workgroup_size"],
        )


def _arguments(metadata: dict[str, Any], segment_bytes: int) -> tuple[Argument, ...]:
    declared = metadata.get(".args", ())
    arguments = tuple(Argument(a[".offset"], a[".size"], a[".value_kind"]) for a in declared)
    inside = all(a.offset >= 0 and a.size > 0 and a.offset + a.size <= segment_bytes for a in arguments)
    if not inside or segment_bytes > _LARGEST_KERNARG:
        raise ValueError(f"the arguments of {metadata['.name']} do not fit {segment_bytes} bytes")
    return arguments


def _mode(rsrc1: int) -> int:
    """The initial MODE: rounding and subnormals, DX10_CLAMP, IEEE, FP16_OVFL."""
    return (
        _bits(rsrc1, 12, 8) | _bits(rsrc1, 21, 1) << 8 | _bits(rsrc1, 23, 1) << 9 | _bits(rsrc1, 26, 1) << 23
    )


def _bits(word: int, low: int, count: int) -> int:
    return word >> low & (1 << count) - 1
