"""Step 6, the kernel in the module: one private function over builtin tensors, however many sites call it.

On GPUs the function holds a ``hal.dispatch.extern`` with the machine code, on the cpu a
``flow.dispatch`` of a ``stream.executable`` that calls the linked object.
"""

from __future__ import annotations

from pathlib import Path

from iree.compiler import ir
from iree.compiler.dialects import func, tensor

from ..families.instance import KernelInstance
from .embed import binding_type, index_constant
from .registry import backend_of


def function_name(kernel: KernelInstance) -> str:
    """Name the function that the sites of ``kernel`` call."""
    return f"dispatch.{kernel.entry}"


def define(module: ir.Module, kernel: KernelInstance, data: bytes, directory: Path) -> None:
    """Add the private function that dispatches ``kernel``."""
    backend = backend_of(kernel.target)
    reads = [binding_type(b) for b in kernel.bindings if b.access == "read"]
    writes = [binding_type(b) for b in kernel.bindings if b.access == "write"]
    with module.context, ir.Location.name(kernel.entry):
        with ir.InsertionPoint.at_block_begin(module.body):
            backend.declare(kernel, data, directory)
            function = func.FuncOp(
                function_name(kernel), ir.FunctionType.get(reads, writes), visibility="private"
            )
            entry = function.add_entry_block()
        with ir.InsertionPoint(entry):
            rows = tensor.DimOp(entry.arguments[0], index_constant(0)).result
            func.ReturnOp(backend.dispatch(kernel, data, list(entry.arguments), rows, writes))
