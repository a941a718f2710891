"""Launches the kernel objects that ``--dump-kernels`` writes, without IREE: for checks and timings.

CUDA objects go through cuda-bindings on torch's current stream, so launches can be captured into a CUDA
graph; CPU objects are linked by a C compiler into a library and called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.errors import RunError
from lowering.families.instance import KernelInstance
from lowering.families.instance import GridRule
from lowering.ops import (
    gated_activation_reference,
    group_quant_physical_reference,
    norm_reference,
    split_gate_up,
    static_quant_reference,
)
from patterns.contracts import GatedActivation, Quantization, Norm, RowSpec, Window

# What a launch may use of shared memory without asking the driver for more.
_PLAIN_SHARED = 48 << 10


@dataclass(frozen=True)
class Binding:
    """One tensor of a launch; ``dims`` is its shape for any number of rows T, rounded up to 4 in T4."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    shape: tuple[int, ...]
    access: str
    columns: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Give what is touched of it."""
        *leading, last = self.shape
        first, end = self.columns or (0, last)
        return math.prod(leading) * (end - first) * self.dtype.itemsize

    def resized(self, rows: int) -> Binding:
        """The same tensor for another number of rows."""
        sizes = {"T": rows, "T4": (rows + 3) // 4 * 4}
        return replace(self, shape=tuple(d if isinstance(d, int) else sizes[d] for d in self.dims))


@dataclass(frozen=True)
class Launch:
    """One entry of kernels.json."""

    entry: str
    object: Path
    arch: str
    grid: tuple[int, int, int]
    grid_rule: GridRule
    block: tuple[int, int, int]
    dynamic_shared: int
    bindings: tuple[Binding, ...]
    constants: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.constants[0]

    @property
    def bytes(self) -> int:
        """Give what has to be moved: every input read once, every output written once."""
        return sum(binding.bytes for binding in self.bindings)

    def resized(self, rows: int) -> Launch:
        """The same kernel over another number of rows."""
        grid = (self.grid_rule.workgroups(rows), *self.grid[1:])
        bindings = tuple(binding.resized(rows) for binding in self.bindings)
        return replace(self, grid=grid, bindings=bindings, constants=(rows, *self.constants[1:]))


def read_launches(directory: Path) -> list[Launch]:
    """The launches of ``directory``/kernels.json; RunError when it is not what is expected."""
    path = directory / "kernels.json"
    try:
        return [_launch(item, directory) for item in json.loads(path.read_text(encoding="utf-8"))["launches"]]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} cannot be used: {error!r}") from error


def _launch(item: Mapping[str, Any], directory: Path) -> Launch:
    if item["constants"] is None:
        raise ValueError(f"{item['entry']} has no example sizes")
    path = directory / item["object"]
    if not path.is_file():
        raise ValueError(f"there is no {path.name}")
    return Launch(
        entry=item["entry"],
        object=path,
        arch=item["arch"],
        grid=_triple(item["grid"]),
        grid_rule=GridRule(**{**item["grid_rule"], "few": tuple(map(tuple, item["grid_rule"]["few"]))}),
        block=_triple(item["block"]),
        dynamic_shared=item["dynamic_shared"],
        bindings=tuple(
            Binding(
                b["name"],
                getattr(torch, b["dtype"]),
                tuple(b["dims"]),
                tuple(b["shape"]),
                b["access"],
                tuple(b["columns"]) if b["columns"] else None,
            )
            for b in item["bindings"]
        ),
        constants=tuple(item["constants"]),
    )


def _triple(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = sizes
    return x, y, z


def launch_of(kernel: KernelInstance, path: Path, rows: int) -> Launch:
    """The launch of a kernel whose object is in ``path``, without a program around it."""
    return Launch(
        entry=kernel.entry,
        object=path,
        arch=kernel.target.arch,
        grid=kernel.grid(rows),
        grid_rule=kernel.grid_rule,
        block=kernel.block,
        dynamic_shared=kernel.dynamic_shared,
        bindings=tuple(
            Binding(b.name, getattr(torch, b.dtype), b.shape, kernel.shape(b, rows), b.access, b.columns)
            for b in kernel.bindings
        ),
        constants=(rows,),
    )


# Tensors ----------------------------------------------------------------------------------------


def inputs_for(launch: Launch, device: torch.device) -> dict[str, Tensor]:
    """Random tensors for the bindings that are read: a weight near 1, the rest normal."""
    made = {}
    for binding in launch.bindings:
        if binding.access == "read":
            values = torch.randn(binding.shape, device=device)
            values = 1.0 + 0.25 * values if len(binding.shape) == 1 else values
            made[binding.name] = values.to(binding.dtype)
    return made


def outputs_for(launch: Launch, device: torch.device) -> dict[str, Tensor]:
    """Tensors for the bindings that are written, filled with 0xff bytes: NaN in every dtype there is."""
    return {
        binding.name: torch.full((binding.bytes,), 0xFF, dtype=torch.uint8, device=device)
        .view(binding.dtype)
        .view(binding.shape)
        for binding in launch.bindings
        if binding.access != "read"
    }


def row_spec(data: Mapping[str, Any]) -> RowSpec:
    """A RowSpec from what ``RowSpec.to_dict`` wrote."""
    norm = Norm(**data["norm"]) if data["norm"] else None
    gate = GatedActivation(**data["gate"]) if data["gate"] else None
    quantizations = tuple(Quantization(**item) for item in data["quantizations"])
    windows = {key: Window(**data[key]) for key in ("x_window", "other_window") if data.get(key)}
    return RowSpec(**{**data, "norm": norm, "gate": gate, "quantizations": quantizations, **windows})


def reference(spec: RowSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give what the kernel of ``spec`` should write, by binding name, in plain torch operations."""
    y, total = inputs["x"][:, spec.columns("x")], None
    others = {name: inputs[name][:, spec.columns(name)] for name in ("residual", "up", "gate") if name in inputs}
    if spec.norm is not None:
        norm = replace(spec.norm, gate=spec.gate) if spec.gate_first else spec.norm
        gate = others["gate"] if spec.gate_first else None
        vectors = (inputs.get("weight"), norm, inputs.get("bias"))
        y, total = norm_reference(y, others.get("residual"), *vectors, gate)
    if spec.gate is not None and not spec.gate_first:
        if spec.norm is not None:
            halves = (others["gate"], y)
        else:
            halves = split_gate_up(y) if spec.gate.packed else (y, others["up"])
        y = gated_activation_reference(*halves, spec.gate)
    written: dict[str, Tensor] = {}
    if spec.writes_sum and total is not None:
        written["sum"] = total
    if spec.writes_y:
        written["y"] = y.to(getattr(torch, spec.y_dtype))
    for index, quantization in enumerate(spec.quantizations):
        if quantization.static:
            written[f"q{index}"] = static_quant_reference(y, inputs[f"scale{index}"], quantization)
        else:
            q, scale = group_quant_physical_reference(y, quantization)
            written |= {f"q{index}": q, f"scale{index}": scale}
    return written


# Launching --------------------------------------------------------------------------------------


class CudaKernel:
    """A cubin in the current CUDA context."""

    def __init__(self, launch: Launch) -> None:
        driver = importlib.import_module("cuda.bindings.driver")
        torch.cuda.current_stream().synchronize()  # makes torch's context current in this thread
        self._driver = driver
        self._image = ctypes.create_string_buffer(launch.object.read_bytes())
        self._module = self._call(driver.cuModuleLoadData(ctypes.addressof(self._image)))
        self._function = self._call(driver.cuModuleGetFunction(self._module, launch.entry.encode()))
        attributes = driver.CUfunction_attribute
        local = attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        self.spilled = self._call(driver.cuFuncGetAttribute(local, self._function))  # bytes a thread
        counted = attributes.CU_FUNC_ATTRIBUTE_NUM_REGS
        self.registers = self._call(driver.cuFuncGetAttribute(counted, self._function))
        if launch.dynamic_shared > _PLAIN_SHARED:
            attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call(driver.cuFuncSetAttribute(self._function, attribute, launch.dynamic_shared))

    def __call__(self, launch: Launch, tensors: Mapping[str, Tensor]) -> None:
        """Queue the launch on torch's current stream."""
        pointers = [ctypes.c_uint64(tensors[binding.name].data_ptr()) for binding in launch.bindings]
        values = [*pointers, *(ctypes.c_int32(constant) for constant in launch.constants)]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = self._driver.CUstream(torch.cuda.current_stream().cuda_stream)
        shared = launch.dynamic_shared
        where = ctypes.addressof(addresses)
        self._call(
            self._driver.cuLaunchKernel(self._function, *launch.grid, *launch.block, shared, stream, where, 0)
        )

    def _call(self, returned: tuple[Any, ...]) -> Any:
        status, *values = returned
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            raise RunError(f"the CUDA driver says {text.decode() if text else status}")
        return values[0] if values else None


class CpuKernel:
    """A relocatable object, linked into a library; workgroups run one after another in this thread."""

    def __init__(self, launch: Launch) -> None:
        self._directory = tempfile.TemporaryDirectory()
        library = Path(self._directory.name) / "kernel.so"
        subprocess.run([*_linker(), "-shared", "-o", str(library), str(launch.object)], check=True)
        self._entry = getattr(ctypes.CDLL(str(library)), launch.entry)
        self._entry.restype = None
        per_binding = (ctypes.c_void_p, ctypes.c_int64)
        self._entry.argtypes = [*per_binding * len(launch.bindings), ctypes.c_int32, ctypes.c_int32]

    def __call__(self, launch: Launch, tensors: Mapping[str, Tensor]) -> None:
        self.workgroups(launch, tensors, range(launch.grid[0]))

    def workgroups(self, launch: Launch, tensors: Mapping[str, Tensor], which: range) -> None:
        """Run some of the workgroups; ctypes lets other threads run meanwhile."""
        arguments = [part for binding in launch.bindings for part in (tensors[binding.name].data_ptr(), 0)]
        for workgroup in which:
            self._entry(*arguments, launch.rows, workgroup)


@functools.cache
def _linker() -> tuple[str, ...]:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    raise RunError("linking a CPU kernel needs a C compiler on PATH")


def kernel_for(launch: Launch, device: torch.device) -> CudaKernel | CpuKernel:
    """The object of ``launch``, ready to be called on ``device``."""
    return CpuKernel(launch) if device.type == "cpu" else CudaKernel(launch)
