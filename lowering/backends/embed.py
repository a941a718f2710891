"""Embed a kernel: the operations that any backend calls one by, and those of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from iree.compiler import ir
from iree.compiler.dialects import arith, hal

from patterns import torch_ir

from ..families.instance import Access, Binding, KernelInstance


def dynamic_sizes(kernel: KernelInstance, rows: ir.Value, access: Access) -> list[ir.Value]:
    """The run-time sizes of the operands or of the results, in order."""
    bindings = (binding for binding in kernel.bindings if binding.access == access)
    return [size for binding in bindings for size in sizes(binding, rows)]


def sizes(binding: Binding, rows: ir.Value) -> list[ir.Value]:
    """The run-time sizes of a tensor: T rows, or T rounded up to 4."""
    sizes = []
    for dim in binding.shape:
        if dim == "T":
            sizes.append(rows)
        elif dim == "T4":
            up = arith.AddIOp(rows, index_constant(3)).result
            sizes.append(arith.MulIOp(arith.DivUIOp(up, index_constant(4)).result, index_constant(4)).result)
    return sizes


def extern_dispatch(
    executable_format: str,
    kernel: KernelInstance,
    data: bytes,
    arguments: list[ir.Value],
    rows: ir.Value,
    writes: list[ir.Type],
) -> Sequence[ir.Value]:
    """Call a GPU's kernel: the operation holds its machine code, in ``executable_format``."""
    i32 = ir.IntegerType.get_signless(32)
    rows32 = arith.IndexCastUIOp(i32, rows).result
    x, y, z = kernel.block
    op = hal.DispatchExternOp(
        writes,
        kernel.entry,
        [rows],
        [rows32, *arguments],
        dynamic_sizes(kernel, rows, "read"),
        dynamic_sizes(kernel, rows, "write"),
        _pipeline_layout(kernel),
        [executable_target(executable_format)],
        ir.ArrayAttr.get([ir.IntegerAttr.get(ir.IndexType.get(), 0)]),
        [ir.ArrayAttr.get([_embedded_object(kernel, data)])],
        1,
        workgroup_size=ir.ArrayAttr.get([ir.IntegerAttr.get(ir.IndexType.get(), n) for n in (x, y, z)]),
        subgroup_size=ir.IntegerAttr.get(ir.IndexType.get(), kernel.target.wave),
        workgroup_local_memory=ir.IntegerAttr.get(ir.IndexType.get(), kernel.dynamic_shared),
    )
    region = op.operation.regions[0]
    block = region.blocks.append(ir.Type.parse("!hal.device"), ir.IndexType.get())
    with ir.InsertionPoint(block):
        ir.Operation.create("hal.return", operands=workgroups(kernel, block.arguments[1]))
    return op.operation.results


def workgroups(kernel: KernelInstance, rows: ir.Value) -> list[ir.Value]:
    """``GridRule.workgroups`` as operations: at least 1, since CUDA refuses an empty grid."""
    rule = kernel.grid_rule
    up = arith.AddIOp(rows, index_constant(rule.rows - 1)).result
    count = arith.DivUIOp(up, index_constant(rule.rows)).result
    if rule.most:
        count = arith.MinUIOp(count, index_constant(rule.most)).result
    for up_to, each in reversed(rule.few):
        few = arith.CmpIOp(arith.CmpIPredicate.ule, rows, index_constant(up_to)).result
        count = arith.SelectOp(few, arith.MulIOp(rows, index_constant(each)).result, count).result
    count = arith.MaxUIOp(count, index_constant(1)).result
    if rule.columns > 1:
        count = arith.MulIOp(count, index_constant(rule.columns)).result
    return [count, index_constant(1), index_constant(1)]


def _pipeline_layout(kernel: KernelInstance) -> ir.Attribute:
    # HAL attributes have no builders in the Python bindings; this text holds no user data.
    flags = [", ReadOnly" if b.access == "read" else "" for b in kernel.bindings]
    bindings = ", ".join(f"#hal.pipeline.binding<storage_buffer{flag}>" for flag in flags)
    return ir.Attribute.parse(f"#hal.pipeline.layout<constants = 1, bindings = [{bindings}]>")


def _embedded_object(kernel: KernelInstance, data: bytes) -> ir.Attribute:
    blob = np.frombuffer(data, dtype=np.int8)
    elements = ir.DenseElementsAttr.get(
        blob, type=ir.VectorType.get([len(blob)], ir.IntegerType.get_signless(8))
    )
    # The path is never opened, but an object without one does not survive printing and parsing.
    return ir.Attribute.parse(f'#hal.executable.object<{{path = "{kernel.entry}", data = {elements}}}>')


def binding_type(binding: Binding) -> ir.RankedTensorType:
    """The tensor the function takes or returns for ``binding``."""
    shape = tuple(dim if isinstance(dim, int) else None for dim in binding.shape)
    return torch_ir.TensorType(shape, binding.dtype).builtin()


def index_constant(value: int) -> ir.Value:
    """``value`` as an ``index``, where operations are being inserted."""
    return arith.ConstantOp(ir.IndexType.get(), value).result


def executable_target(executable_format: str) -> ir.Attribute:
    """The executable target an embedded object is for; general, so that it fits the device's own."""
    return ir.Attribute.parse(f"#hal.executable.target<{executable_format}>")
