"""Write parameter archives (.irpa) in their file format, a tensor at a time.

Where everything lies follows from names and sizes, so the file can be laid out before any tensor exists,
and the tensors be written in any order and from several threads.  Beside each tensor the archive keeps
a description with the SHA-256 and the CRC-32 of its bytes: by the former the small index at the head of the
file tells two archives apart by all of their content, without the data being read; by the latter the data
are checked (``integrity``), which is faster.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..signature import IRPA_HEADER

# The entry of a tensor: size, kind, flags, (offset, length) of name, of description, alignment, of data.
_ENTRY = struct.Struct("<QIQ2Q2QQ2Q")
_ENTRY_STRIDE = 80
_DATA = 2
_ALIGNMENT = 64
_FILE_ALIGNMENT = 4096
_CHUNK = 16 << 20


@dataclass(frozen=True)
class TensorType:
    """Hold what must be known of a tensor to lay it out."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def describe(self, digest: str) -> bytes:
        """Write what an archive says of a tensor, at one length: ``bfloat16[8, 16] sha256:... crc32:...``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.shape)} {digest}".encode()


_NO_DIGEST = f"sha256:{'0' * 64} crc32:{'0' * 8}"


class ArchiveWriter:
    """Writes an archive of the given tensors to an open file, in any order; ``finish`` ends it."""

    def __init__(self, descriptor: int, types: Mapping[str, TensorType]):
        self._descriptor = descriptor
        self._types = dict(types)
        self._digests: dict[str, str] = {}
        entries = max(len(types) - 1, 0) * _ENTRY_STRIDE + (_ENTRY.size if types else 0)
        names = sum(len(name.encode()) for name in types)
        described = sum(len(type_.describe(_NO_DIGEST)) for type_ in types.values())
        self._entries = (_aligned(IRPA_HEADER.size, 16), entries)
        self._metadata = (sum(self._entries), names + described)
        begin = _aligned(sum(self._metadata), _ALIGNMENT)
        self._offsets: dict[str, int] = {}
        end = begin
        for name, type_ in types.items():
            self._offsets[name] = end
            end += _aligned(type_.nbytes, _ALIGNMENT)
        self._storage = (begin, end - begin)
        os.ftruncate(descriptor, _aligned(end, _FILE_ALIGNMENT))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the bytes of ``tensor``: contiguous, on the CPU, and of the type given for ``name``."""
        type_ = self._types[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (type_.dtype, type_.shape), name
        # A zero-dimensional or fp8 tensor has no buffer protocol of its own: pass its bytes.
        data = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        digest, check = hashlib.sha256(), 0
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            digest.update(chunk)
            check = zlib.crc32(chunk, check)
            _write_all(self._descriptor, chunk, self._offsets[name] + start)
        self._digests[name] = f"sha256:{digest.hexdigest()} crc32:{check:08x}"

    def finish(self) -> None:
        """Write the index; every tensor has been written."""
        entries, metadata = bytearray(), bytearray()
        for name, type_ in self._types.items():
            spans = []
            for text in (name.encode(), type_.describe(self._digests[name])):
                spans += [len(metadata), len(text)]
                metadata += text
            offset = self._offsets[name] - self._storage[0]
            entry = _ENTRY.pack(_ENTRY.size, _DATA, 0, *spans, _ALIGNMENT, offset, type_.nbytes)
            entries += bytes(-len(entries) % 16) + entry
        segments = (*self._entries, *self._metadata, *self._storage)
        header = IRPA_HEADER.pack(b"IRPA", 0, 0, IRPA_HEADER.size, 0, 0, len(self._types), *segments)
        head = header + bytes(self._entries[0] - len(header)) + entries + metadata
        _write_all(self._descriptor, memoryview(head), 0)


def stored_tensors(data: memoryview) -> Iterator[tuple[str, str, memoryview]]:
    """Name, description and bytes of each tensor of an archive; ValueError where its index is damaged."""
    magic, *_, count, entry, _, texts, _, storage, length = IRPA_HEADER.unpack_from(data)
    if magic != b"IRPA" or storage + length > len(data):
        raise ValueError("it is no complete .irpa parameter archive")
    for _ in range(count):
        size, kind, _, *spans, _, offset, nbytes = _ENTRY.unpack_from(data, entry)
        entry += _aligned(size, 16)
        if kind != _DATA:
            continue
        name, description = (
            bytes(data[texts + begin : texts + begin + many]).decode()
            for begin, many in (spans[:2], spans[2:])
        )
        if offset + nbytes > length:
            raise ValueError(f"its tensor {name} is cut off")
        yield name, description, data[storage + offset : storage + offset + nbytes]


def _aligned(size: int, alignment: int) -> int:
    return size + -size % alignment


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
