"""Step 6, the call at a site: make a fused operation a call of its kernel's function.

A kernel knows rows, an operation any number of leading axes: they are collapsed before and restored after.
A scale in columns is the kernel's buffer for the next kernel, and a logical tensor for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import func, linalg, tensor

from patterns import canonical, torch_ir, views
from patterns.contracts import ScaleLayout

from ..backends.embed import binding_type, index_constant
from ..backends.kernel_functions import function_name
from ..families.instance import Binding, KernelInstance
from .tensors import cast, reassociation


@dataclass(frozen=True)
class PhysicalScale:
    """A scale whose layout torch expresses with strides: the logical torch value, and the kernel's buffer."""

    logical: ir.Value
    buffer: ir.Value
    layout: ScaleLayout


def call(op: ir.Operation, kernel: KernelInstance, physical: list[PhysicalScale]) -> None:
    """Replace ``op`` by a call: leading axes collapsed to rows before, restored after.

    ``physical`` are the scales that kernels before this one have written, to which its own are added.
    """
    writes = [binding for binding in kernel.bindings if binding.access == "write"]
    with ir.InsertionPoint(op), op.location:
        reads = [binding for binding in kernel.bindings if binding.access == "read"]
        arguments = [
            _argument(binding, operand, physical) for binding, operand in zip(reads, op.operands, strict=True)
        ]
        made = func.CallOp([binding_type(binding) for binding in writes], function_name(kernel), arguments)
        for binding, result, old in zip(writes, made.results, op.results, strict=True):
            if binding.layout == "row":
                new = _restore(result, old, op.operands[0])
            else:
                new = _logical_scale(result, old, op.operands[0])
                physical.append(PhysicalScale(new, result, binding.layout))
            old.replace_all_uses_with(new)
    op.erase()


def _argument(binding: Binding, operand: ir.Value, physical: Sequence[PhysicalScale]) -> ir.Value:
    """Give the kernel what it reads for ``operand``: for a scale in columns the buffer that a kernel wrote.

    Where no kernel has written one, it is what the scale is the transpose of.
    """
    if binding.layout != "row":
        source, columns = views.same_rows(operand), views.transposed(operand)
        if columns is not None:
            return cast(torch_ir.to_builtin(columns), binding_type(binding))
        return next(s.buffer for s in physical if (s.logical, s.layout) == (source, binding.layout))
    value = torch_ir.to_builtin(operand)
    if binding.has_rows:
        return _collapse(value)
    return _one(value) if binding.shape == (1,) else value


def return_physical_scales(
    function: ir.Operation, scales: Sequence[PhysicalScale], row_major: Collection[int]
) -> dict[int, ScaleLayout]:
    """Return the kernel's buffer where the program returns a logical scale as it is, and not row after row.

    The runtime gives it the strides torch would; so no transpose is computed to be undone.  What no kernel
    computes is brought into its layout, to be returned alike.
    Returns the numbers of the results that changed, and the layout each has now.
    """
    by_value = {scale.logical: scale for scale in scales}
    terminator = list(torch_ir.block_of(function).operations)[-1].operation
    changed: dict[int, ScaleLayout] = {}
    for number, value in enumerate(terminator.operands):
        if number in row_major:  # the model made it contiguous
            continue
        source = views.same_rows(value)
        scale, left = by_value.get(source), _layout_without_kernel(source)
        logical = torch_ir.tensor_type(source)
        if logical is None or (scale is None and left is None):
            continue
        with ir.InsertionPoint(terminator), terminator.location:
            if scale is not None:
                rows = ir.RankedTensorType(scale.buffer.type).shape[0]
                physical = torch_ir.TensorType((rows, None), logical.dtype)
                terminator.operands[number] = torch_ir.from_builtin(scale.buffer, physical)
                changed[number] = scale.layout
            elif left is not None:
                physical = torch_ir.TensorType((logical.shape[-1], None), logical.dtype)
                terminator.operands[number] = canonical.physical_scale(source, physical, left)
                changed[number] = left
    if changed:
        inputs = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value).inputs
        results = [operand.type for operand in terminator.operands]
        function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, results))
    return changed


def _layout_without_kernel(scale: ir.Value) -> ScaleLayout | None:
    """The layout of the scale of a quantization that no kernel computes, where that is not ``row``."""
    op = torch_ir.producer(scale)
    if op is None or torch_ir.op_name(op) != canonical.GROUP_QUANT or scale == op.results[0]:
        return None
    layout = canonical.quantization(op).layout
    return layout if layout != "row" else None


def _one(value: ir.Value) -> ir.Value:
    """A tensor of one element, of any rank, as a vector."""
    type_ = ir.RankedTensorType(value.type)
    vector = ir.RankedTensorType.get([1], type_.element_type)
    if type_.rank == 0:
        return tensor.ExpandShapeOp(vector, value, reassociation([]), [], [1]).result
    if type_.rank > 1:
        return tensor.CollapseShapeOp(vector, value, reassociation([list(range(type_.rank))])).result
    return value


def _collapse(value: ir.Value) -> ir.Value:
    """[.., H] to [?, H], flat order unchanged; a vector is one row."""
    type_ = ir.RankedTensorType(value.type)
    if type_.rank == 1:
        row = ir.RankedTensorType.get([1, type_.shape[0]], type_.element_type)
        value = tensor.ExpandShapeOp(row, value, reassociation([[0, 1]]), [], [1, type_.shape[0]]).result
        type_ = row
    rows = ir.RankedTensorType.get([ir.ShapedType.get_dynamic_size(), type_.shape[-1]], type_.element_type)
    if type_.rank > 2:
        groups = [list(range(type_.rank - 1)), [type_.rank - 1]]
        leading = [type_.shape[i] for i in range(type_.rank - 1)]
        count = _product(leading)
        collapsed = ir.RankedTensorType.get([count, type_.shape[-1]], type_.element_type)
        value = tensor.CollapseShapeOp(collapsed, value, reassociation(groups)).result
    return cast(value, rows)


def _product(sizes: Sequence[int]) -> int:
    dynamic = ir.ShapedType.get_dynamic_size()
    return dynamic if dynamic in sizes else math.prod(sizes)


def _restore(result: ir.Value, old: ir.Value, source: ir.Value) -> ir.Value:
    """[?, N] back to the shape of ``old``, whose leading axes are those of ``source``."""
    wanted = torch_ir.tensor_type(old)
    assert wanted is not None
    target = wanted.builtin()
    rank = target.rank
    if rank > 2:
        known = torch_ir.to_builtin(source)
        leading = _product([target.shape[i] for i in range(rank - 1)])
        result = cast(result, ir.RankedTensorType.get([leading, target.shape[-1]], target.element_type))
        dynamic = [i for i in range(rank) if target.is_dynamic_dim(i)]
        sizes = [tensor.DimOp(known, index_constant(i)).result for i in dynamic]
        groups = reassociation([list(range(rank - 1)), [rank - 1]])
        shape = [
            ir.ShapedType.get_dynamic_size() if target.is_dynamic_dim(i) else target.shape[i]
            for i in range(rank)
        ]
        result = tensor.ExpandShapeOp(target, result, groups, sizes, shape).result
    elif rank == 1:
        flat = ir.RankedTensorType.get([1, target.shape[0]], target.element_type)
        result = tensor.CollapseShapeOp(target, cast(result, flat), reassociation([[0, 1]])).result
    return torch_ir.from_builtin(cast(result, target), wanted)


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
    return tensor.DimOp(_collapse(torch_ir.to_builtin(source)), index_constant(0)).result
