"""Inputs whose rows are part of wider ones, as after a split: a kernel reads them where they are.

A slice of the last axis is a copy for whatever needs dense rows.  A row kernel needs none: it is given the
wider tensor and the window.  Views between the slice and the kernel may regroup the other axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from . import torch_ir, views
from .contracts import Window


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
    while view is not None and (_is_slice_of_rows(view) or _regroups_rows(view)):
        source = view.operands[0]
        if _is_slice_of_rows(view):
            found, regrouped = Wider(source, _within(view, found.window)), list(passed)
        else:
            passed.append(view)
        view = torch_ir.producer(source)
    return Wider(_regrouped(found.tensor, regrouped), found.window)


def _is_slice_of_rows(view: ir.Operation) -> bool:
    bounds = views.slice_bounds(view)
    before = torch_ir.tensor_type(view.operands[0]) if bounds is not None else None
    return bounds is not None and before is not None and bounds.axis == len(before.shape) - 1


def _within(view: ir.Operation, window: Window | None) -> Window:
    """The window in the operand of the slice ``view`` that ``window`` is in its result."""
    bounds, before = views.slice_bounds(view), torch_ir.tensor_type(view.operands[0])
    assert bounds is not None and before is not None and before.shape[-1] is not None
    return Window(before.shape[-1], bounds.start + (window.offset if window else 0))


def _regroups_rows(view: ir.Operation) -> bool:
    """Whether ``view`` leaves every row as it is; of one element it is not told which axis is which."""
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
