"""The executor's process: answers what ``module.c`` asks.

Requests and answers are described there.  Errors cross as a hipError_t and one sentence.  The process ends
when the other end of the socket is closed.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol


class HipError(IntEnum):
    """The errors a launch or a load can end with, by HIP's numbers."""

    INVALID_IMAGE = 200
    NO_BINARY_FOR_GPU = 209
    NOT_FOUND = 500
    ILLEGAL_ADDRESS = 700
    LAUNCH_TIMEOUT = 702
    LAUNCH_FAILURE = 719


class Failure(Exception):
    """Hold what is answered instead of a result: a hipError_t and one sentence."""

    def __init__(self, code: HipError, sentence: str):
        super().__init__(sentence)
        self.code = code


class MemoryKind(IntEnum):
    """Of an allocation; as in internal.h."""

    DEVICE = 0
    MANAGED = 1
    HOST = 2
    REGISTERED = 3


@dataclass(frozen=True)
class Block:
    """One live allocation, where this process sees it too."""

    base: int
    size: int
    kind: MemoryKind

    @property
    def written_by_host(self) -> bool:
        """Tell whether the host may write it at any time without a word."""
        return self.kind is not MemoryKind.DEVICE


@dataclass(frozen=True)
class KernelInfo:
    """Hold what HIP asks about a kernel: sizes in bytes, and the (offset, size) of each explicit argument."""

    argument_bytes: int
    lds_bytes: int
    scratch_bytes: int
    registers: int
    max_threads: int
    arguments: Sequence[tuple[int, int]]

    def pack(self, identity: int) -> bytes:
        """As ``struct kernel`` of module.c."""
        sizes = (self.argument_bytes, self.lds_bytes, self.scratch_bytes, self.registers, self.max_threads)
        flat = [number for argument in self.arguments for number in argument]
        return struct.pack(f"<Q6I{len(flat)}I", identity, *sizes, len(self.arguments), *flat)


@dataclass(frozen=True)
class Launch:
    """One launch; ``grid`` in workgroups, ``block`` in lanes, ``arguments`` the explicit kernel arguments.

    ``blocks`` is all that is allocated, ``written`` the (address, size) of what the host wrote since the
    launch before.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_lds: int
    blocks: Sequence[Block]
    written: Sequence[tuple[int, int]]
    arguments: bytes


class Kernel(Protocol):
    """A kernel that can be launched."""

    @property
    def info(self) -> KernelInfo: ...

    def launch(self, launch: Launch) -> None:
        """Run to completion; raises Failure."""
        ...


class Gpu(Protocol):
    """Hold what executes kernels."""

    def load(self, image: bytes) -> dict[str, Kernel]:
        """The kernels of a code object, by name; raises Failure."""
        ...


class _Requests(IntEnum):
    HELLO = 1
    LOAD = 2
    UNLOAD = 3
    FIND = 4
    LAUNCH = 5


_HEADER = struct.Struct("<iIQ")


class Server:
    """One end of the conversation: ``gpu`` makes the machine, given the architecture."""

    def __init__(self, connection: socket.socket, memory: int, gpu: Callable[[str], Gpu]):
        self._connection = connection
        self._memory = memory
        self._make = gpu
        self._gpu: Gpu | None = None
        self._modules: dict[int, dict[str, Kernel]] = {}
        self._kernels: dict[int, Kernel] = {}

    def run(self) -> None:
        """Answer requests until the other end is closed."""
        handlers = {
            _Requests.HELLO: self._hello,
            _Requests.LOAD: self._load,
            _Requests.UNLOAD: self._unload,
            _Requests.FIND: self._find,
            _Requests.LAUNCH: self._launch,
        }
        while (header := self._receive(_HEADER.size)) is not None:
            kind, _, size = _HEADER.unpack(header)
            payload = self._receive(size)
            if payload is None:
                return
            try:
                code, answer = 0, handlers[_Requests(kind)](payload)
            except Failure as failure:
                code, answer = int(failure.code), _one_line(str(failure))
            self._connection.sendall(_HEADER.pack(code, 0, len(answer)) + answer)

    def _receive(self, size: int) -> bytes | None:
        """Exactly ``size`` bytes, or None at the end."""
        parts = bytearray()
        while len(parts) < size:
            part = self._connection.recv(min(size - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)

    def _hello(self, payload: bytes) -> bytes:
        base, size = struct.unpack_from("<2Q", payload)
        _map_at(self._memory, base, size)
        self._gpu = self._make(payload[16:].decode())
        return b""

    def _load(self, payload: bytes) -> bytes:
        assert self._gpu is not None, "HELLO comes first"
        identity = len(self._modules) + 1
        self._modules[identity] = self._gpu.load(payload)
        return struct.pack("<Q", identity)

    def _unload(self, payload: bytes) -> bytes:
        (identity,) = struct.unpack("<Q", payload)
        self._modules[identity] = {}
        return b""

    def _find(self, payload: bytes) -> bytes:
        (module,) = struct.unpack_from("<Q", payload)
        name, kernels = payload[8:].decode(), self._modules[module]
        if name not in kernels:
            raise Failure(HipError.NOT_FOUND, f"the module has no kernel {name}; it has {', '.join(kernels)}")
        identity = len(self._kernels) + 1
        self._kernels[identity] = kernels[name]
        return kernels[name].info.pack(identity)

    def _launch(self, payload: bytes) -> bytes:
        kernel, blocks, writes, argument_bytes = struct.unpack_from("<4Q", payload)
        gx, gy, gz, bx, by, bz, dynamic_lds, _ = struct.unpack_from("<8I", payload, 32)
        at = 64
        live = [
            Block(base, size, MemoryKind(k)) for base, size, k in _records("<QQi12x", payload, at, blocks)
        ]
        at += 32 * blocks
        written = list(_records("<QQ", payload, at, writes))
        at += 16 * writes
        arguments = payload[at : at + argument_bytes]
        launch = Launch((gx, gy, gz), (bx, by, bz), dynamic_lds, live, written, arguments)
        self._kernels[kernel].launch(launch)
        return b""


def _records(form: str, payload: bytes, at: int, count: int) -> Iterator[tuple[Any, ...]]:
    return struct.iter_unpack(form, payload[at : at + count * struct.calcsize(form)])


def _one_line(text: str) -> bytes:
    """Give what the other end has room for, as it prints it."""
    return " ".join(text.split()).encode()[:1000]


def _map_at(file: int, base: int, size: int) -> None:
    """Map ``file`` where the other process has it, so that an address means the same in both."""
    fixed, shared, sparse, readable_writable = 0x100000, 0x01, 0x4000, 0x3
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    mapped = libc.mmap(base, size, readable_writable, fixed | shared | sparse, file, 0)
    if mapped != base:
        raise Failure(HipError.LAUNCH_FAILURE, f"the device's memory cannot be mapped at {base:#x}")


def serve(gpu: Callable[[str], Gpu]) -> None:
    """Be the process that ``module.c`` starts: the last two arguments are the socket and the memory."""
    descriptor, memory = (int(word) for word in sys.argv[-2:])
    with socket.socket(fileno=descriptor) as connection:
        Server(connection, memory, gpu).run()
