"""Hold devices and contexts on them, and carry tensors to the IREE runtime and back.

What ``lowering.runtime`` calls programs with; which arguments a call takes is not known here.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from iree import runtime as iree
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from ..errors import RunError, UsageError
from ..signature import Signature, missing_on_host
from .graphs import GATE, Mode, Range, Tape, graphs_of, loading

_CPU_ALIGNMENT = 64


@dataclass(frozen=True)
class _Driver:
    """IREE's driver of a backend, and how torch and DLPack know its devices.

    flag: read by the driver when it is created; with stream-ordered allocations the CUDA and HIP drivers
    cannot export a result by DLPack.  is_exact: code for an architecture with an ``a`` runs on no other.
    has_stand_in: another library may play it, on the host (tools/gfx950).
    """

    name: str
    api: str
    dlpack: int
    on_host: bool = False
    is_exact: bool = False
    has_stand_in: bool = False
    flag: str | None = None


_DRIVERS = {
    "cpu": _Driver("local-task", "cpu", 1, on_host=True),
    "cuda": _Driver("cuda", "CUDA", 2, is_exact=True, flag="--cuda_async_allocations=false"),
    "hip": _Driver("hip", "HIP", 10, has_stand_in=True, flag="--hip_async_allocations=false"),
}

# Element types that the runtime's DLPack does not know: they cross as bytes.
_AS_BYTES = {
    torch.float8_e4m3fn: iree.HalElementType.FLOAT_8_E4M3_FN,
    torch.float8_e4m3fnuz: iree.HalElementType.FLOAT_8_E4M3_FNUZ,
    torch.float8_e5m2: iree.HalElementType.FLOAT_8_E5M2,
    torch.float8_e5m2fnuz: iree.HalElementType.FLOAT_8_E5M2_FNUZ,
    torch.float8_e8m0fnu: iree.HalElementType.FLOAT_8_E8M0_FNU,
}


def _code(element: Any) -> int:
    """The number of a HalElementType; the runtime's stubs do not say that it is an integer."""
    return int(element)


_DEVICE_LOCAL, _ANY_USAGE = int(iree.MemoryType.DEVICE_LOCAL), int(iree.BufferUsage.DEFAULT)

_FROM_BYTES = {_code(element): dtype for dtype, element in _AS_BYTES.items()}


class Place:
    """A device, by IREE's name and by torch's."""

    def __init__(self, backend: str, index: int):
        self.backend = backend
        self.index = index
        self.driver = _DRIVERS[backend]
        self.emulated = emulated_arch(backend, index)
        """The architecture of a GPU that the cpu plays, whose tensors are torch's cpu tensors; else None."""
        in_host_memory = self.driver.on_host or self.emulated is not None
        # torch's ROCm build calls its devices cuda.
        self.device = torch.device("cpu") if in_host_memory else torch.device("cuda", index)

    def __str__(self) -> str:
        return self.backend if self.driver.on_host else f"{self.backend}:{self.index}"

    @staticmethod
    def for_program(signature: Signature, device: str | torch.device | None, name: str) -> Place:
        """Find where ``signature`` is to run; raises RunError unless it can."""
        backend, index = _parse_device(str(device or signature.backend))
        compiled = f"{name} was compiled for {signature.target}"
        if isinstance(device, torch.device) and device.type == "cuda" and torch.version.hip:
            backend = "hip"
        if backend != signature.backend:
            raise RunError(f"{compiled} ({signature.backend}) and cannot run on {backend}")
        place = Place(backend, index)
        refusal = place.refusal(signature.arch)
        if refusal is not None:
            raise RunError(f"{compiled}; {refusal}")
        return place

    def refusal(self, arch: str) -> str | None:
        """Say why this device cannot run code for ``arch``, or None."""
        if self.driver.on_host:
            missing = missing_on_host(arch)
            return missing and f"this machine lacks {missing}"
        # The driver first: without one, torch says less about what is missing.
        hal_device(self.backend, self.index)
        if self.emulated is not None:
            return None if self.emulated == arch else f"{self} is an emulated {self.emulated}"
        built_for = "HIP" if torch.version.hip else "CUDA" if torch.version.cuda else "the cpu alone"
        if built_for.lower() != self.backend:
            return f"the torch {torch.__version__} here is built for {built_for}"
        if self.index >= torch.cuda.device_count():
            return f"this machine has no {self}"
        actual = gpu_arch(self.index)
        # sm_90a: the a says that nothing but this very architecture will do, as for every cubin here.
        needed = arch.removesuffix("a") if self.driver.is_exact else arch
        return None if actual == needed else f"{self} is {actual}"


def gpu_arch(index: int) -> str:
    """Name what a program's ``arch`` has to be to run on torch's GPU ``index``."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def emulated_arch(backend: str, index: int) -> str | None:
    """Name the chip that a stand-in for IREE's driver emulates; None for any other device."""
    if not _DRIVERS[backend].has_stand_in:
        return None
    hal_device(backend, index)
    name = iree.get_driver(_DRIVERS[backend].name).query_available_devices()[index]["name"]
    found = re.fullmatch(r"emulated (gfx\w+)", name)
    return found and found[1]


def _parse_device(text: str) -> tuple[str, int]:
    backend, _, index = text.partition(":")
    if backend not in _DRIVERS or not (index or "0").isdecimal():
        raise UsageError(f"unknown device {text!r}; known devices: cpu, cuda, cuda:N, hip, hip:N")
    return backend, int(index or 0)


@cache
def instance() -> iree.VmInstance:
    """IREE's instance, one per process."""
    return iree.VmInstance()


class _Use:
    """Know whether IREE is in use, and whether it was in the process that this one was forked from."""

    here = elsewhere = False

    @classmethod
    def forked(cls) -> None:
        cls.elsewhere = cls.here


os.register_at_fork(after_in_child=_Use.forked)


def refuse_forked() -> None:
    """Raise RunError in a process forked from its user: a call would wait for ever for its threads."""
    if not _Use.here:
        _Use.here = True
    if _Use.elsewhere:
        raise RunError(
            "IREE was in use in the process that this one was forked from, and its threads are not here: "
            "start processes with multiprocessing's 'spawn', or fork before anything is loaded"
        )


_DEVICE_LOCK = threading.Lock()


def hal_device(backend: str, index: int) -> iree.HalDevice:
    """IREE's device, one per process; RunError when its driver is not available."""
    refuse_forked()
    driver = _DRIVERS[backend]
    uri = driver.name if driver.on_host else f"{driver.name}://{index}"
    try:
        with _DEVICE_LOCK:
            if driver.flag is not None:
                iree.flags.parse_flags(driver.flag)
            return iree.get_device(uri)
    except (RuntimeError, ValueError, OSError) as error:
        what = f"no {driver.api} driver or device"
        raise RunError(f"there is {what} on this machine: {reason(error)}") from error


@dataclass(frozen=True)
class Storage:
    """Describe what the memory of a tensor has to be; this occupies none itself."""

    like: Tensor
    shape: tuple[int, ...]
    element: Any
    """The dtype in IREE's words."""
    typed: bool
    """Tell whether DLPack has a word for the dtype; ``element`` is a byte where it has none."""
    size: int
    """In bytes."""


Memory = tuple[Any, Any]
"""A tensor, or what Python reads of one, and the same memory as IREE passes it; None where IREE does not."""

Outcome = list[tuple[Any, Sequence[Any] | iree.VmVariantList]]
"""What a call returned, IREE's list or, of one that was played, nothing; empty until it is over."""


class Session:
    """One IREE context on one device; calls take turns."""

    def __init__(
        self,
        module: iree.VmModule,
        place: Place,
        parameter_modules: Sequence[iree.VmModule],
        graphs: Mode = "auto",
    ):
        self.place = place
        self.library, self.no_graphs = graphs_of(place.backend, graphs)
        """The library that records calls, and why there is none."""
        self._gate = nullcontext() if self.library is None else GATE
        self.tapes: WeakSet[Tape] = WeakSet()
        # What an empty tensor points to: torch's points nowhere, which crashes the cpu driver.  Made first:
        # on a GPU it also makes the device current in this thread, which IREE's module loading relies on.
        self.somewhere = torch.zeros(_CPU_ALIGNMENT, dtype=torch.uint8, device=place.device)
        self._hal = hal_device(place.backend, place.index)
        self._allocator = self._hal.allocator
        self._allocate = self._allocator.allocate_buffer
        if place.emulated is not None:
            self._allocate = _through(self._gate, self._allocate)
        self.on_host = place.device.type == "cpu"
        self._dlpack = (_DRIVERS["cpu"].dlpack, 0) if self.on_host else (place.driver.dlpack, place.index)
        hal_module = iree.create_hal_module(instance(), self._hal)
        with loading(self.library) as self.number:
            self._context: iree.VmContext | None = iree.VmContext(
                instance(), [hal_module, *parameter_modules, module]
            )
        self.lock = threading.Lock()
        self._nothing = self._import(self.somewhere)

    def close(self) -> None:
        """Let the context go, once the call that is under way is over; there are no others after it."""
        with self.lock:
            for tape in tuple(self.tapes):
                tape.drop()
            self._context = None

    def invoke(
        self,
        function: iree.VmFunction,
        values: Sequence[Any],
        storage: Sequence[iree.HalBufferView] = (),
        outcome: Outcome | None = None,
    ) -> Outcome:
        """Call ``function`` with ``values``, tensors, views and ints, then ``storage``; wait for its results.

        outcome: what is returned; it knows whether the call is over where an interrupt keeps this from it.
        Raises what the IREE runtime raises: see ``reported``; RunError in a forked process, and when closed.
        """
        outcome = [] if outcome is None else outcome
        refuse_forked()
        arguments = iree.VmVariantList(len(values) + len(storage))
        self._push(arguments, values)
        for view in storage:
            arguments.push_ref(view.ref)
        results = iree.VmVariantList(4)
        if not self.on_host:
            if self.is_captured():
                raise RunError(
                    "a CUDA graph is being captured, and this call is no graph itself yet: make it twice "
                    "with tensors of these shapes before; explain_call() says whether it then is one"
                )
            # After the conversions and allocations: copies may be queued, and freed memory still in use.
            torch.cuda.current_stream(self.place.device).synchronize()
        with self._gate, self.lock:
            invoke = self.context().invoke
            # One step for Python, which raises KeyboardInterrupt between steps: afterwards the outcome knows.
            outcome.extend(zip(map(invoke, (function,), (arguments,), (results,)), (results,), strict=True))
        return outcome

    def stream(self) -> int:
        """The handle of torch's current stream."""
        return 0 if self.on_host else torch._C._cuda_getCurrentRawStream(self.place.index)

    def is_captured(self) -> bool:
        """Tell whether what torch's current stream is given now is recorded for later, and not done."""
        return not self.on_host and torch.cuda.is_current_stream_capturing()

    def ordered_after(self, last: int | None) -> int:
        """Have torch's current stream go on where the stream ``last`` ends; returns the current one."""
        current = self.stream()
        if last not in (None, current) and not self.is_captured():
            torch.cuda.synchronize(self.place.device)
        return current

    def address(self, view: iree.HalBufferView) -> Range:
        """Where the memory of a view is."""
        buffer = view.get_buffer()
        first = iree.HalBufferView(buffer, (1,), iree.HalElementType.UINT_8)
        memory = from_dlpack(self._hal.create_dlpack_capsule(first, *self._dlpack))
        return memory.data_ptr(), buffer.byte_length()

    def context(self) -> iree.VmContext:
        """The program's kernels, weights and functions; hold ``lock``.  RunError once it is closed."""
        if self._context is None:
            raise RunError("the program is closed")
        return self._context

    def _push(self, arguments: iree.VmVariantList, values: Sequence[Any]) -> None:
        for value in values:
            if isinstance(value, iree.HalBufferView):
                arguments.push_ref(value.ref)
            elif isinstance(value, Tensor):
                arguments.push_ref(self.to_iree(value).ref)
            else:
                arguments.push_int(value)

    def query(self, function: iree.VmFunction, values: Sequence[Any], more: int) -> int:
        """The integer that ``function`` computes from ints, and the shapes of tensors, among ``values``.

        It has more arguments, two fences and ``more`` buffer views, and looks at none of them.
        """
        refuse_forked()
        arguments = iree.VmVariantList(len(values) + 2 + more)
        self._push(arguments, values)
        for _ in range(2):
            arguments.push_ref(iree.HalFence(0).ref)
        for _ in range(more):
            arguments.push_ref(self._nothing.ref)
        results = iree.VmVariantList(1)
        with self.lock:
            self.context().invoke(function, arguments, results)
        return results.get_variant(0)

    def storage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Storage:
        """Memory for a tensor, as ``allocate`` takes it."""
        like = self.somewhere.view(dtype)[0].expand(shape)
        crossing = self._hal.from_dlpack_capsule(
            to_dlpack(self.somewhere.view(torch.uint8 if dtype in _AS_BYTES else dtype))
        )
        typed = from_dlpack(self._hal.create_dlpack_capsule(crossing, *self._dlpack)).dtype == dtype
        return Storage(like, shape, crossing.element_type, typed, like.numel() * like.element_size())

    def allocate(self, storage: Storage) -> Memory:
        """A tensor, contiguous and not set to anything, and a view of its bytes.

        Where torch's tensors are the host's, the memory is IREE's: its cpu driver fills and copies into no
        other.  On a GPU it is torch's, whose allocator keeps what is freed.
        """
        if self.on_host and storage.size:
            buffer = self._allocate(_DEVICE_LOCAL, _ANY_USAGE, storage.size)
            view = iree.HalBufferView(buffer, storage.shape, storage.element)
            tensor = from_dlpack(self._hal.create_dlpack_capsule(view, *self._dlpack))
            return (tensor if storage.typed else tensor.view(storage.like.dtype)), view
        # Half the time of torch.empty, which has more arguments to read.
        tensor = torch.empty_like(storage.like, memory_format=torch.contiguous_format)
        return tensor, self._bytes(tensor)

    def scratch(self, size: int) -> iree.HalBufferView:
        """Memory that no tensor is made of."""
        if not size:
            return self._nothing
        if self.on_host:
            buffer = self._allocate(_DEVICE_LOCAL, _ANY_USAGE, size)
            return iree.HalBufferView(buffer, (size,), iree.HalElementType.UINT_8)
        return self._bytes(torch.empty(size, dtype=torch.uint8, device=self.place.device))

    def _bytes(self, tensor: Tensor) -> iree.HalBufferView:
        if not tensor.numel():
            return self._nothing
        return self._import(tensor.view(torch.uint8) if tensor.dtype in _AS_BYTES else tensor)

    def lend(self, tensor: Tensor) -> tuple[Tensor | iree.HalBufferView, Callable[[], Any] | None]:
        """The tensor's memory for a program to write to; what brings it back where it had to be copied."""
        if self.is_direct(tensor):
            return tensor, None
        copied = self.to_iree(tensor)
        return copied, lambda: tensor.detach().copy_(self.to_torch(copied, tensor.dtype))

    def is_direct(self, tensor: Tensor) -> bool:
        """Tell whether ``to_iree`` makes no copy of a tensor."""
        if self.place.emulated is not None or tensor.is_neg() or not tensor.is_contiguous():
            return False
        return not (self.place.driver.on_host and tensor.data_ptr() % _CPU_ALIGNMENT)

    def to_iree(self, tensor: Tensor) -> iree.HalBufferView:
        """The tensor's memory as a buffer view, which keeps it alive."""
        tensor = plain(tensor.detach() if tensor.requires_grad else tensor)
        if tensor.numel() == 0:
            return self._empty(tensor)
        if self.place.driver.on_host and tensor.data_ptr() % _CPU_ALIGNMENT:
            tensor = tensor.clone()
        element = _AS_BYTES.get(tensor.dtype)
        if element is None:
            return self._import(tensor)
        view = self._import(tensor.view(torch.uint8))
        return iree.HalBufferView(view.get_buffer(), list(tensor.shape), element)

    def passable(self, tensor: Tensor, memory: iree.HalBufferView) -> iree.HalBufferView:
        """The ``memory`` of ``tensor`` as a program is passed it, with its shape and dtype."""
        element = _AS_BYTES.get(tensor.dtype)
        if element is None:
            element = self._import(self.somewhere.view(tensor.dtype)).element_type
        return iree.HalBufferView(memory.get_buffer(), list(tensor.shape), element)

    def set(self, memory: Memory, value: Tensor | None) -> Memory:
        """Give memory that is passed to programs a value, None for zeros.

        That of an emulated GPU is filled by copies to the device alone: it is other memory then.
        """
        tensor, view = memory
        if self.place.emulated is not None and tensor.numel():
            value = torch.zeros_like(tensor) if value is None else value
            view = self._upload(value.contiguous(), view)
            return self.to_torch(view, tensor.dtype), view
        if value is not None:
            tensor.copy_(value)
        elif tensor.numel():
            tensor.view(-1).view(torch.uint8).zero_()
        return memory

    def _empty(self, tensor: Tensor) -> iree.HalBufferView:
        return self.passable(tensor, self._nothing)

    def _import(self, tensor: Tensor) -> iree.HalBufferView:
        view = self._hal.from_dlpack_capsule(to_dlpack(tensor))
        return view if self.place.emulated is None else self._upload(tensor, view)

    def _upload(self, tensor: Tensor, view: iree.HalBufferView) -> iree.HalBufferView:
        """A copy in the emulated GPU's own memory, so that it knows where a buffer ends."""
        with self._gate:
            buffer = self._allocator.allocate_buffer_copy(
                memory_type=_DEVICE_LOCAL,
                allowed_usage=_ANY_USAGE,
                device=self._hal,
                buffer=tensor.reshape(-1).view(torch.uint8).numpy(),
            )
        assert isinstance(buffer, iree.HalBuffer)  # a view only where an element type is given
        return iree.HalBufferView(buffer, view.shape, view.element_type)

    def to_torch(self, view: iree.HalBufferView, dtype: torch.dtype | None) -> Tensor:
        """The buffer as a tensor, which keeps it alive; dtype None: by the buffer's element type."""
        as_bytes = _FROM_BYTES.get(_code(view.element_type))
        dtype = dtype or as_bytes
        if 0 in view.shape and dtype is not None:
            return torch.empty(view.shape, dtype=dtype, device=self.place.device)
        if as_bytes is not None:
            view = iree.HalBufferView(view.get_buffer(), view.shape, iree.HalElementType.UINT_8)
        tensor = from_dlpack(self._hal.create_dlpack_capsule(view, *self._dlpack))
        if dtype in (None, tensor.dtype):
            return tensor
        if dtype.itemsize != tensor.element_size():
            raise RunError(f"a result is {dtype_name(tensor.dtype)}, the signature says {dtype_name(dtype)}")
        # IREE's integers have no sign: an unsigned result arrives as a signed one.
        return tensor.view(dtype)


def _through(gate: AbstractContextManager[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called inside the gate."""

    def call(*arguments: Any) -> Any:
        with gate:
            return function(*arguments)

    return call


def plain(tensor: Tensor) -> Tensor:
    """The tensor's elements as they lie in memory, one behind the other."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def returned(outcome: Outcome) -> list[iree.HalBufferView]:
    """What the call returned, which is over."""
    ((_, results),) = outcome
    if not isinstance(results, iree.VmVariantList):
        return []
    return [results.get_as_object(i, iree.HalBufferView) for i in range(len(results))]


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of it, 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


# --- errors ------------------------------------------------------------------------------------


class reported:
    """Turns the IREE runtime's exceptions into a RunError that begins with ``what``.

    A class, since a context manager made of a generator costs a call one more microsecond.
    """

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, ValueError, IndexError, OSError)):
            raise RunError(f"{self.what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The part of an IREE message that is about the problem, not about IREE's source."""
    text = str(error).strip().partition("\n")[0]
    return re.sub(r"^.*?\.c(?:c|pp)?:\d+: ", "", text).rstrip("; ")
