"""The library between IREE and CUDA, before a driver on the host that does at once what it is asked, and
counts.

The tests do what IREE does: they ask the library for the driver's functions, and call those.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lowering.host_compiler import c_compiler, hosted
from lowering.runtime import driver_library, graphs

IREE_VERSION, OTHER_VERSION = 11030, 12000
PROGRAM = 7
STREAM = ctypes.c_void_p(64)

Floats = ctypes.c_float * 8


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The library, and the driver that it stands before."""
    file = tmp_path_factory.mktemp("fake") / "libfake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([*hosted(c_compiler()), "-shared", "-fPIC", "-w", source, "-o", file], check=True)
    return _before(file), ctypes.CDLL(str(file))


def _before(driver: Path) -> ctypes.CDLL:
    """The library, under no name that IREE in this process would find it by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(driver_library._DEFINES, "cuda", ("-DFOR_CUDA",))
        return driver_library.opened("cuda", str(driver))


class Cuda:
    """The driver's functions as IREE gets them from the library; each has to succeed."""

    def __init__(self, library: ctypes.CDLL, driver: ctypes.CDLL, version: int = IREE_VERSION):
        self.library, self.driver, self._version = library, driver, version
        driver.kernel.restype = ctypes.c_void_p

    def function(self, name: str) -> int:
        found = ctypes.c_void_p()
        code = self.library.cuGetProcAddress(
            name.encode(), ctypes.byref(found), self._version, ctypes.c_uint64(0)
        )
        assert code == 0 and found.value
        return found.value

    def __call__(self, name: str, *arguments) -> None:
        assert ctypes.CFUNCTYPE(ctypes.c_int)(self.function(name))(*arguments) == 0

    def count(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.driver, name).value

    def allocate(self, program: int = PROGRAM) -> int:
        """32 bytes, as when a program is loaded."""
        base = ctypes.c_uint64()
        self.library.tape_load(program)
        self("cuMemAlloc", ctypes.byref(base), ctypes.c_size_t(32))
        self.library.tape_load(0)
        return base.value

    def scale(self, source: int, target: int, scale: int, count: int = 8, extra: bytes = b"") -> None:
        """Launch the kernel; a number of 4 bytes lies in 8, as IREE has it, beside what was there before."""
        stale = (0x7F0000000000 | scale, 0x7F0000000000 | count)
        slots = (ctypes.c_uint64 * 4)(source, target, *stale)
        parameters = (ctypes.c_void_p * 4)(*[ctypes.addressof(slots) + 8 * i for i in range(4)])
        one = [ctypes.c_uint(1)] * 6
        kernel = ctypes.c_void_p(self.driver.kernel())
        self("cuLaunchKernel", kernel, *one, ctypes.c_uint(0), STREAM, parameters, extra or None)

    def fill(self, target: int, value: int, bits: int, count: int) -> None:
        kind = {8: ctypes.c_ubyte, 16: ctypes.c_ushort, 32: ctypes.c_uint}[bits]
        self(f"cuMemsetD{bits}Async", ctypes.c_uint64(target), kind(value), ctypes.c_size_t(count), STREAM)

    def copy(self, target: int, source: int, size: int) -> None:
        self("cuMemcpyAsync", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), STREAM)

    def update(self, target: int, data: bytes) -> None:
        self("cuMemcpyHtoDAsync", ctypes.c_uint64(target), data, ctypes.c_size_t(len(data)), STREAM)


class Recorded:
    """A tape of what ``issue`` does, with memory at ``buffers`` (addresses of 32 bytes)."""

    def __init__(self, cuda: Cuda, buffers: Sequence[int], issue: Callable[[], None]):
        self.cuda, self.library = cuda, cuda.library
        numbers = ctypes.c_uint64 * len(buffers)
        self.tape = self.library.tape_begin(
            PROGRAM, numbers(*buffers), numbers(*[32] * len(buffers)), len(buffers)
        )
        assert self.tape
        try:
            issue()
        finally:
            self.library.tape_end(self.tape)
        self.reason = self.library.tape_reason(self.tape).decode()

    def play(self, buffers: Sequence[int]) -> int:
        return self.library.tape_play(self.tape, (ctypes.c_uint64 * len(buffers))(*buffers), STREAM)


@pytest.fixture
def cuda(libraries) -> Iterator[Cuda]:
    found = Cuda(*libraries)
    found("cuCtxPushCurrent", ctypes.c_void_p(8))
    yield found
    found("cuCtxPopCurrent", ctypes.byref(ctypes.c_void_p()))
    assert found.count("contexts") == 0


def memory(*values: float) -> ctypes.Array:
    return Floats(*values, *[0.0] * (8 - len(values)))


def at(*arrays: ctypes.Array) -> list[int]:
    return [ctypes.addressof(array) for array in arrays]


@pytest.mark.parametrize("captured", [False, True])
def test_it_is_done_again_at_other_addresses(cuda: Cuda, captured):
    """Kernels, copies and fills in order; weights where they were; copies from the host as they were.

    A stream that the caller captures is given each of them, any other a graph.
    """
    weights, x, y, scratch = cuda.allocate(), memory(1, 2), memory(9, 9), memory(7)
    cuda.update(weights, bytes(memory(10, 20)))
    host = ctypes.create_string_buffer(bytes(memory(0, 100)), 32)

    def issue() -> None:
        cuda.update(at(scratch)[0], host.raw)
        cuda.fill(at(y)[0], 0, 32, 8)
        cuda.fill(at(y)[0] + 8, 0x3F80, 16, 2)  # its address is within
        cuda.scale(at(x)[0], at(y)[0], 2)
        cuda.scale(weights, at(y)[0], 3)
        cuda.copy(at(y)[0] + 28, at(x)[0] + 4, 4)
        cuda.fill(at(y)[0] + 24, 0, 8, 4)
        cuda.scale(at(scratch)[0], at(y)[0], 1)

    recorded = Recorded(cuda, at(x, y, scratch), issue)
    assert recorded.reason == "" and recorded.library.tape_operations(recorded.tape) == 8
    ctypes.memset(host, 0, 32)
    graphs_before = cuda.count("graph_launches")
    ctypes.c_int.in_dll(cuda.driver, "is_capturing").value = captured
    expected = list(y)
    assert expected[:2] == [32, 164] and expected[2] != 0
    for _ in range(3):
        other, result, rest = memory(1, 2), memory(5, 5, 5, 5, 5, 5, 5, 5), memory(4, 4)
        assert recorded.play(at(other, result, rest)) == 0
        assert list(result) == expected
    other[0] = 2
    assert recorded.play(at(other, result, rest)) == 0
    assert result[0] == expected[0] + 2
    ctypes.c_int.in_dll(cuda.driver, "is_capturing").value = 0
    assert list(y) == expected  # what was recorded is not touched again
    assert cuda.count("graph_launches") - graphs_before == (0 if captured else 4)
    assert recorded.library.tape_captured(recorded.tape) == captured
    recorded.library.tape_drop(recorded.tape)


def test_a_graph_is_changed_where_it_has_to_be(cuda: Cuda):
    """Four sets of addresses are kept, then the one used least recently is changed, in nodes that move."""
    x, y = memory(1), memory()
    recorded = Recorded(cuda, at(x, y), lambda: [cuda.scale(*at(x, x), 1), cuda.scale(*at(x, y), 1)])
    before = {name: cuda.count(name) for name in ("changes", "graph_launches", "executables", "launches")}

    def since(name: str) -> int:
        return cuda.count(name) - before[name]

    results = [memory() for _ in range(5)]
    for result in results[:4]:
        recorded.play(at(x, result))
    assert (since("executables"), since("changes")) == (4, 4)  # the second kernel of each
    for result in results[:4]:
        recorded.play(at(x, result))
    assert (since("executables"), since("changes"), since("graph_launches")) == (4, 4, 8)
    recorded.play(at(x, results[4]))
    assert (since("executables"), since("changes")) == (4, 5)
    assert x[0] == results[4][0] == 2**10
    recorded.play(at(other := memory(3), results[4]))
    assert (since("executables"), since("changes")) == (4, 7)
    assert other[0] == 6 and results[4][0] == 2**10 + 6
    assert since("launches") == 0
    recorded.library.tape_drop(recorded.tape)
    assert since("executables") == 0


def test_what_cannot_be_played_is_refused(cuda: Cuda):
    x, y, stranger = memory(1), memory(), memory()
    size, byte = ctypes.c_size_t(32), ctypes.byref
    base = ctypes.c_uint64()
    host = ctypes.c_uint64()
    cuda.library.tape_load(PROGRAM)
    cuda("cuMemHostAlloc", byte(host), size, ctypes.c_uint(0))
    another, nobodys = cuda.allocate(PROGRAM + 1), cuda.allocate(0)

    def work() -> None:
        cuda.scale(*at(x, y), 1)

    def callback(_: int) -> None:
        pass

    called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(callback)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("nothing of it passes", lambda: None),
        ("neither the caller's nor the program's", lambda: cuda.scale(at(stranger)[0], at(y)[0], 1)),
        ("neither the caller's nor the program's", lambda: cuda.copy(host.value, at(y)[0], 4)),
        ("neither the caller's nor the program's", lambda: cuda.scale(another, at(y)[0], 1)),
        ("neither the caller's nor the program's", lambda: cuda.scale(*at(x), nobodys, 1)),
        ("it allocates memory", lambda: [work(), cuda("cuMemAlloc", byte(base), size)]),
        ("it calls a function of the host", lambda: cuda("cuLaunchHostFunc", STREAM, called, None)),
        ("it uses several streams", lambda: [work(), _fill_elsewhere(cuda, at(y)[0])]),
        ("does not tell a kernel's parameters", lambda: cuda.scale(*at(x, y), 1, extra=b"x")),
    ]
    for reason, issue in cases:
        recorded = Recorded(cuda, at(x, y), issue)
        assert reason in recorded.reason
        recorded.library.tape_drop(recorded.tape)
    # One in several parts is none of these: the host may wait, and cannot read what was computed.
    recorded = Recorded(cuda, at(x, y), lambda: [work(), cuda("cuStreamSynchronize", STREAM), work()])
    assert recorded.reason == "" and recorded.library.tape_operations(recorded.tape) == 2
    recorded.library.tape_drop(recorded.tape)


def _fill_elsewhere(cuda: Cuda, target: int) -> None:
    elsewhere = ctypes.c_void_p(128)
    cuda("cuMemsetD32Async", ctypes.c_uint64(target), ctypes.c_uint(0), ctypes.c_size_t(1), elsewhere)


def test_memory_of_the_program_has_to_stay(cuda: Cuda):
    weights, others, y = cuda.allocate(), cuda.allocate(), memory()
    cuda.update(weights, bytes(memory(1)))
    recorded = Recorded(cuda, at(y), lambda: cuda.scale(weights, at(y)[0], 1))
    cuda("cuMemFree", ctypes.c_uint64(others))
    assert recorded.play(at(y)) == 0
    cuda("cuMemFree", ctypes.c_uint64(weights))
    assert cuda.allocate() and recorded.play(at(y)) != 0  # even if other memory is there now
    assert b"freed" in recorded.library.tape_error(recorded.play(at(y)))
    recorded.library.tape_drop(recorded.tape)


def test_one_recording_at_a_time(cuda: Cuda):
    x, y = memory(1), memory()
    numbers = ctypes.c_uint64 * 2
    tape = cuda.library.tape_begin(PROGRAM, numbers(*at(x, y)), numbers(32, 32), 2)
    assert cuda.library.tape_begin(PROGRAM, numbers(*at(x, y)), numbers(32, 32), 2) is None
    cuda.library.tape_drop(tape)  # as where an interrupt ends a call
    cuda.scale(*at(x, y), 1)
    assert Recorded(cuda, at(x, y), lambda: cuda.scale(*at(x, y), 1)).reason == ""


def test_others_are_given_the_driver_itself(cuda: Cuda):
    """numba and others open "libcuda.so" as well, and ask for functions of another version."""
    other = Cuda(cuda.library, cuda.driver, OTHER_VERSION)
    real = ctypes.cast(cuda.driver.cuLaunchKernel, ctypes.c_void_p).value
    assert other.function("cuLaunchKernel") == real != cuda.function("cuLaunchKernel")
    assert cuda.function("cuCtxSynchronize") == other.function("cuCtxSynchronize")
    assert cuda.library.cuMemcpyHtoD  # the loader finds it in the driver's library


def test_a_driver_without_graphs_is_refused(tmp_path):
    (tmp_path / "old.c").write_text("int cuGetProcAddress(void) { return 1; }\n")
    old = tmp_path / "old.so"
    subprocess.run([*hosted(c_compiler()), "-shared", "-fPIC", "old.c", "-o", old], check=True, cwd=tmp_path)
    with pytest.raises(OSError, match=r"old\.so lacks functions that graphs need"):
        _before(old)


def test_a_missing_library_is_a_reason(monkeypatch):
    """Nothing else comes of it: calls go through IREE, and explain_call says this."""
    monkeypatch.setattr(driver_library, "_real", lambda backend: "/nowhere/libcuda.so.1")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert graphs.graphs_of("cuda", "off") == (None, "graphs are off")
    assert graphs.graphs_of("cpu", "auto") == (None, "it runs on the CPU")
    driver_library.library.cache_clear()
    try:
        library, reason = graphs.graphs_of("cuda", "auto")
    finally:
        driver_library.library.cache_clear()
    assert library is None and reason == "CC names 'no-such-compiler', which is not on PATH."
    explained = graphs.Graphs(library, reason).explain(object())
    assert explained == f"no graph: {reason}"
