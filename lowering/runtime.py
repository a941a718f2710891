"""Step 8, run: load a compiled program and call it with torch tensors.

Needs torch, numpy and iree-base-runtime; no compiler is imported here.  Tensors cross in both
directions by DLPack, without a copy.  Two kinds of argument are copied first: tensors that are not
contiguous, and, on the cpu, tensors that do not start at a multiple of 64 bytes (a slice, a file
mapped by another library), which the cpu driver cannot take.

Every call is checked against the signature in the program, because the IREE runtime checks only
ranks and element types: a wrong size would be read out of bounds.  A program without that signature
is refused.

Threads: any number of threads may call one program.  An IREE context may be used by one thread at a time, so
calls of one ``Program`` take turns; programs loaded separately run side by side.

Order on a GPU: a call waits for torch's current stream, runs, and returns when its results are there.
"""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from iree import runtime as iree
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.dlpack import from_dlpack, to_dlpack

from . import ops
from .errors import RunError, UsageError
from .signature import (
    SIGNATURE_KEY,
    Constant,
    Leaf,
    Parameters,
    Signature,
    Symbols,
    TensorSpec,
    missing_on_host,
    parameter_digest,
    resolve,
)

__all__ = ["Function", "Program", "load"]

_DRIVERS = {"cpu": "local-task", "cuda": "cuda", "hip": "hip"}
_DLPACK_TYPES = {"cpu": 1, "cuda": 2, "hip": 10}
_CPU_ALIGNMENT = 64
# IREE's torch pipeline exports each function a second time, with this after its name.
_ASYNC_TWIN = "$async"

# Read by the drivers when they are created. With stream-ordered allocations the CUDA and HIP drivers
# cannot export a result by DLPack.
_DRIVER_FLAGS = {"cuda": "--cuda_async_allocations=false", "hip": "--hip_async_allocations=false"}

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


_FROM_BYTES = {_code(element): dtype for dtype, element in _AS_BYTES.items()}

# The archive's entries are checked against their checksums, the small ones first, until this many
# bytes have been read; the largest ones are weights, and stay unread until they are used.
_CHECKED_BYTES = 64 << 20


def load(
    source: str | Path | bytes,
    device: str | torch.device | None = None,
    parameters: str | Path | None = None,
) -> Program:
    """Load a compiled program.

    source: path of a .vmfb, which is memory-mapped and must not be overwritten in place while the
    program lives, or its bytes.  device: 'cpu', 'cuda', 'cuda:1', 'hip', ...; default: what the
    program was compiled for.  parameters: the .irpa file, if the weights were kept outside.

    Raises RunError with one sentence when the file is missing, truncated, not ours or compiled for
    another device or architecture, when its parameters are missing or not the ones it was compiled
    with, or when the device's driver is not available; UsageError for an unknown device name.
    """
    name = "the program" if isinstance(source, bytes) else str(source)
    with _reported(f"{name} cannot be loaded"):
        _check_archive(source, name)
        module = _open_module(source)
        signatures = _signatures(module, name)
    first = next(iter(signatures.values()))
    place = _Place.for_program(first, device, name)
    needed = next((s.parameters for s in signatures.values() if s.parameters), None)
    providers = _parameter_modules(needed, parameters, name)
    with _reported(f"{name} cannot be loaded on {place}"):
        return Program(module, signatures, place, providers)


class Program:
    """A loaded program: ``program(*args, **kwargs)`` calls ``main``, ``program[name](...)`` any function.

    Arguments are those of the module that was compiled; the result has the structure that module
    returned (a flat tuple where the structure's type is not known in this process).
    """

    def __init__(
        self,
        module: iree.VmModule,
        signatures: dict[str, Signature],
        place: _Place,
        parameter_modules: Sequence[iree.VmModule] = (),
    ):
        session = _Session(module, place, parameter_modules)
        self._functions = {
            name: Function(name, signature, session, _lookup(module, name))
            for name, signature in signatures.items()
        }

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the exported functions."""
        return tuple(self._functions)

    def __getitem__(self, name: str) -> Function:
        if name not in self._functions:
            raise RunError(f"the program has no function {name!r}; it has {', '.join(self._functions)}")
        return self._functions[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._default(*args, **kwargs)

    @property
    def _default(self) -> Function:
        return self[next(iter(self._functions)) if len(self._functions) == 1 else "main"]


class Function:
    """One exported function of a program."""

    def __init__(self, name: str, signature: Signature, session: _Session, function: iree.VmFunction):
        self.name = name
        self.signature = signature
        self.tensor_inputs = _tensors(signature.inputs)
        """The arguments of ``run``; None when the program does not say."""
        self.tensor_outputs = _tensors(signature.outputs)
        """The results of ``run``; None when the program does not say."""
        self._session = session
        self._function = function
        self._in_tree = _load_tree(signature.input_tree)
        self._out_tree = _load_tree(signature.output_tree)
        self._keywords = _keywords(signature.input_tree)

    @property
    def device(self) -> torch.device:
        """Where arguments must be and results are."""
        return self._session.place.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self._flatten(args, kwargs)
        inputs = self.signature.inputs
        if inputs is not None:
            if len(leaves) != len(inputs):
                raise RunError(f"{self._describe()}, got {len(leaves)}")
            leaves = _drop_constants(inputs, leaves)
        results = list(self._results(self.run(*leaves)))
        if self._out_tree is not None and self._out_tree.num_leaves == len(results):
            return pytree.tree_unflatten(results, self._out_tree)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """Call with the tensor arguments alone, flat and in order; returns the tensors of the result."""
        symbols = self._check(tensors)
        session = self._session
        if session.place.backend != "cpu" and (empty := self._all_empty(symbols)) is not None:
            return empty
        views = session.invoke(self._function, tensors)
        outputs = self.tensor_outputs
        if outputs is None:
            return [session.to_torch(view, None) for view in views]
        if len(outputs) != len(views):
            raise RunError(f"{self.name} returned {len(views)} tensors, its signature says {len(outputs)}")
        return [_result(session, view, spec, symbols) for view, spec in zip(views, outputs, strict=True)]

    def _all_empty(self, symbols: Symbols) -> list[Tensor] | None:
        """The results, if all of them are known to be empty, which no GPU driver of IREE's can make: CUDA
        refuses an empty grid and fails the device with it; HIP has no address for an empty buffer, and
        the driver waits for one for ever."""
        results = []
        for spec in self.tensor_outputs or ():
            shape = [resolve(dim, symbols) for dim in spec.shape or (None,)]
            sizes = [size for size in shape if size is not None]
            if len(sizes) != len(shape) or 0 not in sizes:
                return None
            results.append(torch.empty(sizes, dtype=getattr(torch, spec.dtype), device=self.device))
        return results or None

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        if self._in_tree is None:
            if kwargs:
                raise RunError(f"{self._describe()} and no keywords, got {', '.join(kwargs)}")
            return args
        if set(kwargs) == set(self._keywords):
            # A dictionary's tree knows the order of its keys; a call may write them in any order.
            kwargs = {name: kwargs[name] for name in self._keywords}
        leaves, tree = pytree.tree_flatten((args, kwargs))
        if tree != self._in_tree:
            raise RunError(f"{self._describe()}, got {_describe_call(args, kwargs)}")
        return leaves

    def _check(self, tensors: Sequence[Any]) -> Symbols:
        """Check the arguments of ``run`` and return the value of every symbol."""
        specs = self.tensor_inputs
        device = self.device
        for position, tensor in enumerate(tensors):
            name = specs[position].name if specs and position < len(specs) else str(position)
            if not isinstance(tensor, Tensor):
                raise RunError(f"argument {name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.device != device:
                raise RunError(f"argument {name} is on {tensor.device}, the program runs on {device}")
        if specs is None:
            return {}
        if len(tensors) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise RunError(f"{self.name} takes {len(specs)} tensors ({names}), got {len(tensors)}")
        return _bind(specs, tensors)

    def _results(self, tensors: Sequence[Tensor]) -> Iterator[Any]:
        """The leaves of the result: the tensors, with the burned-in constants between them."""
        remaining = iter(tensors)
        for leaf in self.signature.outputs or ():
            yield leaf.value if isinstance(leaf, Constant) else next(remaining)
        yield from remaining

    def _describe(self) -> str:
        """'main takes 2 arguments (x, y)'."""
        leaves = self.signature.inputs
        if leaves is None:
            return f"{self.name} takes tensors"
        names = ", ".join(str(x.value) if isinstance(x, Constant) else x.name for x in leaves)
        keywords = f", keywords {', '.join(self._keywords)}" if self._keywords else ""
        plural = "" if len(leaves) == 1 else "s"
        return f"{self.name} takes {len(leaves)} argument{plural} ({names}{keywords})"


# --- checking a call ---------------------------------------------------------------------------


def _tensors(leaves: tuple[Leaf, ...] | None) -> tuple[TensorSpec, ...] | None:
    return None if leaves is None else tuple(leaf for leaf in leaves if isinstance(leaf, TensorSpec))


def _drop_constants(specs: tuple[Leaf, ...], leaves: Sequence[Any]) -> list[Any]:
    """The leaves that are tensors; the others must have the value that was compiled."""
    tensors = []
    for position, (spec, leaf) in enumerate(zip(specs, leaves, strict=True)):
        if isinstance(spec, TensorSpec):
            tensors.append(leaf)
        elif isinstance(leaf, Tensor) or type(leaf) is not type(spec.value) or leaf != spec.value:
            got = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
            raise RunError(f"argument {position} was compiled as the constant {spec.value!r}, got {got}")
    return tensors


def _bind(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> Symbols:
    """Check dtypes and shapes; the value of every symbol."""
    symbols: Symbols = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        if _dtype_name(tensor.dtype) != spec.dtype:
            raise _mismatch(spec, tensor)
        if spec.shape is None:
            continue
        if tensor.dim() != len(spec.shape):
            raise _mismatch(spec, tensor)
        for dim, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                symbols.setdefault(dim, size)
    # In a second pass: a size such as 2*s0 may come before the argument that gives s0 its value.
    for spec, tensor in zip(specs, tensors, strict=True):
        for dim, size in zip(spec.shape or (), tensor.shape, strict=spec.shape is not None):
            expected = resolve(dim, symbols)
            if expected is not None and expected != size:
                raise _mismatch(spec, tensor, f" where {dim} = {expected}" if isinstance(dim, str) else "")
    return symbols


def _mismatch(spec: TensorSpec, tensor: Tensor, why: str = "") -> RunError:
    got = f"{_dtype_name(tensor.dtype)}[{', '.join(str(size) for size in tensor.shape)}]"
    return RunError(f"argument {spec.name}: expected {spec}, got {got}{why}")


def _describe_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """'3 and keywords mask', or that only the nesting differs."""
    keywords = f" and keywords {', '.join(kwargs)}" if kwargs else ""
    return f"{len(args)} positional{keywords}, or other containers inside them"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _result(session: _Session, view: iree.HalBufferView, spec: TensorSpec, symbols: Symbols) -> Tensor:
    tensor = session.to_torch(view, getattr(torch, spec.dtype))
    if spec.strides is None:
        return tensor
    leading = [resolve(dim, symbols) for dim in (spec.shape or ())[:-1]]
    known = [size for size in leading if size is not None]
    if len(known) != len(leading):
        raise RunError(f"result {spec.name}: the size of {spec} does not follow from the arguments")
    return ops.from_physical(tensor, tuple(known), spec.strides)


# --- trees -------------------------------------------------------------------------------------


def _load_tree(text: str | None) -> pytree.TreeSpec | None:
    """The tree, or None where it names a container type that this process does not know."""
    if text is None:
        return None
    try:
        return pytree.treespec_loads(text)
    except (NotImplementedError, ValueError, KeyError, AttributeError, ImportError):
        return None


def _keywords(text: str | None) -> tuple[str, ...]:
    """The keyword arguments of an input tree ``(args, kwargs)``, in order."""
    if text is None:
        return ()
    children = json.loads(text)[1]["children_spec"]
    return tuple(json.loads(children[1]["context"])) if len(children) == 2 else ()


# --- devices and invocation --------------------------------------------------------------------


class _Place:
    """A device, by IREE's name and by torch's."""

    def __init__(self, backend: str, index: int):
        self.backend = backend
        self.index = index
        self.emulated = _emulated_arch(index) if backend == "hip" else None
        """The architecture of a GPU that the cpu plays, whose tensors are torch's cpu tensors; else None."""
        on_host = backend == "cpu" or self.emulated is not None
        # torch's ROCm build calls its devices cuda.
        self.device = torch.device("cpu") if on_host else torch.device("cuda", index)

    def __str__(self) -> str:
        return "cpu" if self.backend == "cpu" else f"{self.backend}:{self.index}"

    @staticmethod
    def for_program(signature: Signature, device: str | torch.device | None, name: str) -> _Place:
        """Where ``signature`` is to run; RunError unless it can."""
        backend, index = _parse_device(str(device or signature.backend))
        compiled = f"{name} was compiled for {signature.target}"
        if backend == "cuda" and isinstance(device, torch.device) and torch.version.hip:
            backend = "hip"
        if backend != signature.backend:
            raise RunError(f"{compiled} ({signature.backend}) and cannot run on {backend}")
        place = _Place(backend, index)
        refusal = place.refusal(signature.arch)
        if refusal is not None:
            raise RunError(f"{compiled}; {refusal}")
        return place

    def refusal(self, arch: str) -> str | None:
        """Why this device cannot run code for ``arch``, or None."""
        if self.backend == "cpu":
            missing = missing_on_host(arch)
            return missing and f"this machine lacks {missing}"
        # The driver first: without one, torch says less about what is missing.
        _hal_device(self.backend, self.index)
        if self.emulated is not None:
            return None if self.emulated == arch else f"{self} is an emulated {self.emulated}"
        built_for = "HIP" if torch.version.hip else "CUDA" if torch.version.cuda else "the cpu alone"
        if built_for.lower() != self.backend:
            return f"the torch {torch.__version__} here is built for {built_for}"
        if self.index >= torch.cuda.device_count():
            return f"this machine has no {self}"
        actual = _gpu_arch(self.index)
        # sm_90a: the a says that nothing but this very architecture will do, as for every cubin here.
        needed = arch.removesuffix("a") if self.backend == "cuda" else arch
        return None if actual == needed else f"{self} is {actual}"


def _gpu_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _emulated_arch(index: int) -> str | None:
    """What the HIP stand-in of ``tools/gfx950`` calls its device "emulated" of; None of any other device."""
    _hal_device("hip", index)
    name = iree.get_driver("hip").query_available_devices()[index]["name"]
    found = re.fullmatch(r"emulated (gfx\w+)", name)
    return found and found[1]


def _parse_device(text: str) -> tuple[str, int]:
    backend, _, index = text.partition(":")
    if backend not in _DRIVERS or not (index or "0").isdecimal():
        raise UsageError(f"unknown device {text!r}; known devices: cpu, cuda, cuda:N, hip, hip:N")
    return backend, int(index or 0)


@cache
def _instance() -> iree.VmInstance:
    return iree.VmInstance()


_DEVICE_LOCK = threading.Lock()
_API_NAMES = {"cpu": "cpu", "cuda": "CUDA", "hip": "HIP"}


def _hal_device(backend: str, index: int) -> iree.HalDevice:
    """IREE's device, one per process; RunError when its driver is not available."""
    uri = _DRIVERS[backend] if backend == "cpu" else f"{_DRIVERS[backend]}://{index}"
    try:
        with _DEVICE_LOCK:
            if backend in _DRIVER_FLAGS:
                iree.flags.parse_flags(_DRIVER_FLAGS[backend])
            return iree.get_device(uri)
    except (RuntimeError, ValueError, OSError) as error:
        what = f"no {_API_NAMES[backend]} driver or device"
        raise RunError(f"there is {what} on this machine: {_reason(error)}") from error


class _Session:
    """One IREE context on one device; calls take turns."""

    def __init__(self, module: iree.VmModule, place: _Place, parameter_modules: Sequence[iree.VmModule]):
        self.place = place
        # What an empty tensor points to: torch's points nowhere, which crashes the cpu driver.  Made first:
        # on a GPU it also makes the device current in this thread, which IREE's module loading relies on.
        self._somewhere = torch.zeros(_CPU_ALIGNMENT, dtype=torch.uint8, device=place.device)
        self._hal = _hal_device(place.backend, place.index)
        hal_module = iree.create_hal_module(_instance(), self._hal)
        self._context = iree.VmContext(_instance(), [hal_module, *parameter_modules, module])
        self._lock = threading.Lock()

    def invoke(self, function: iree.VmFunction, tensors: Sequence[Tensor]) -> list[iree.HalBufferView]:
        """Call ``function`` and wait for its results."""
        arguments = iree.VmVariantList(len(tensors))
        for tensor in tensors:
            arguments.push_ref(self.to_iree(tensor).ref)
        results = iree.VmVariantList(4)
        if self.place.device.type == "cuda":
            # After the conversions above, which may have queued copies.
            torch.cuda.current_stream(self.place.device).synchronize()
        with self._lock, _reported(f"{function.name} failed"):
            self._context.invoke(function, arguments, results)
        return [results.get_as_object(i, iree.HalBufferView) for i in range(len(results))]

    def to_iree(self, tensor: Tensor) -> iree.HalBufferView:
        """The tensor's memory as a buffer view, which keeps it alive."""
        tensor = tensor.detach().contiguous()
        if tensor.numel() == 0:
            return self._empty(tensor)
        if self.place.backend == "cpu" and tensor.data_ptr() % _CPU_ALIGNMENT:
            tensor = tensor.clone()
        element = _AS_BYTES.get(tensor.dtype)
        if element is None:
            return self._import(tensor)
        view = self._import(tensor.view(torch.uint8))
        return iree.HalBufferView(view.get_buffer(), list(tensor.shape), element)

    def _empty(self, tensor: Tensor) -> iree.HalBufferView:
        element = _AS_BYTES.get(tensor.dtype)
        if element is None:
            element = self._import(self._somewhere.view(tensor.dtype)).element_type
        return iree.HalBufferView(self._import(self._somewhere).get_buffer(), list(tensor.shape), element)

    def _import(self, tensor: Tensor) -> iree.HalBufferView:
        view = self._hal.from_dlpack_capsule(to_dlpack(tensor))
        return view if self.place.emulated is None else self._upload(tensor, view)

    def _upload(self, tensor: Tensor, view: iree.HalBufferView) -> iree.HalBufferView:
        """A copy in the emulated GPU's own memory, so that it knows where a buffer ends."""
        buffer = self._hal.allocator.allocate_buffer_copy(
            memory_type=iree.MemoryType.DEVICE_LOCAL,
            allowed_usage=iree.BufferUsage.DEFAULT,
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
        on_host = self.place.device.type == "cpu"
        dlpack_type = _DLPACK_TYPES["cpu" if on_host else self.place.backend]
        capsule = self._hal.create_dlpack_capsule(view, dlpack_type, 0 if on_host else self.place.index)
        tensor = from_dlpack(capsule)
        if dtype in (None, tensor.dtype):
            return tensor
        if dtype.itemsize != tensor.element_size():
            raise RunError(
                f"a result is {_dtype_name(tensor.dtype)}, the signature says {_dtype_name(dtype)}"
            )
        # IREE's integers have no sign: an unsigned result arrives as a signed one.
        return tensor.view(dtype)


# --- files -------------------------------------------------------------------------------------


def _check_archive(source: str | Path | bytes, name: str) -> None:
    """RunError unless ``source`` is a complete .vmfb: a ZIP archive whose first entry is the module.

    IREE accepts a file whose tail is missing and reads beyond its end.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            if "module.fb" not in archive.namelist():
                raise RunError(f"{name} is not a compiled program")
            budget = _CHECKED_BYTES
            for entry in sorted(archive.infolist(), key=lambda entry: entry.file_size):
                budget -= entry.file_size
                if budget < 0:
                    break
                archive.read(entry)
    except OSError as error:
        raise RunError(f"{name} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise RunError(f"{name} is not a compiled program, or it is truncated or damaged") from error


def _open_module(source: str | Path | bytes) -> iree.VmModule:
    if isinstance(source, bytes):
        return iree.VmModule.copy_buffer(_instance(), source)
    return iree.VmModule.mmap(_instance(), str(source))


def _signatures(module: iree.VmModule, name: str) -> dict[str, Signature]:
    """The functions of a program that carry a signature, by name; not their twins that take fences."""
    found: dict[str, Signature] = {}
    for function in module.function_names:
        if function.endswith(_ASYNC_TWIN):
            continue
        text = _lookup(module, function).reflection.get(SIGNATURE_KEY)
        if text is None:
            continue
        try:
            found[function] = Signature.from_json(text)
        except ValueError as error:
            raise RunError(f"{name} cannot be loaded: {error}") from error
    if not found:
        raise RunError(f"{name} was not made by compile-to-vmfb: it carries no {SIGNATURE_KEY}")
    return found


def _lookup(module: iree.VmModule, name: str) -> iree.VmFunction:
    function = module.lookup_function(name)
    if function is None:
        raise RunError(f"the program has no function {name!r}")
    return function


def _parameter_modules(needed: Parameters | None, path: str | Path | None, name: str) -> list[iree.VmModule]:
    """The module that gives a program its weights, after checking that they are the right ones."""
    if needed is None:
        if path is not None:
            raise RunError(f"{name} carries its own parameters and takes none from {path}")
        return []
    if path is None:
        raise RunError(f"{name} keeps its parameters in a separate .irpa file: pass parameters=FILE")
    try:
        digest = parameter_digest(path)
        if digest != needed.digest:
            raise RunError(f"{path} does not hold the parameters that {name} was compiled with")
        index = iree.ParameterIndex()
        index.load(str(path))
    except OSError as error:
        raise RunError(f"parameters {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise RunError(f"parameters {path} cannot be used: {_reason(error)}") from error
    provider = index.create_provider(scope=needed.scope)
    return [iree.create_io_parameters_module(_instance(), provider)]


# --- errors ------------------------------------------------------------------------------------


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn the IREE runtime's exceptions into a RunError that begins with ``what``."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise RunError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The part of an IREE message that is about the problem, not about IREE's source."""
    text = str(error).strip().partition("\n")[0]
    return re.sub(r"^.*?\.c(?:c|pp)?:\d+: ", "", text).rstrip("; ")
