"""Compose two views in a row, so that steps which cancel block nothing."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from . import torch_ir, views
from .torch_ir import TensorType

_PERMUTE = "torch.aten.permute"
_SLICE = "torch.aten.slice.Tensor"


def composed(view: ir.Operation) -> ir.Value | None:
    """A value equal to ``view`` that is fewer views away from where its chain starts; None if there is none.

    Built where ``view`` stands.  Flat views in a row are one flat view, permutations one permutation,
    slices of an axis one slice; a view that changes nothing is its operand.
    """
    if _changes_nothing(view):
        return view.operands[0]
    above = torch_ir.producer(view.operands[0])
    if above is None or not views.is_view(above):
        return None
    if views.is_flat_view(above) and views.is_flat_view(view):
        return _flat(view, above.operands[0])
    if view.name == above.name == _SLICE:
        return _sliced(view, above)
    first, second = _order(above), _order(view)
    if first is None or second is None:
        return None
    return _permuted(view, above.operands[0], [first[axis] for axis in second])


def _changes_nothing(view: ir.Operation) -> bool:
    before, after = torch_ir.tensor_type(view.operands[0]), torch_ir.tensor_type(view.result)
    order = _order(view)
    if order is not None:
        return order == list(range(len(order)))
    if view.name == _SLICE and before is not None and before == after:
        bounds = views.slice_bounds(view)
        # As many elements as there are, from the first on, are all of them.
        return bounds is not None and bounds.start == 0
    return views.is_flat_view(view) and before is not None and before == after and _settled(before)


def _settled(type_: TensorType) -> bool:
    """Tell whether the other sizes settle the one that may be unknown."""
    return type_.shape.count(None) <= 1


def _flat(view: ir.Operation, source: ir.Value) -> ir.Value | None:
    """One flat view of ``source`` to the shape of ``view``; None where a size is known at run time only.

    With such sizes one step may be ambiguous for what lowers it where two are not.
    """
    before, after = torch_ir.tensor_type(source), torch_ir.tensor_type(view.result)
    if before is None or after is None:
        return None
    if before == after and _settled(after):
        return source
    sizes = [size for size in after.shape if size is not None]
    if None in before.shape or len(sizes) < len(after.shape):
        return None
    with ir.InsertionPoint(view), view.location:
        shape = torch_ir.make_int_list([torch_ir.make_int(size) for size in sizes])
    return _make("torch.aten.view", view, source, shape)


def _order(view: ir.Operation) -> list[int] | None:
    """The axis of its operand that each axis of a permutation is; None for any other view."""
    before = torch_ir.tensor_type(view.operands[0])
    if before is None or view.name not in (_PERMUTE, "torch.aten.transpose.int"):
        return None
    rank = len(before.shape)
    given = [torch_ir.constant(operand) for operand in list(view.operands)[1:]]
    if torch_ir.NOT_CONSTANT in given:
        return None
    if view.name == _PERMUTE:
        return [axis % rank for axis in given[0]]
    order = list(range(rank))
    a, b = (axis % rank for axis in given)
    order[a], order[b] = b, a
    return order


def _permuted(view: ir.Operation, source: ir.Value, order: Sequence[int]) -> ir.Value:
    if list(order) == list(range(len(order))):
        return source
    with ir.InsertionPoint(view), view.location:
        axes = torch_ir.make_int_list([torch_ir.make_int(axis) for axis in order])
    return _make(_PERMUTE, view, source, axes)


def _sliced(view: ir.Operation, above: ir.Operation) -> ir.Value | None:
    """One slice for two of the same axis, where their bounds are known."""
    first, second = views.slice_bounds(above), views.slice_bounds(view)
    if first is None or second is None or first.axis != second.axis:
        return None
    start, end = first.start + second.start, first.start + second.end
    with ir.InsertionPoint(view), view.location:
        arguments = [torch_ir.make_int(value) for value in (first.axis, start, end, 1)]
    return _make(_SLICE, view, above.operands[0], *arguments)


def _make(name: str, view: ir.Operation, source: ir.Value, *arguments: ir.Value) -> ir.Value:
    type_ = torch_ir.tensor_type(view.result)
    assert type_ is not None
    with ir.InsertionPoint(view), view.location:
        value = torch_ir.make(name, type_, [source, *arguments])
    torch_ir.set_example(value.owner.operation, [torch_ir.example_shape(view.result)])
    return value
