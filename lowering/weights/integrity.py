"""Check that the bytes of a program and of its weights are the ones that were written.

The check value is CRC-32, which a .vmfb, being a ZIP archive, holds for each of its parts already, and an
.irpa beside each tensor.  It finds what disks, networks and half-finished copies do, every single flipped bit
included; it is no defence against someone who means to deceive, and a program is native code anyway.  zlib
computes it at several GB/s on a core, over mapped memory: nothing is copied.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .archive import stored_tensors

_CHUNK = 64 << 20


class Damaged(ValueError):
    """Bytes are not those that were written; the message says which."""


Part = tuple[str, memoryview, int]
"""A name, the bytes, and the CRC-32 they must have."""


def mapped(path: Path) -> memoryview:
    """The bytes of a file, mapped and not read; the mapping goes with the last view of it."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def parts_of_program(data: memoryview, entries: Iterable[zipfile.ZipInfo]) -> Iterator[Part]:
    """The entries of a .vmfb; Damaged for one that lies outside the file or is compressed."""
    for entry in entries:
        begin = entry.header_offset
        header = data[begin : begin + 30]
        if (
            len(header) < 30
            or bytes(header[:4]) != b"PK\x03\x04"
            or entry.compress_type != zipfile.ZIP_STORED
        ):
            raise Damaged(f"its part {entry.filename} has no header")
        begin += 30 + sum(struct.unpack("<2H", header[26:30]))
        if begin + entry.file_size > len(data):
            raise Damaged(f"its part {entry.filename} is cut off")
        yield entry.filename, data[begin : begin + entry.file_size], entry.CRC


def parts_of_archive(data: memoryview) -> Iterator[Part]:
    """The tensors of an .irpa that have a check value; those that other tools write have none."""
    for name, description, tensor in stored_tensors(data):
        _, found, value = description.partition(" crc32:")
        if found:
            yield name, tensor, int(value[:8], 16)


def check(parts: Iterable[Part]) -> None:
    """Raise Damaged, naming a part whose bytes have another CRC-32; several are read at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for damage in pool.map(_damage, list(parts)):
            if damage:
                raise Damaged(damage)


def _damage(part: Part) -> str | None:
    name, data, expected = part
    value = 0
    for begin in range(0, len(data), _CHUNK):  # lets other threads in between
        value = zlib.crc32(data[begin : begin + _CHUNK], value)
    return None if value == expected else f"the checksum of {name} is not that of what was written"
