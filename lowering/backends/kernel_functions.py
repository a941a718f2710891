"""Step 6, the kernel in the module: one private function over builtin tensors, however many sites call it.

For cuda and hip the function holds a ``hal.dispatch.extern`` with the machine code, for the cpu a
``flow.dispatch`` of a ``stream.executable`` that calls the linked object.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from iree.compiler import ir
from iree.compiler.dialects import arith, flow, func, hal, stream, tensor

from patterns import torch_ir

from ..families.instance import Access, Binding, KernelInstance
from .devices import executable_target


def function_name(kernel: KernelInstance) -> str:
    """What calls call."""
    return f"dispatch.{kernel.entry}"


def define(module: ir.Module, kernel: KernelInstance, data: bytes, directory: Path) -> None:
    """Add the private function that dispatches ``kernel``."""
    reads = [binding_type(b) for b in kernel.bindings if b.access == "read"]
    writes = [binding_type(b) for b in kernel.bindings if b.access == "write"]
    with module.context, ir.Location.name(kernel.entry):
        with ir.InsertionPoint.at_block_begin(module.body):
            if kernel.target.backend == "cpu":
                object_file = directory / f"{kernel.entry}.o"
                object_file.write_bytes(data)
                _define_executable(kernel, object_file)
            function = func.FuncOp(
                function_name(kernel), ir.FunctionType.get(reads, writes), visibility="private"
            )
            entry = function.add_entry_block()
        with ir.InsertionPoint(entry):
            rows = tensor.DimOp(entry.arguments[0], index_constant(0)).result
            arguments = list(entry.arguments)
            if kernel.target.backend == "cpu":
                func.ReturnOp(_flow_dispatch(kernel, arguments, rows, writes))
            else:
                func.ReturnOp(_extern_dispatch(kernel, data, arguments, rows, writes))


def _dynamic_sizes(kernel: KernelInstance, rows: ir.Value, access: Access) -> list[ir.Value]:
    """The run-time sizes of the operands or of the results, in order."""
    bindings = (binding for binding in kernel.bindings if binding.access == access)
    return [size for binding in bindings for size in _sizes(binding, rows)]


def _sizes(binding: Binding, rows: ir.Value) -> list[ir.Value]:
    """The run-time sizes of a tensor: T rows, or T rounded up to 4."""
    sizes = []
    for dim in binding.shape:
        if dim == "T":
            sizes.append(rows)
        elif dim == "T4":
            up = arith.AddIOp(rows, index_constant(3)).result
            sizes.append(arith.MulIOp(arith.DivUIOp(up, index_constant(4)).result, index_constant(4)).result)
    return sizes


def _extern_dispatch(
    kernel: KernelInstance, data: bytes, arguments: list[ir.Value], rows: ir.Value, writes: list[ir.Type]
) -> Sequence[ir.Value]:
    i32 = ir.IntegerType.get_signless(32)
    rows32 = arith.IndexCastUIOp(i32, rows).result
    x, y, z = kernel.block
    op = hal.DispatchExternOp(
        writes,
        kernel.entry,
        [rows],
        [rows32, *arguments],
        _dynamic_sizes(kernel, rows, "read"),
        _dynamic_sizes(kernel, rows, "write"),
        _pipeline_layout(kernel),
        [executable_target(kernel.target)],
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
        ir.Operation.create("hal.return", operands=_workgroups(kernel, block.arguments[1]))
    return op.operation.results


def _workgroups(kernel: KernelInstance, rows: ir.Value) -> list[ir.Value]:
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


# -- the cpu's executable -------------------------------------------------------------------------------


def _executable_name(kernel: KernelInstance) -> str:
    return f"executable_{kernel.entry}"


def _workgroup_name(kernel: KernelInstance) -> str:
    return f"{kernel.entry}_workgroup"


def _flow_dispatch(
    kernel: KernelInstance, arguments: list[ir.Value], rows: ir.Value, writes: list[ir.Type]
) -> Sequence[ir.Value]:
    symbol = ir.SymbolRefAttr.get([_executable_name(kernel), _workgroup_name(kernel)])
    return flow.DispatchOp(
        writes,
        [rows],
        ir.ArrayAttr.get([symbol]),
        [*arguments, rows],
        _dynamic_sizes(kernel, rows, "read"),
        _dynamic_sizes(kernel, rows, "write"),
    ).operation.results


def _define_executable(kernel: KernelInstance, object_file: Path) -> None:
    """A ``stream.executable`` whose function hands every binding and the row count to the object."""
    executable = stream.ExecutableOp(_executable_name(kernel), sym_visibility="private")
    target = executable_target(kernel.target)
    # IREE's cpu linker takes objects from files only: embedded bytes reach it as an empty file.
    executable.operation.attributes["hal.executable.objects"] = ir.Attribute.parse(
        f'#hal.executable.objects<{{{target} = [#hal.executable.object<{{path = "{object_file}"}}>]}}>'
    )
    block = executable.operation.regions[0].blocks.append()
    with ir.InsertionPoint(block):
        export = stream.ExecutableExportOp(
            _workgroup_name(kernel), _workgroup_name(kernel), sym_visibility="public"
        )
        count = export.operation.regions[0].blocks.append(ir.IndexType.get())
        with ir.InsertionPoint(count):
            ir.Operation.create("stream.return", operands=_workgroups(kernel, count.arguments[0]))
        inner = ir.Operation.create("builtin.module", regions=1)
        body = inner.regions[0].blocks.append()
        with ir.InsertionPoint(body):
            _declare_import(kernel)
            _workgroup_function(kernel)
        ir.Operation.create("stream.executable.end")


def _import_types(kernel: KernelInstance) -> list[ir.Type]:
    types: list[ir.Type] = []
    for binding in kernel.bindings:
        types += [
            ir.MemRefType.get([], torch_ir.element_type(binding.dtype)),
            ir.IntegerType.get_signless(64),
        ]
    return types + [ir.IntegerType.get_signless(32)] * 2


def _declare_import(kernel: KernelInstance) -> None:
    declared = func.FuncOp(kernel.entry, ir.FunctionType.get(_import_types(kernel), []), visibility="private")
    declared.operation.attributes["hal.import.static"] = ir.UnitAttr.get()
    declared.operation.attributes["llvm.bareptr"] = ir.BoolAttr.get(True)


def _workgroup_function(kernel: KernelInstance) -> None:
    buffer = ir.Type.parse("!stream.binding")
    # Operands come first, then results: reads, the row count, writes.
    reads = sum(b.access == "read" for b in kernel.bindings)
    types = [buffer] * reads + [ir.IndexType.get()] + [buffer] * (len(kernel.bindings) - reads)
    function = func.FuncOp(_workgroup_name(kernel), ir.FunctionType.get(types, []))
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        arguments = list(entry.arguments)
        rows = arguments.pop(reads)
        operands: list[ir.Value] = []
        for binding, argument in zip(kernel.bindings, arguments, strict=True):
            operands += _pointer_and_offset(binding, argument, rows)
        i32 = ir.IntegerType.get_signless(32)
        workgroup = stream.DispatchWorkgroupIDOp(0).result
        operands += [arith.IndexCastUIOp(i32, rows).result, arith.IndexCastUIOp(i32, workgroup).result]
        func.CallOp([], kernel.entry, operands)
        func.ReturnOp([])


def _pointer_and_offset(binding: Binding, argument: ir.Value, rows: ir.Value) -> list[ir.Value]:
    i64 = ir.IntegerType.get_signless(64)
    dynamic = ir.ShapedType.get_dynamic_size()
    shape = [dim if isinstance(dim, int) else dynamic for dim in binding.shape]
    view = stream.BindingSubspanOp(
        ir.MemRefType.get(shape, torch_ir.element_type(binding.dtype)),
        argument,
        index_constant(0),
        _sizes(binding, rows),
    ).result
    element = torch_ir.element_type(binding.dtype)
    rank = len(shape)
    metadata = ir.Operation.create(
        "iree_codegen.extract_strided_metadata",
        results=[ir.MemRefType.get([], element)] + [ir.IndexType.get()] * (1 + 2 * rank),
        operands=[view],
    )
    return [metadata.results[0], arith.IndexCastOp(i64, metadata.results[1]).result]


# -- what both ends of a call agree on ---------------------------------------------------------------


def binding_type(binding: Binding) -> ir.RankedTensorType:
    """The tensor the function takes or returns for ``binding``."""
    shape = tuple(dim if isinstance(dim, int) else None for dim in binding.shape)
    return torch_ir.TensorType(shape, binding.dtype).builtin()


def index_constant(value: int) -> ir.Value:
    """``value`` as an ``index``, where operations are being inserted."""
    return arith.ConstantOp(ir.IndexType.get(), value).result
