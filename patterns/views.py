"""Views between a producer and a quantization, and how a quantization passes them.

Two kinds can be passed.  A flat view regroups the row-major order of a tensor: groups of G elements
along the last axis are runs of G in that order, so when the last axis is a multiple of G before and
after, quantizing first and viewing q and scale afterwards gives the same groups.  A row view picks,
repeats or reorders whole rows and never looks inside one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import Quantization

FLAT_VIEWS = frozenset(
    {
        "torch.aten.view",
        "torch.aten.unsqueeze",
        "torch.aten.squeeze.dim",
        "torch.prims.squeeze",
        "torch.aten.flatten.using_ints",
        "torch.aten.unflatten.int",
    }
)


SCALE_COMES_LATER = (
    "its scale is computed behind what it quantizes; one that is a parameter or an argument is known before"
)


def is_view(op: ir.Operation | None) -> bool:
    """Tell whether ``op`` is a view of its first operand, of either kind or of one that cannot be passed."""
    return op is not None and (op.name in FLAT_VIEWS or op.name in _TOUCHED_AXES)


def is_flat_view(op: ir.Operation | None) -> bool:
    """Tell whether ``op`` only regroups the flat order of its first operand."""
    return op is not None and op.name in FLAT_VIEWS


def keeps_rows(op: ir.Operation | None) -> bool:
    """Tell whether ``op`` is a view that only regroups the leading axes of its first operand."""
    if op is None or not is_flat_view(op):
        return False
    before, after = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(op.result)
    return (
        before is not None
        and after is not None
        and before.shape[-1:] == after.shape[-1:] not in ((), (None,))
    )


def same_rows(value: ir.Value) -> ir.Value:
    """Find what ``value`` is a view of, as far as views only regroup leading axes."""
    view = torch_ir.producer(value)
    while view is not None and keeps_rows(view):
        value = view.operands[0]
        view = torch_ir.producer(value)
    return value


def transposed(value: ir.Value) -> ir.Value | None:
    """The matrix whose transpose ``value`` is; None if it is none."""
    op = torch_ir.producer(value)
    swaps = op is not None and op.name == "torch.aten.permute" and torch_ir.constant(op.operands[1]) == [1, 0]
    return op.operands[0] if op is not None and swaps else None


def is_quantized(value: ir.Value) -> bool:
    """Tell whether a ``vmfuse.group_quant`` reads ``value``, through views or not."""
    users = torch_ir.users(value)
    return any(_quantizes(user) or (is_view(user) and is_quantized(user.result)) for user in users)


def only_quantized(value: ir.Value) -> bool:
    """Tell whether ``value`` has readers, and all are ``vmfuse.group_quant``, through views or not."""
    users = torch_ir.users(value)
    return bool(users) and all(
        _quantizes(user) or (is_view(user) and only_quantized(user.result)) for user in users
    )


def _quantizes(op: ir.Operation) -> bool:
    return torch_ir.op_name(op) == canonical.GROUP_QUANT


def why_blocked(view: ir.Operation, quantization: Quantization, returned: bool = True) -> str | None:
    """Say why ``quantization`` cannot be moved above ``view``; None when it can.

    A scale layout says how the scale lies in memory: where it is not ``returned`` nobody sees that.
    """
    before, after = torch_ir.tensor_type(view.operands[0]), torch_ir.tensor_type(view.result)
    if before is None or after is None or not before.shape or not after.shape:
        return "a view between producer and quantization has no known rank"
    if quantization.static:
        known = before.shape[-1] and after.shape[-1]
        return None if known else "the last axis of a view before it has a size unknown until run time"
    if is_flat_view(view):
        return _why_groups_break(before, after, quantization, returned)
    axes = _TOUCHED_AXES[view.name](view, len(before.shape))
    kind = view.name.split(".")[2]
    if _takes_whole_groups(view, quantization, returned):
        return None
    if axes is None or len(before.shape) - 1 in axes:
        return f"a {kind} between producer and quantization touches the last axis, which holds the groups"
    if quantization.layout != "row" and returned:
        return (
            f"a {kind} between producer and quantization moves rows, "
            f"which a {quantization.layout} scale layout cannot follow"
        )
    return None


def _why_groups_break(
    before: torch_ir.TensorType, after: torch_ir.TensorType, quantization: Quantization, returned: bool
) -> str | None:
    for size, side in ((before.shape[-1], "before"), (after.shape[-1], "after")):
        where = f"the last axis {side} the view between producer and quantization"
        if size is None:
            return f"{where} has a size unknown until run time"
        if quantization.group is not None and size % quantization.group:
            return f"group {quantization.group} does not divide {where}, {size}"
    if before.shape[-1] == after.shape[-1]:
        return None
    rows = f"rows of {after.shape[-1]} out of rows of {before.shape[-1]}"
    split = f"the view between producer and quantization makes {rows}"
    if quantization.group is None:
        return f"{split}, and the quantization has one scale for a whole row"
    # A word of packed scales holds those of four groups, whatever row they are from.
    if quantization.layout == "ue8m0_packed" or (quantization.layout != "row" and returned):
        return f"{split}, which a {quantization.layout} scale layout cannot follow"
    return None


@dataclass(frozen=True)
class SliceBounds:
    """A slice of step 1: its axis, counted from the front, and the first and one past the last element."""

    axis: int
    start: int
    end: int


def slice_bounds(view: ir.Operation) -> SliceBounds | None:
    """Read what a slice takes of an axis of known size; None for another view, size or step."""
    if view.name != "torch.aten.slice.Tensor":
        return None
    before = torch_ir.tensor_type(view.operands[0])
    if before is None:
        return None
    axis, start, end, step = (torch_ir.constant(operand) for operand in list(view.operands)[1:])
    if torch_ir.NOT_CONSTANT in (axis, start, end, step) or step != 1 or before.shape[axis] is None:
        return None
    first, last, _ = slice(start, end).indices(before.shape[axis])  # type: ignore[arg-type]
    return SliceBounds(axis % len(before.shape), first, last)


def _takes_whole_groups(view: ir.Operation, quantization: Quantization, returned: bool) -> bool:
    """Tell whether ``view`` is a slice of the last axis that cuts no group, and scales can follow."""
    bounds, before = slice_bounds(view), torch_ir.tensor_type(view.operands[0])
    if bounds is None or before is None or bounds.axis != len(before.shape) - 1:
        return False
    follows = quantization.layout == "row" or (quantization.layout != "ue8m0_packed" and not returned)
    group, hidden = quantization.group, before.shape[-1] or 0
    return follows and group is not None and not any(n % group for n in (bounds.start, bounds.end, hidden))


def replay(view: ir.Operation, value: ir.Value, result: torch_ir.TensorType) -> ir.Value:
    """The same view of ``value``, whose last axis may have another size than the original's.

    Built at the current insertion point, which must be where the view's sizes are known.
    """
    operands = [value, *list(view.operands)[1:]]
    original = torch_ir.tensor_type(view.result)
    assert original is not None
    bounds = slice_bounds(view)
    if bounds is not None and bounds.axis == len(original.shape) - 1 and original.shape != result.shape:
        # A scale stands for as many elements as there are fewer of them.
        last, fewer = original.shape[-1], result.shape[-1]
        assert last and fewer
        operands[2:4] = [torch_ir.make_int(n * fewer // last) for n in (bounds.start, bounds.end)]
    place = _sizes_operand(view)
    if place is not None and original.shape[-1] != result.shape[-1]:
        sizes = torch_ir.producer(operands[place])
        last = result.shape[-1]
        assert last is not None and sizes is not None and sizes.name == "torch.prim.ListConstruct"
        operands[place] = torch_ir.make_int_list([*list(sizes.operands)[:-1], torch_ir.make_int(last)])
    return torch_ir.make(view.name, result, operands)


def _sizes_operand(view: ir.Operation) -> int | None:
    """Which operand lists sizes of which the last is the last axis; None if there is no such operand."""
    if view.name in ("torch.aten.view", "torch.aten.expand"):
        return 1
    if view.name == "torch.aten.unflatten.int":
        before = torch_ir.tensor_type(view.operands[0])
        axis = torch_ir.constant(view.operands[1])
        return 2 if before is not None and axis in (-1, len(before.shape) - 1) else None
    return None


# -- row views: the axes of its operand that each one picks from, repeats or moves ---------------------


def _one_axis(view: ir.Operation, rank: int) -> set[int] | None:
    return _axes([torch_ir.constant(view.operands[1])], rank)


def _two_axes(view: ir.Operation, rank: int) -> set[int] | None:
    return _axes([torch_ir.constant(operand) for operand in list(view.operands)[1:3]], rank)


def _moved_axes(view: ir.Operation, rank: int) -> set[int] | None:
    order = torch_ir.constant(view.operands[1])
    if order is torch_ir.NOT_CONSTANT:
        return None
    return {place for place, axis in enumerate(order) if axis % rank != place}


def _repeated_axes(view: ir.Operation, rank: int) -> set[int] | None:
    """Axes an expand may repeat, as axes of its operand; new leading axes are nobody's."""
    before, after = torch_ir.tensor_type(view.operands[0]), torch_ir.tensor_type(view.result)
    if before is None or after is None:
        return None
    new = len(after.shape) - rank
    return {axis for axis, size in enumerate(before.shape) if size != after.shape[axis + new]}


def _axes(found: list[object], rank: int) -> set[int] | None:
    return {axis % rank for axis in found if isinstance(axis, int)} if _all_ints(found) else None


def _all_ints(found: list[object]) -> bool:
    return all(isinstance(axis, int) for axis in found)


_TOUCHED_AXES: dict[str, Callable[[ir.Operation, int], set[int] | None]] = {
    "torch.aten.slice.Tensor": _one_axis,
    "torch.aten.select.int": _one_axis,
    "torch.aten.transpose.int": _two_axes,
    "torch.aten.permute": _moved_axes,
    "torch.aten.expand": _repeated_axes,
}
