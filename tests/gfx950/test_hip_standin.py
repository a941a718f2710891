"""The HIP stand-in: its functions called directly, then whole programs through IREE's HIP driver.

A driver is made once in a process, so programs run in processes of their own, by the command a user
types.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from iree._runtime_libs import _runtime

import lowering.runtime.driver_library
from tests.gfx950.gfx950_kernels import Assembly, assemble, compile_hip
from tools.gfx950.hip import library

# Where the library is that makes graphs of calls.
GRAPHS = Path(lowering.runtime.driver_library.__file__).parent / "native"

# An executor that ends at once.
DYING = (sys.executable, "-c", "import sys; sys.exit(0)")

# HIP's numbers: errors, then directions of a copy.
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_CONFIGURATION = 1, 2, 3, 9
INVALID_DEVICE_POINTER, INVALID_DIRECTION, INVALID_DEVICE, INVALID_IMAGE = 17, 21, 101, 200
INVALID_CONTEXT, NO_BINARY, INVALID_HANDLE, NOT_FOUND, ILLEGAL_ADDRESS = 201, 209, 400, 500, 700
NOT_REGISTERED, LAUNCH_FAILURE, NOT_SUPPORTED = 713, 719, 801
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = 1, 2, 3, 4


class Hip:
    """The functions of the library: each returns its hipError_t."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.hipGetErrorString.restype = ctypes.c_char_p
        self._library.hipGetErrorName.restype = ctypes.c_char_p

    def __getattr__(self, name: str):
        return getattr(self._library, name)

    def make(self, function: str, *arguments) -> ctypes.c_void_p:
        """Call a function whose first parameter receives a handle or an address."""
        handle = ctypes.c_void_p()
        assert getattr(self, function)(ctypes.byref(handle), *arguments) == 0, self.sentence()
        return handle

    def allocate(self, size: int) -> ctypes.c_void_p:
        return self.make("hipMalloc", ctypes.c_size_t(size))

    def sentence(self, code: int | None = None) -> str:
        """What hipGetErrorString says of this thread's latest failure, or of ``code``."""
        return self.hipGetErrorString(self.hipGetLastError() if code is None else code).decode()


@pytest.fixture
def hip() -> Iterator[Hip]:
    yield Hip(library(DYING))


def at(address: ctypes.c_void_p, offset: int) -> ctypes.c_void_p:
    return ctypes.c_void_p((address.value or 0) + offset)


def refuses(hip: Hip, code: int, expected: int, sentence: str) -> None:
    assert code == expected, hip.sentence(code)
    assert re.search(sentence, hip.sentence(code)), hip.sentence(code)


# -- the library -----------------------------------------------------------------------------------


def test_it_exports_what_is_asked_for_and_nothing_else():
    """By IREE, whose names are in the runtime's own binary, and by the library that makes graphs of calls."""
    binary = Path(_runtime.__file__).read_bytes()
    wanted = set(re.findall(rb"\0(hip[A-Z]\w+)(?=\0)", binary))
    wanted = {name.decode() for name in wanted if not name.startswith((b"hipError", b"hipSuccess"))}
    assert len(wanted) > 70
    asked = set(re.findall(r"\bX\((hip\w+)", (GRAPHS / "driver_hip.h").read_text()))
    assert wanted & asked and asked - wanted
    wanted |= asked
    with library(DYING).open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym")
        defined = {s.name for s in symbols.iter_symbols() if s["st_shndx"] != "SHN_UNDEF"}
    assert {name for name in defined if name} == wanted


def test_a_second_build_is_the_first():
    built = library(DYING)
    before = built.stat().st_mtime_ns
    assert library(DYING) == built
    assert built.stat().st_mtime_ns == before
    assert library() != built


def test_it_says_what_it_is(hip: Hip, capfd):
    for _ in range(2):
        assert hip.hipInit(0) == 0
    said = capfd.readouterr().err
    assert said.count("this is no GPU") <= 1  # once in a process
    name = ctypes.create_string_buffer(64)
    assert hip.hipDeviceGetName(name, 64, 0) == 0
    assert name.value == b"emulated gfx950"


def test_the_announcement_is_on_stderr():
    script = f"import ctypes; h = ctypes.CDLL({str(library(DYING))!r}); h.hipInit(0); h.hipInit(0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("this is no GPU. Kernels for gfx950 are executed") == 1
    assert done.stdout == ""


def test_an_unknown_machine_is_refused(hip: Hip, monkeypatch):
    monkeypatch.setenv("VMFUSE_EMULATED_ARCH", "gfx1100")
    refuses(hip, hip.hipInit(0), NOT_INITIALIZED, "VMFUSE_EMULATED_ARCH is gfx1100; known: gfx950, gfx942")


def test_there_is_one_device(hip: Hip):
    count = ctypes.c_int()
    assert hip.hipGetDeviceCount(ctypes.byref(count)) == 0
    assert count.value == 1
    refuses(hip, hip.hipDeviceGet(ctypes.byref(count), 1), INVALID_DEVICE, "one device, number 0, not 1")


def test_attributes(hip: Hip, monkeypatch):
    value = ctypes.c_int()
    lds, warp = 74, 87
    for arch, size in (("gfx950", 163840), ("gfx942", 65536)):
        monkeypatch.setenv("VMFUSE_EMULATED_ARCH", arch)
        assert hip.hipDeviceGetAttribute(ctypes.byref(value), lds, 0) == 0
        assert value.value == size
    assert hip.hipDeviceGetAttribute(ctypes.byref(value), warp, 0) == 0
    assert value.value == 64
    refuses(hip, hip.hipDeviceGetAttribute(ctypes.byref(value), 12345, 0), NOT_SUPPORTED, "attribute 12345")


@pytest.mark.parametrize("name", ["hipMemPoolCreate", "hipLaunchKernel", "hipModuleGetGlobal"])
def test_what_is_missing_says_so(hip: Hip, name):
    refuses(hip, getattr(hip, name)(), NOT_SUPPORTED, f"^{name}: this function is not part of the emulation")


# -- memory ----------------------------------------------------------------------------------------


def test_copies_and_fills(hip: Hip):
    device, other = hip.allocate(16), hip.allocate(16)
    back = ctypes.create_string_buffer(16)
    assert hip.hipMemcpy(back, device, 16, DEVICE_TO_HOST) == 0
    assert back.raw == b"\xff" * 16  # fresh memory is NaN
    assert hip.hipMemcpyHtoDAsync(device, b"0123456789abcdef", 16, None) == 0
    assert hip.hipMemcpyAsync(other, at(device, 4), 8, DEVICE_TO_DEVICE, None) == 0
    assert hip.hipMemsetD16Async(at(other, 8), ctypes.c_short(0x4142), 2, None) == 0
    assert hip.hipMemsetD32Async(at(other, 12), 0x61626364, 1, None) == 0
    assert hip.hipMemsetD8Async(other, ctypes.c_char(b"z"), 1, None) == 0
    assert hip.hipMemcpy(back, other, 16, DEFAULT) == 0
    assert back.raw == b"z56789abBABAdcba"


def test_allocations_do_not_touch(hip: Hip):
    first, second = hip.allocate(1), hip.allocate(4097)
    assert (second.value or 0) - (first.value or 0) >= 8192
    assert (second.value or 0) % 4096 == 0
    assert hip.hipFree(first) == 0
    assert hip.allocate(1).value != first.value  # no address comes twice


@pytest.mark.parametrize("offset", [0, 9, 16])
def test_a_copy_beyond_an_allocation_is_refused(hip: Hip, offset):
    device, host = hip.allocate(16), ctypes.create_string_buffer(32)
    code = hip.hipMemcpy(at(device, offset), host, 17, HOST_TO_DEVICE)
    if offset == 16:
        refuses(hip, code, INVALID_DEVICE_POINTER, "^hipMemcpy: the destination 0x.* is in no allocation")
    else:
        refuses(hip, code, INVALID_VALUE, f"goes on for 17 bytes at offset {offset} of an allocation of 16")
    refuses(hip, hip.hipMemsetAsync(device, 0, 17, None), INVALID_VALUE, "^hipMemsetAsync: the destination")


def test_freed_memory_is_gone(hip: Hip):
    device, host = hip.allocate(16), ctypes.create_string_buffer(16)
    assert hip.hipFree(device) == 0
    refuses(
        hip, hip.hipFree(device), INVALID_VALUE, "not the beginning of an allocation, or was freed before"
    )
    refuses(
        hip, hip.hipMemcpy(host, device, 1, DEVICE_TO_HOST), INVALID_DEVICE_POINTER, "the source .* freed one"
    )


def test_directions_are_checked(hip: Hip):
    device, host = hip.allocate(16), ctypes.create_string_buffer(16)
    refuses(hip, hip.hipMemcpy(host, device, 16, DEVICE_TO_DEVICE), INVALID_DIRECTION, "is plain host memory")
    refuses(hip, hip.hipMemcpy(host, device, 16, HOST_TO_DEVICE), INVALID_DIRECTION, "is plain host memory")
    refuses(hip, hip.hipMemcpy(device, device, 16, HOST_TO_DEVICE), INVALID_DIRECTION, "is device memory")
    refuses(hip, hip.hipMemcpy(host, device, 16, 7), INVALID_DIRECTION, "there is no direction 7")


def test_memory_runs_out(hip: Hip):
    pointer = ctypes.c_void_p()
    code = hip.hipMalloc(ctypes.byref(pointer), ctypes.c_size_t(1 << 50))
    refuses(hip, code, OUT_OF_MEMORY, "1125899906842624 bytes wanted")
    assert pointer.value is None
    assert hip.hipMalloc(ctypes.byref(pointer), ctypes.c_size_t(0)) == 0
    assert pointer.value is None


def test_memory_of_the_host(hip: Hip):
    host = hip.make("hipHostMalloc", ctypes.c_size_t(8), 2)
    assert hip.make("hipHostGetDevicePointer", host, 0).value == host.value
    ctypes.memmove(host, b"abcdefgh", 8)  # the host may
    device = hip.allocate(8)
    assert hip.hipMemcpy(device, host, 8, HOST_TO_DEVICE) == 0
    refuses(hip, hip.hipFree(host), INVALID_VALUE, "allocated by another function")
    assert hip.hipHostFree(host) == 0
    refuses(
        hip,
        hip.hipHostMalloc(ctypes.byref(host), ctypes.c_size_t(8), 64),
        INVALID_VALUE,
        "unknown flags 0x40",
    )


def test_registered_memory(hip: Hip):
    host, back = ctypes.create_string_buffer(b"abcdefgh", 8), ctypes.create_string_buffer(8)
    assert hip.hipHostRegister(host, ctypes.c_size_t(8), 2) == 0
    device = hip.make("hipHostGetDevicePointer", host, 0)
    assert device.value != ctypes.addressof(host)
    assert hip.hipMemsetD8Async(at(device, 2), ctypes.c_char(b"-"), 3, None) == 0
    assert host.raw == b"ab---fgh"
    assert hip.hipMemcpy(back, device, 8, DEVICE_TO_HOST) == 0
    assert back.raw == host.raw
    assert hip.hipHostUnregister(host) == 0
    refuses(hip, hip.hipHostUnregister(host), NOT_REGISTERED, "is not registered")


# -- contexts, streams, events ---------------------------------------------------------------------


def test_contexts_are_a_stack(hip: Hip):
    context, current = hip.make("hipDevicePrimaryCtxRetain", 0), ctypes.c_void_p()
    assert hip.hipCtxPushCurrent(context) == 0
    assert hip.hipCtxGetCurrent(ctypes.byref(current)) == 0
    assert current.value == context.value
    assert hip.hipCtxPopCurrent(None) == 0
    refuses(hip, hip.hipCtxPopCurrent(None), INVALID_CONTEXT, "no context was pushed")
    refuses(hip, hip.hipCtxPushCurrent(at(context, 8)), INVALID_HANDLE, "is no context, or it was destroyed")


def test_events_and_streams(hip: Hip):
    stream = hip.make("hipStreamCreateWithFlags", 1)
    start, stop, untimed = (hip.make("hipEventCreateWithFlags", flags) for flags in (0, 0, 2))
    milliseconds = ctypes.c_float(-1)
    for event in (start, stop, untimed):
        assert hip.hipEventRecord(event, stream) == 0
        assert hip.hipStreamWaitEvent(stream, event, 0) == 0
        assert hip.hipEventQuery(event) == hip.hipEventSynchronize(event) == 0
    assert hip.hipEventElapsedTime(ctypes.byref(milliseconds), start, stop) == 0
    assert 0 <= milliseconds.value < 1000
    code = hip.hipEventElapsedTime(ctypes.byref(milliseconds), start, untimed)
    refuses(hip, code, INVALID_HANDLE, "recorded, and with timing")
    assert hip.hipStreamDestroy(stream) == 0
    refuses(hip, hip.hipStreamSynchronize(stream), INVALID_HANDLE, "is no stream, or it was destroyed")
    refuses(hip, hip.hipEventCreateWithFlags(ctypes.byref(stop), 0x100), INVALID_VALUE, "unknown flags 0x100")


def test_a_host_function_runs_at_once(hip: Hip):
    seen = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    assert hip.hipLaunchHostFunc(None, function, ctypes.c_void_p(7)) == 0
    assert seen == [7]


# -- graphs ----------------------------------------------------------------------------------------


def fill_node(dst: ctypes.c_void_p, value: int, element: int, count: int) -> bytes:
    """hipMemsetParams of one row."""
    return struct.pack("<QI4xQQI4xQ", dst.value or 0, element, 1, 0, value, count)


def copy_node(dst: ctypes.c_void_p, src: ctypes.c_void_p, size: int, height: int = 1) -> bytes:
    """HIP_MEMCPY3D of one row, from device to device."""
    side = struct.Struct("<4QI4x5Q")
    sides = [side.pack(0, 0, 0, 0, 2, 0, pointer.value or 0, 0, 0, 0) for pointer in (src, dst)]
    return b"".join(sides) + struct.pack("<3Q", size, height, 1)


def test_a_graph_runs_whenever_it_is_launched(hip: Hip):
    device, other, back = hip.allocate(8), hip.allocate(8), ctypes.create_string_buffer(8)
    context = hip.make("hipDevicePrimaryCtxRetain", 0)
    graph = hip.make("hipGraphCreate", 0)
    first = hip.make(
        "hipGraphAddMemsetNode", graph, None, ctypes.c_size_t(0), fill_node(device, 0x41414141, 4, 2)
    )
    after = ctypes.byref(first), ctypes.c_size_t(1)
    empty = hip.make("hipGraphAddEmptyNode", graph, *after)
    after = ctypes.byref(empty), ctypes.c_size_t(1)
    hip.make("hipDrvGraphAddMemcpyNode", graph, *after, copy_node(other, device, 8), context)
    program = hip.make("hipGraphInstantiate", graph, None, None, ctypes.c_size_t(0))
    assert hip.hipGraphDestroy(graph) == 0
    for _ in range(2):
        assert hip.hipMemset(other, 0, ctypes.c_size_t(8)) == 0
        assert hip.hipGraphLaunch(program, None) == 0
        assert hip.hipMemcpy(back, other, 8, DEVICE_TO_HOST) == 0
        assert back.raw == b"A" * 8
    assert hip.hipGraphExecDestroy(program) == 0
    refuses(hip, hip.hipGraphLaunch(program, None), INVALID_HANDLE, "is no graph program")


def test_bad_nodes_are_refused(hip: Hip):
    device, node = hip.allocate(8), ctypes.c_void_p()
    graph, other = hip.make("hipGraphCreate", 0), hip.make("hipGraphCreate", 0)
    stranger = hip.make("hipGraphAddEmptyNode", other, None, ctypes.c_size_t(0))
    code = hip.hipGraphAddEmptyNode(ctypes.byref(node), graph, ctypes.byref(stranger), ctypes.c_size_t(1))
    refuses(hip, code, INVALID_VALUE, "dependency 0 is no node of this graph")
    tall, none = copy_node(device, device, 8, height=2), ctypes.c_size_t(0)
    code = hip.hipDrvGraphAddMemcpyNode(ctypes.byref(node), graph, None, none, tall, None)
    refuses(hip, code, NOT_SUPPORTED, "only one row of plain memory")


# -- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        pytest.param(b"nothing of the kind" * 10, "the image is no 64-bit little-endian ELF file", id="text"),
        pytest.param(
            b"\x7fELF\2\1"
            + bytes(34)
            + struct.pack("<Q", 1 << 40)
            + bytes(10)
            + struct.pack("<3H", 64, 4, 0),
            "the image is truncated or damaged: by its header it has 1099511628032 bytes",
            id="truncated",
        ),
    ],
)
def test_a_damaged_image_is_refused(hip: Hip, image, sentence):
    module = ctypes.c_void_p()
    refuses(hip, hip.hipModuleLoadData(ctypes.byref(module), image), INVALID_IMAGE, sentence)


def test_an_executor_that_dies_is_an_error(hip: Hip):
    hip.allocate(1)
    module, image = ctypes.c_void_p(), b"\x7fELF\2\1" + bytes(58)
    code = hip.hipModuleLoadData(ctypes.byref(module), image)
    refuses(hip, code, LAUNCH_FAILURE, "the executor's process ended without an answer")


# -- launches --------------------------------------------------------------------------------------

# y[i] = x[i + shift] for i below count, 64 of them in a workgroup.
COPY = """
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(1, 128)))
void copy(const float *x, float *y, int shift, int count) {
  int i = __builtin_amdgcn_workgroup_id_x() * 64 + __builtin_amdgcn_workitem_id_x();
  if (i < count) y[i] = x[i + shift];
}
"""


class Copy:
    """The kernel above, loaded; ``launch`` gives the hipError_t."""

    def __init__(self, hip: Hip):
        self._hip = hip
        hip.allocate(1)
        self.module = hip.make("hipModuleLoadData", compile_hip(COPY).data)
        self.function = hip.make("hipModuleGetFunction", self.module, b"copy")

    def parameters(self, x: ctypes.c_void_p, y: ctypes.c_void_p, count: int, shift: int) -> ctypes.Array:
        values = (x, y, ctypes.c_int(shift), ctypes.c_int(count))
        self._kept = values
        return (ctypes.c_void_p * 4)(*(ctypes.addressof(value) for value in values))

    def launch(self, x: ctypes.c_void_p, y: ctypes.c_void_p, count: int, shift=0, blocks=2, lanes=64) -> int:
        parameters = self.parameters(x, y, count, shift)
        return self._hip.hipModuleLaunchKernel(
            self.function, blocks, 1, 1, lanes, 1, 1, 0, None, parameters, None
        )


@pytest.fixture(scope="module")
def gpu() -> Hip:
    return Hip(library())


@pytest.fixture(scope="module")
def kernel(gpu: Hip) -> Copy:
    return Copy(gpu)


def floats(count: int) -> ctypes.Array:
    return (ctypes.c_float * count)(*range(count))


def on_device(gpu: Hip, count: int) -> ctypes.c_void_p:
    device = gpu.allocate(4 * count)
    assert gpu.hipMemcpy(device, floats(count), ctypes.c_size_t(4 * count), HOST_TO_DEVICE) == 0
    return device


def test_a_launch(gpu: Hip, kernel: Copy):
    x, y, back = on_device(gpu, 100), gpu.allocate(400), (ctypes.c_float * 100)()
    assert kernel.launch(x, y, 97, shift=3) == 0
    assert gpu.hipMemcpy(back, y, ctypes.c_size_t(400), DEVICE_TO_HOST) == 0
    assert list(back[:97]) == list(range(3, 100))
    assert bytes(back)[-12:] == b"\xff" * 12  # untouched


def test_a_launch_sees_registered_memory(gpu: Hip, kernel: Copy):
    host, y = floats(64), (ctypes.c_float * 64)()
    for memory in (host, y):
        assert gpu.hipHostRegister(memory, ctypes.c_size_t(256), 2) == 0
    addresses = [gpu.make("hipHostGetDevicePointer", memory, 0) for memory in (host, y)]
    for offset in (0.0, 0.5):
        host[5] = 5 + offset
        assert kernel.launch(*addresses, 64) == 0
        assert list(y) == list(host)
    for memory in (host, y):
        assert gpu.hipHostUnregister(memory) == 0


def test_a_launch_leaves_registered_memory_alone_that_it_only_reads(gpu: Hip, kernel: Copy):
    """Weights are registered where the program's file is mapped, which cannot be written."""
    size, y, back = mmap.PAGESIZE, gpu.allocate(256), (ctypes.c_float * 64)()
    with tempfile.TemporaryFile() as file:
        file.write(bytes(floats(size // 4)))
        file.flush()
        libc = ctypes.CDLL(None)
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, *[ctypes.c_long] * 5)
        mapped = ctypes.c_void_p(libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0))
        assert gpu.hipHostRegister(mapped, ctypes.c_size_t(size), 2) == 0
        x = gpu.make("hipHostGetDevicePointer", mapped, 0)
        assert kernel.launch(x, y, 64, shift=100) == 0
        assert gpu.hipHostUnregister(mapped) == 0
        assert libc.munmap(mapped, ctypes.c_size_t(size)) == 0
    assert gpu.hipMemcpy(back, y, ctypes.c_size_t(256), DEVICE_TO_HOST) == 0
    assert list(back) == list(range(100, 164))


def test_a_graph_launches_kernels(gpu: Hip, kernel: Copy):
    """A node keeps its arguments as they were when it was added."""
    x, y, back = on_device(gpu, 64), gpu.allocate(256), (ctypes.c_float * 64)()
    graph, node = gpu.make("hipGraphCreate", 0), ctypes.c_void_p()
    parameters = kernel.parameters(x, y, 64, 0)
    shape = struct.pack(
        "<3I4xQQ3I4xQI4x", 64, 1, 1, 0, kernel.function.value, 1, 1, 1, ctypes.addressof(parameters), 0
    )
    none = ctypes.c_size_t(0)
    assert gpu.hipGraphAddKernelNode(ctypes.byref(node), graph, None, none, shape) == 0
    kernel.parameters(ctypes.c_void_p(), ctypes.c_void_p(), 0, 0)
    program = gpu.make("hipGraphInstantiate", graph, None, None, none)
    assert gpu.hipGraphDestroy(graph) == 0
    assert gpu.hipGraphLaunch(program, None) == 0
    assert gpu.hipMemcpy(back, y, ctypes.c_size_t(256), DEVICE_TO_HOST) == 0
    assert list(back) == list(range(64))


def test_a_program_of_a_graph_is_changed_and_the_graph_is_not(gpu: Hip, kernel: Copy):
    """Nor are its other programs; a node that is no part of it, or of another kind, is refused."""
    x, y, z, back = on_device(gpu, 64), gpu.allocate(256), gpu.allocate(256), (ctypes.c_float * 64)()
    graph, nodes = gpu.make("hipGraphCreate", 0), [ctypes.c_void_p() for _ in range(2)]
    none, size = ctypes.c_size_t(0), ctypes.c_size_t(256)

    kept = []

    def shape(target: ctypes.c_void_p) -> bytes:
        kept.append(parameters := kernel.parameters(x, target, 64, 0))
        return struct.pack(
            "<3I4xQQ3I4xQI4x", 64, 1, 1, 0, kernel.function.value, 1, 1, 1, ctypes.addressof(parameters), 0
        )

    after, one = ctypes.byref(nodes[0]), ctypes.c_size_t(1)
    assert gpu.hipGraphAddKernelNode(ctypes.byref(nodes[0]), graph, None, none, shape(y)) == 0
    added = gpu.hipGraphAddMemcpyNode1D(
        ctypes.byref(nodes[1]), graph, after, one, z, y, size, DEVICE_TO_DEVICE
    )
    assert added == 0
    programs = [gpu.make("hipGraphInstantiate", graph, None, None, none) for _ in range(2)]
    other = gpu.allocate(256)
    assert gpu.hipGraphExecKernelNodeSetParams(programs[0], nodes[0], shape(other)) == 0
    change = gpu.hipGraphExecMemcpyNodeSetParams1D
    assert change(programs[0], nodes[1], y, other, size, DEVICE_TO_DEVICE) == 0
    assert gpu.hipGraphLaunch(programs[0], None) == 0
    assert gpu.hipMemcpy(back, y, size, DEVICE_TO_HOST) == 0 and list(back) == list(range(64))
    assert gpu.hipGraphLaunch(programs[1], None) == 0
    assert gpu.hipMemcpy(back, z, size, DEVICE_TO_HOST) == 0 and list(back) == list(range(64))
    stranger = gpu.hipGraphExecKernelNodeSetParams(programs[0], ctypes.c_void_p(8), shape(y))
    refuses(gpu, stranger, INVALID_VALUE, "the node is none of the graph")
    refuses(gpu, change(programs[0], nodes[0], y, x, size, 3), INVALID_VALUE, "of another kind")
    refuses(gpu, change(programs[0], nodes[1], y, x, size, 1), INVALID_VALUE, "keeps its direction")


def test_what_a_kernel_does_wrong_is_the_launchs_error(gpu: Hip, kernel: Copy):
    x, y = on_device(gpu, 64), gpu.allocate(256)
    beyond = kernel.launch(x, y, 65)
    refuses(
        gpu,
        beyond,
        ILLEGAL_ADDRESS,
        r"^hipModuleLaunchKernel: copy: a load .* wave 0 of workgroup \(1, 0, 0\)",
    )
    refuses(gpu, kernel.launch(gpu.allocate(256), y, 64), LAUNCH_FAILURE, "copy: .* never defined")
    assert gpu.hipFree(x) == 0
    refuses(gpu, kernel.launch(x, y, 64), ILLEGAL_ADDRESS, "copy: a load of 4 bytes")
    assert kernel.launch(on_device(gpu, 64), y, 64) == 0  # and goes on


def test_what_earlier_launches_wrote_is_defined(gpu: Hip, kernel: Copy):
    x, y, z = on_device(gpu, 64), gpu.allocate(256), gpu.allocate(256)
    assert kernel.launch(x, y, 32) == 0
    assert kernel.launch(y, z, 32) == 0
    refuses(gpu, kernel.launch(y, z, 33), LAUNCH_FAILURE, "never defined")
    assert gpu.hipMemset(at(y, 128), 0, ctypes.c_size_t(128)) == 0
    assert kernel.launch(y, z, 64) == 0


@pytest.mark.parametrize(
    ("blocks", "lanes", "sentence"),
    [
        (0, 64, "copy: grid 0x1x1 of 64x1x1 threads is empty"),
        (1, 256, "copy: 256x1x1 threads, the kernel was compiled for at most 128"),
    ],
)
def test_launch_shapes_are_checked(gpu: Hip, kernel: Copy, blocks, lanes, sentence):
    x, y = on_device(gpu, 64), gpu.allocate(256)
    refuses(gpu, kernel.launch(x, y, 64, 0, blocks, lanes), INVALID_CONFIGURATION, sentence)


def test_functions_and_modules(gpu: Hip, kernel: Copy):
    function, lds = ctypes.c_void_p(), ctypes.c_int(-1)
    assert gpu.hipFuncGetAttribute(ctypes.byref(lds), 1, kernel.function) == 0
    assert lds.value == 0
    code = gpu.hipModuleGetFunction(ctypes.byref(function), kernel.module, b"paste")
    refuses(gpu, code, NOT_FOUND, "the module has no kernel paste; it has copy")
    module = gpu.make("hipModuleLoadData", compile_hip(COPY).data)
    assert gpu.hipModuleUnload(module) == 0
    refuses(gpu, gpu.hipModuleUnload(module), INVALID_HANDLE, "is no module, or it was destroyed")
    stale = Copy(gpu)
    assert gpu.hipModuleUnload(stale.module) == 0
    code = stale.launch(ctypes.c_void_p(), ctypes.c_void_p(), 0)
    refuses(gpu, code, INVALID_HANDLE, "is no module, or it was destroyed")


def test_code_for_another_gpu_is_refused(gpu: Hip, kernel: Copy):
    other = assemble([Assembly("nothing", "")], "gfx942").data
    code = gpu.hipModuleLoadData(ctypes.byref(ctypes.c_void_p()), other)
    refuses(gpu, code, NO_BINARY, "the code object is for gfx942, this device is an emulated gfx950")
    broken = other[:64] + bytes(len(other) - 64)
    code = gpu.hipModuleLoadData(ctypes.byref(ctypes.c_void_p()), broken)
    refuses(gpu, code, INVALID_IMAGE, "no complete AMD code object")
