"""Read inputs whose rows are part of wider ones, as after a split, where they are.

A part of each row is a copy for whatever needs dense rows.  A row kernel needs none: it is given the wider
tensor and the window.  A part is a slice of the last axis, or one of several rows that lie behind each other
(one of the last axis but one); views between it and the kernel may regroup the other axes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from iree.compiler import ir

from . import torch_ir, view_chains, views
from .contracts import Window
from .torch_ir import TensorType

_SELECT = "torch.aten.select.int"
_LONGEST = 1 << 28  # elements from row to row: kernels count their bytes in 32 bits


@dataclass(frozen=True)
class Wider:
    """A tensor, and where in its rows those of another are; None where they are all of it."""

    tensor: ir.Value
    window: Window | None = None


def wider(value: ir.Value) -> Wider:
    """The widest tensor that ``value`` is a window of, with the same leading axes; made if need be."""
    passed: list[ir.Operation] = []
    found, regrouped = Wider(value), list[ir.Operation]()
    view = torch_ir.producer(value)
    while view is not None:
        part = _sliced(view) or _one_of_several(view)
        if part is not None:
            assert part.window is not None
            inner = found.window.offset if found.window else 0
            found = Wider(part.tensor, Window(part.window.pitch, part.window.offset + inner))
            regrouped = list(passed)
        elif not _regroups_rows(view):
            break
        else:
            passed.append(view)
        view = torch_ir.producer(view.operands[0] if part is None else part.tensor)
    return Wider(_regrouped(found.tensor, regrouped), found.window)


def _sliced(view: ir.Operation) -> Wider | None:
    """Find the wider tensor that ``view`` is a slice of, along the last axis."""
    bounds = views.slice_bounds(view)
    before = torch_ir.tensor_type(view.operands[0]) if bounds is not None else None
    if bounds is None or before is None or bounds.axis != len(before.shape) - 1:
        return None
    pitch = before.shape[-1]
    return Wider(view.operands[0], Window(pitch, bounds.start)) if pitch and pitch <= _LONGEST else None


def _one_of_several(view: ir.Operation) -> Wider | None:
    """Find the tensor of which ``view`` takes one index of the last axis but one.

    Its last two axes are joined, so that what ``view`` takes is a window of each longer row.
    """
    bounds = views.slice_bounds(view)
    if bounds is None and view.name != _SELECT:
        return None
    before = torch_ir.tensor_type(view.operands[0])
    if before is None or len(before.shape) < 3 or set(before.shape[:-2]) == {1}:
        return None  # what is taken of a single one is dense
    count, width = before.shape[-2:]
    axis = len(before.shape) - 2
    taken = bounds or _selected(view, before)
    if taken is None or count is None or width is None or (taken.axis, taken.end) != (axis, taken.start + 1):
        return None
    if count * width > _LONGEST:
        return None
    with ir.InsertionPoint(view), view.location:
        joined = _joined(view.operands[0], before)
        if view.name != _SELECT:
            joined = _made("torch.aten.unsqueeze", joined, (*before.shape[:-2], 1, count * width), axis)
    return Wider(joined, Window(count * width, taken.start * width))


def _selected(view: ir.Operation, before: TensorType) -> views.SliceBounds | None:
    axis, index = (torch_ir.constant(operand) for operand in list(view.operands)[1:3])
    if not isinstance(axis, int) or not isinstance(index, int) or (size := before.shape[axis]) is None:
        return None
    return views.SliceBounds(axis % len(before.shape), index % size, index % size + 1)


def _joined(value: ir.Value, before: TensorType) -> ir.Value:
    """``value`` with its last two axes as one."""
    axis, (count, width) = len(before.shape) - 2, before.shape[-2:]
    assert count is not None and width is not None
    flat = _made("torch.aten.flatten.using_ints", value, (*before.shape[:-2], count * width), axis, axis + 1)
    return view_chains.composed(flat.owner.operation) or flat


def _made(name: str, value: ir.Value, shape: tuple[int | None, ...], *axes: int) -> ir.Value:
    """A flat view of ``value`` with other last axes."""
    dtype, example = torch_ir.dtype_of(value), torch_ir.example_shape(value)
    assert dtype is not None
    made = torch_ir.make(name, TensorType(shape, dtype), [value, *map(torch_ir.make_int, axes)])
    if example is not None:
        # Sizes that are not known are those of leading axes, which stay.
        known = itertools.chain(example, itertools.repeat(None))
        sizes = [old if size is None else size for size, old in zip(shape, known, strict=False)]
        found = tuple(size for size in sizes if size is not None)
        torch_ir.set_example(made.owner.operation, [found if len(found) == len(shape) else None])
    return made


def _regroups_rows(view: ir.Operation) -> bool:
    """Tell whether ``view`` leaves every row as it is; of one element it is not told which axis is which."""
    after = torch_ir.tensor_type(view.results[0])
    return views.keeps_rows(view) and after is not None and after.shape[-1:] not in ((), (None,), (1,))


def _regrouped(wide: ir.Value, passed: list[ir.Operation]) -> ir.Value:
    """``wide`` with its leading axes as the views ``passed``, from the last on, leave those of its window."""
    for view in reversed(passed):
        before, after = torch_ir.tensor_type(wide), torch_ir.tensor_type(view.result)
        example = torch_ir.example_shape(view.result)
        assert before is not None and after is not None and before.shape[-1] is not None
        with ir.InsertionPoint(view), view.location:
            wide = views.replay(view, wide, after.with_last(before.shape[-1]))
        if example is not None:
            torch_ir.set_example(wide.owner.operation, [(*example[:-1], before.shape[-1])])
    return wide
