"""Make a top-k that is no part of a grouped one a ``vmfuse.selection`` where the target has a kernel for it.

Like a linear layer it is no site of the report: without a kernel it is computed as well, in more time, and of
equal elements others may be chosen than eager PyTorch chooses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import SelectionSpec
from .operation import Operation, PatternFamily, Support, Types
from .sites import Ledger

SELECT = "torch.aten.topk"
_Size = TypeVar("_Size")


def fuse_selections(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Give every top-k that is left to a kernel where the target has one."""
    for op in [op.operation for op in block.operations]:
        if torch_ir.op_name(op) == SELECT:
            _fuse(op, support)


def _fuse(op: ir.Operation, support: Support) -> None:
    """Replace a ``torch.aten.topk`` by a ``vmfuse.selection`` if ``support`` has no objection.

    A kernel selects along the last axis: another one is brought there, and back in what was selected.
    """
    source, axis = torch_ir.tensor_type(op.operands[0]), torch_ir.constant(op.operands[2])
    if source is None or not source.shape or not isinstance(axis, int):
        return
    axis %= len(source.shape)
    spec = _spec(op, source.shape[axis], source.dtype)
    if spec is None or support(spec) is not None:
        return
    attributes = {"spec": canonical.to_attribute(spec), canonical.SITES: ir.ArrayAttr.get([])}
    with ir.InsertionPoint(op), op.location:
        x = _swapped(op.operands[0], axis)
        type_ = torch_ir.tensor_type(x)
        assert type_ is not None
        results = [type_.with_last(spec.count), type_.with_last(spec.count, "int64")]
        made = canonical.create(canonical.SELECTION, [x], results, **attributes)
        torch_ir.set_example(made, [_swapped_sizes(torch_ir.example_shape(old), axis) for old in op.results])
        for old, new in zip(op.results, made.results, strict=True):
            old.replace_all_uses_with(_swapped(new, axis))
    op.erase()


def _spec(op: ir.Operation, elements: int | None, dtype: str) -> SelectionSpec | None:
    """Read what is selected; None where the size of the axis, how many or in which order is not known."""
    count, _, largest, in_order = map(torch_ir.constant, list(op.operands)[1:])
    if elements is None or not isinstance(count, int):
        return None
    if not isinstance(largest, bool) or not isinstance(in_order, bool):
        return None
    return SelectionSpec(elements, count, dtype, largest, in_order)


def _swapped(value: ir.Value, axis: int) -> ir.Value:
    """``value`` with ``axis`` and the last one exchanged, at the current insertion point."""
    type_ = torch_ir.tensor_type(value)
    assert type_ is not None
    last = len(type_.shape) - 1
    if axis == last:
        return value
    shape = _swapped_sizes(type_.shape, axis)
    operands = [value, torch_ir.make_int(axis), torch_ir.make_int(last)]
    swapped = torch_ir.make("torch.aten.transpose.int", replace(type_, shape=shape), operands)
    torch_ir.set_example(swapped.owner.operation, [_swapped_sizes(torch_ir.example_shape(value), axis)])
    return swapped


def _swapped_sizes(sizes: tuple[_Size, ...] | None, axis: int) -> tuple[_Size, ...]:
    swapped = list(sizes or ())
    if swapped:
        swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
    return tuple(swapped)


def _why_no_kernel(spec: SelectionSpec, operands: Types, results: Types) -> str | None:
    x = (operands or [None])[0]
    if x is None or (x.dtype, x.shape[-1:]) != (spec.dtype, (spec.elements,)) or len(operands) != 1:
        return f"it selects from {', '.join(map(str, operands))}, and not of {spec.elements} {spec.dtype}"
    made = [x.with_last(spec.count), x.with_last(spec.count, "int64")]
    return None if list(results) == made else f"its results are {', '.join(map(str, results))}"


FAMILY = PatternFamily(
    operations=(Operation(canonical.SELECTION, SelectionSpec, _why_no_kernel, is_kernel=True),),
    fuse=fuse_selections,
)
