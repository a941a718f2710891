"""Step 6, dispatch: each fused operation becomes a call of one kernel, embedded as machine code.

Every distinct kernel gets one private function over builtin tensors, called from each of its
sites: for cuda and hip the function holds a ``hal.dispatch.extern``, for the cpu a ``flow.dispatch``
of a ``stream.executable`` that calls the linked object.  The kernel's parameters are checked
against the dispatch before the object is embedded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from iree.compiler import ir
from iree.compiler.dialects import arith, flow, func, hal, linalg, stream, tensor

from patterns import canonical, torch_ir, views
from patterns.contracts import Contract, LinearSpec, MatmulSpec, RowSpec, ScaleLayout, Spec, TopkSpec
from patterns.sites import Cost, Ledger

from . import abi, linear_kernel, matmul_kernel, toolchain, topk_kernel
from . import kernel as row_kernel
from .devices import executable_target
from .kernel import Access, Binding, KernelInstance
from .targets import Target


@dataclass(frozen=True)
class _Family:
    """What makes the kernels of one kind of spec, and says why it cannot."""

    instance: Callable[[Any, Target], KernelInstance]
    why_unsupported: Callable[[Any, Target], str | None]


_FAMILIES: dict[type[Spec], _Family] = {
    RowSpec: _Family(row_kernel.instance, row_kernel.why_unsupported),
    TopkSpec: _Family(topk_kernel.instance, topk_kernel.why_unsupported),
    MatmulSpec: _Family(matmul_kernel.instance, matmul_kernel.why_unsupported),
    LinearSpec: _Family(linear_kernel.instance, linear_kernel.why_unsupported),
}


@dataclass
class Launch:
    """One call of a kernel, in the order of the program.

    ``rows`` is what the example arguments give, None where there were none (a model from MLIR).
    """

    kernel: KernelInstance
    rows: int | None


@dataclass(frozen=True)
class PhysicalScale:
    """A scale whose layout torch expresses with strides: the logical torch value, and the kernel's buffer."""

    logical: ir.Value
    buffer: ir.Value
    layout: ScaleLayout


@dataclass
class Dispatched:
    """What was embedded: the calls in program order, and each kernel's object by entry name."""

    launches: list[Launch] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    kernels: dict[str, KernelInstance] = field(default_factory=dict)
    physical_scales: list[PhysicalScale] = field(default_factory=list)


def dispatch(
    module: ir.Module,
    function: ir.Operation,
    target: Target,
    ledger: Ledger,
    directory: Path,
    progress: Callable[[str], None] = lambda entry: None,
) -> Dispatched:
    """Replace every operation of ``function`` that a kernel computes by a call of that kernel, in place.

    ``directory`` gets the objects IREE reads from files; it must live until IREE has run.
    ``progress`` is told each kernel's entry before it is compiled.

    Raises CompileError when an object's parameters are not what the dispatch passes and
    ToolchainError when the target's kernel compiler is missing.
    """
    done = Dispatched()
    chosen = choose_kernels(function, target, ledger)
    # Before any call is made: what a call returns no longer knows the sizes of the example.
    example_rows = [_example_rows(op, kernel) for op, kernel in chosen]
    for (op, kernel), rows in zip(chosen, example_rows, strict=True):
        if kernel.entry not in done.objects:
            progress(kernel.entry)
            done.objects[kernel.entry] = _checked_object(kernel)
            done.kernels[kernel.entry] = kernel
            _define(module, kernel, done.objects[kernel.entry], directory)
        done.launches.append(Launch(kernel, rows))
        _call(op, kernel, done.physical_scales)
    torch_ir.erase_dead(torch_ir.block_of(function))
    return done


def choose_kernels(
    function: ir.Operation, target: Target, ledger: Ledger
) -> list[tuple[ir.Operation, KernelInstance]]:
    """The kernel of every operation of ``function`` that has one, in block order; noted in ``ledger``."""
    chosen = []
    for op in [op.operation for op in torch_ir.block_of(function).operations]:
        spec = canonical.spec(op)
        if spec is not None:
            kernel = _FAMILIES[type(spec)].instance(spec, target)
            chosen.append((op, kernel))
            sites = canonical.sites_of(op)
            contracts = [ledger.records[site].contract for site in sites]
            for site, cost in zip(sites, _costs(kernel, contracts, _example_rows(op, kernel)), strict=True):
                ledger.assign_kernel(site, kernel.entry, cost)
    return chosen


def _costs(kernel: KernelInstance, contracts: Sequence[Contract | None], rows: int | None) -> list[Cost]:
    """What the sites of one operation have of its kernel's cost, in their order.

    A quantization writes its own results, equal ones once; the first site does everything else.
    """
    if rows is None or not contracts:
        return [Cost(None, int(number == 0)) for number in range(len(contracts))]
    written: dict[Contract | None, int] = defaultdict(int)
    for binding in kernel.bindings:
        size = kernel.elements(binding, rows) * torch_ir.element_bytes(binding.dtype)
        written[binding.quantization] += size
    everything_else = written.pop(None, 0)
    shares = [written.pop(contract, 0) for contract in contracts]
    shares[0] += everything_else
    return [Cost(share, int(number == 0)) for number, share in enumerate(shares)]


def _checked_object(kernel: KernelInstance) -> bytes:
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    return data


# -- the call at a site -----------------------------------------------------------------------------


def _example_rows(op: ir.Operation, kernel: KernelInstance) -> int | None:
    reads = [binding for binding in kernel.bindings if binding.access == "read"]
    shapes = (
        torch_ir.example_shape(operand)
        for binding, operand in zip(reads, op.operands, strict=True)
        if binding.has_rows
    )
    known = [shape for shape in shapes if shape is not None and len(shape) > 1]
    if known:
        return math.prod(known[0][:-1])
    type_ = torch_ir.tensor_type(op.operands[0])
    return 1 if type_ is not None and len(type_.shape) == 1 else None


def _call(op: ir.Operation, kernel: KernelInstance, physical: list[PhysicalScale]) -> None:
    """Replace ``op`` by a call: leading axes collapsed to rows before, restored after.

    ``physical`` are the scales that kernels before this one have written, to which its own are added.
    """
    writes = [binding for binding in kernel.bindings if binding.access == "write"]
    with ir.InsertionPoint(op), op.location:
        reads = [binding for binding in kernel.bindings if binding.access == "read"]
        arguments = [
            _argument(binding, operand, physical) for binding, operand in zip(reads, op.operands, strict=True)
        ]
        call = func.CallOp([_tensor_type(binding) for binding in writes], _function_name(kernel), arguments)
        for binding, result, old in zip(writes, call.results, op.results, strict=True):
            if binding.layout == "row":
                new = _restore(result, old, op.operands[0])
            else:
                new = _logical_scale(result, old, op.operands[0])
                physical.append(PhysicalScale(new, result, binding.layout))
            old.replace_all_uses_with(new)
    op.erase()


def _argument(binding: Binding, operand: ir.Value, physical: Sequence[PhysicalScale]) -> ir.Value:
    """What the kernel is given for ``operand``: a scale in columns as the buffer a kernel has written.

    Or, where no kernel has, as what it is the transpose of.
    """
    if binding.layout != "row":
        source, columns = views.same_rows(operand), views.transposed(operand)
        if columns is not None:
            return _cast(torch_ir.to_builtin(columns), _tensor_type(binding))
        return next(s.buffer for s in physical if (s.logical, s.layout) == (source, binding.layout))
    value = torch_ir.to_builtin(operand)
    return _collapse(value) if binding.has_rows else value


def return_physical_scales(function: ir.Operation, scales: Sequence[PhysicalScale]) -> dict[int, ScaleLayout]:
    """Where the program returns a logical scale as it is, return the kernel's buffer instead.

    The runtime gives it the strides torch would; so no transpose is computed to be undone.
    Returns the numbers of the results that changed, and the layout each has now.
    """
    by_value = {scale.logical: scale for scale in scales}
    terminator = list(torch_ir.block_of(function).operations)[-1].operation
    changed: dict[int, ScaleLayout] = {}
    for number, value in enumerate(terminator.operands):
        scale = by_value.get(views.same_rows(value))
        logical = torch_ir.tensor_type(value)
        if scale is not None and logical is not None:
            rows = ir.RankedTensorType(scale.buffer.type).shape[0]
            with ir.InsertionPoint(terminator), terminator.location:
                physical = torch_ir.TensorType((rows, None), logical.dtype)
                terminator.operands[number] = torch_ir.from_builtin(scale.buffer, physical)
            changed[number] = scale.layout
    if changed:
        inputs = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value).inputs
        results = [operand.type for operand in terminator.operands]
        function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, results))
    return changed


def _tensor_type(binding: Binding) -> ir.RankedTensorType:
    shape = tuple(dim if isinstance(dim, int) else None for dim in binding.shape)
    return torch_ir.TensorType(shape, binding.dtype).builtin()


def _collapse(value: ir.Value) -> ir.Value:
    """[.., H] to [?, H], flat order unchanged; a vector is one row."""
    type_ = ir.RankedTensorType(value.type)
    if type_.rank == 1:
        row = ir.RankedTensorType.get([1, type_.shape[0]], type_.element_type)
        value = tensor.ExpandShapeOp(row, value, _reassociation([[0, 1]]), [], [1, type_.shape[0]]).result
        type_ = row
    rows = ir.RankedTensorType.get([ir.ShapedType.get_dynamic_size(), type_.shape[-1]], type_.element_type)
    if type_.rank > 2:
        groups = [list(range(type_.rank - 1)), [type_.rank - 1]]
        leading = [type_.shape[i] for i in range(type_.rank - 1)]
        count = _product(leading)
        collapsed = ir.RankedTensorType.get([count, type_.shape[-1]], type_.element_type)
        value = tensor.CollapseShapeOp(collapsed, value, _reassociation(groups)).result
    return _cast(value, rows)


def _product(sizes: Sequence[int]) -> int:
    dynamic = ir.ShapedType.get_dynamic_size()
    return dynamic if dynamic in sizes else math.prod(sizes)


def _reassociation(groups: Sequence[Sequence[int]]) -> ir.ArrayAttr:
    i64 = ir.IntegerType.get_signless(64)
    return ir.ArrayAttr.get(
        [ir.ArrayAttr.get([ir.IntegerAttr.get(i64, i) for i in group]) for group in groups]
    )


def _cast(value: ir.Value, type_: ir.Type) -> ir.Value:
    return value if value.type == type_ else tensor.CastOp(type_, value).result


def _restore(result: ir.Value, old: ir.Value, source: ir.Value) -> ir.Value:
    """[?, N] back to the shape of ``old``, whose leading axes are those of ``source``."""
    wanted = torch_ir.tensor_type(old)
    assert wanted is not None
    target = wanted.builtin()
    rank = target.rank
    if rank > 2:
        known = torch_ir.to_builtin(source)
        leading = _product([target.shape[i] for i in range(rank - 1)])
        result = _cast(result, ir.RankedTensorType.get([leading, target.shape[-1]], target.element_type))
        dynamic = [i for i in range(rank) if target.is_dynamic_dim(i)]
        sizes = [tensor.DimOp(known, _index(i)).result for i in dynamic]
        groups = _reassociation([list(range(rank - 1)), [rank - 1]])
        shape = [
            ir.ShapedType.get_dynamic_size() if target.is_dynamic_dim(i) else target.shape[i]
            for i in range(rank)
        ]
        result = tensor.ExpandShapeOp(target, result, groups, sizes, shape).result
    elif rank == 1:
        flat = ir.RankedTensorType.get([1, target.shape[0]], target.element_type)
        result = tensor.CollapseShapeOp(target, _cast(result, flat), _reassociation([[0, 1]])).result
    return torch_ir.from_builtin(_cast(result, target), wanted)


def _logical_scale(result: ir.Value, old: ir.Value, source: ir.Value) -> ir.Value:
    """The logical [.., Gn] view of a physical [Gn, T4] scale: rows cut to T, axes swapped."""
    groups = ir.RankedTensorType(result.type).shape[0]
    rows = _row_count(source)
    element = ir.RankedTensorType(result.type).element_type
    dynamic = ir.ShapedType.get_dynamic_size()
    cut = tensor.ExtractSliceOp(
        ir.RankedTensorType.get([groups, dynamic], element),
        result,
        [],
        [rows],
        [],
        [0, 0],
        [groups, dynamic],
        [1, 1],
    ).result
    swapped_type = ir.RankedTensorType.get([dynamic, groups], element)
    empty = tensor.EmptyOp([rows, groups], element).result
    swapped = _transpose(cut, empty, swapped_type)
    return _restore(swapped, old, source)


def _transpose(value: ir.Value, out: ir.Value, type_: ir.Type) -> ir.Value:
    op = linalg.TransposeOp(result=[type_], input=value, init=out, permutation=[1, 0])
    linalg.fill_builtin_region(op.operation)  # pyright: ignore[reportAttributeAccessIssue]
    return op.results[0]


def _row_count(source: ir.Value) -> ir.Value:
    return tensor.DimOp(_collapse(torch_ir.to_builtin(source)), _index(0)).result


def _index(value: int) -> ir.Value:
    return arith.ConstantOp(ir.IndexType.get(), value).result


# -- the kernel, once per module ----------------------------------------------------------------------


def _function_name(kernel: KernelInstance) -> str:
    return f"dispatch.{kernel.entry}"


def _define(module: ir.Module, kernel: KernelInstance, data: bytes, directory: Path) -> None:
    """Add the private function that dispatches ``kernel``."""
    reads = [_tensor_type(b) for b in kernel.bindings if b.access == "read"]
    writes = [_tensor_type(b) for b in kernel.bindings if b.access == "write"]
    with module.context, ir.Location.name(kernel.entry):
        with ir.InsertionPoint.at_block_begin(module.body):
            if kernel.target.backend == "cpu":
                object_file = directory / f"{kernel.entry}.o"
                object_file.write_bytes(data)
                _define_executable(kernel, object_file)
            function = func.FuncOp(
                _function_name(kernel), ir.FunctionType.get(reads, writes), visibility="private"
            )
            entry = function.add_entry_block()
        with ir.InsertionPoint(entry):
            rows = tensor.DimOp(entry.arguments[0], _index(0)).result
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
            up = arith.AddIOp(rows, _index(3)).result
            sizes.append(arith.MulIOp(arith.DivUIOp(up, _index(4)).result, _index(4)).result)
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
    up = arith.AddIOp(rows, _index(rule.rows - 1)).result
    count = arith.DivUIOp(up, _index(rule.rows)).result
    if rule.most:
        count = arith.MinUIOp(count, _index(rule.most)).result
    for up_to, each in reversed(rule.few):
        few = arith.CmpIOp(arith.CmpIPredicate.ule, rows, _index(up_to)).result
        count = arith.SelectOp(few, arith.MulIOp(rows, _index(each)).result, count).result
    count = arith.MaxUIOp(count, _index(1)).result
    if rule.columns > 1:
        count = arith.MulIOp(count, _index(rule.columns)).result
    return [count, _index(1), _index(1)]


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
    binding_type = ir.Type.parse("!stream.binding")
    types = [binding_type] * len(kernel.bindings) + [ir.IndexType.get()]
    # Operands come first, then results: reads, the row count, writes.
    reads = sum(b.access == "read" for b in kernel.bindings)
    types = [binding_type] * reads + [ir.IndexType.get()] + [binding_type] * (len(kernel.bindings) - reads)
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
        _index(0),
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


def supported(target: Target) -> Callable[[Spec], str | None]:
    """What the fusion asks: why ``target`` has no kernel for a spec, or None."""
    return lambda spec: _FAMILIES[type(spec)].why_unsupported(spec, target)
