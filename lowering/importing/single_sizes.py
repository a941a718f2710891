"""Sizes that a model computes and that are one number, such as the ``1 - Max(0, 1 - s0)`` of a slice of 1.

torch assumes that an open size is 2 or more, so it knows the number, and stretches an axis of size 1 to the
size of another tensor.  What imports its graph reads an open axis as one of whatever size is wanted.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


def write_out(exported: ExportedProgram) -> tuple[str, ...]:
    """Write such sizes as numbers in the shapes of all values, in place; the conditions that they are."""
    found: dict[str, None] = {}
    for node in exported.graph.nodes:
        leaves, tree = pytree.tree_flatten(node.meta.get("val"))
        written = [_written_out(leaf, found) for leaf in leaves]
        if any(new is not old for new, old in zip(written, leaves, strict=True)):
            node.meta["val"] = pytree.tree_unflatten(written, tree)
            node.meta.pop("tensor_meta", None)  # which says the same as before
    return tuple(found)


def _written_out(value: Any, found: dict[str, None]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    numbers = [_number(size) for size in value.shape]
    if all(number is None for number in numbers):
        return value
    sizes: list[Any] = list(value.shape)
    for axis, number in enumerate(numbers):
        if number is not None:
            found[f"{sizes[axis].node.expr} == {number}"] = None
            sizes[axis] = number
    with value.fake_mode:  # pyright: ignore[reportAttributeAccessIssue]
        return torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device=value.device)


def _number(size: Any) -> int | None:
    """The one number that an open size can be, and None where it can be several."""
    if not isinstance(size, torch.SymInt) or size.node.expr.is_Symbol:
        return None
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(bounds.lower) if bounds.is_singleton() and isinstance(bounds.lower, sympy.Integer) else None
