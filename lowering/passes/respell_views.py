"""Respell flat views with a size unknown until run time, as a collapse of axes and an expansion.

torch-mlir matches the sizes it knows, and casts an unknown one to 1 where that leaves a question; what it
makes then reads outside the tensor.  Here axes are grouped by what is proved about their sizes, from
torch.export's own names of them; axes of which nothing is proved are one group, which is always right, since
a view keeps the number of elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from patterns import torch_ir

from . import tensors

_VIEWS = ("torch.aten.view", "torch.aten._unsafe_view", "torch.aten.reshape")


@dataclass(frozen=True)
class _Extent:
    """Hold what is proved about a size: a product of a number and of names; a name stands for one size."""

    number: int
    names: Counter[str]

    def __mul__(self, other: _Extent) -> _Extent:
        return _Extent(self.number * other.number, self.names + other.names)

    def divides(self, other: _Extent) -> bool:
        return self.number > 0 and other.number % self.number == 0 and self.names <= other.names


_ONE = _Extent(1, Counter())
Groups = list[tuple[list[int], list[int]]]


def _extents(value: ir.Value, owner: str) -> list[_Extent]:
    """The extents of a tensor; a size of which nothing is known is called after ``owner`` and its axis."""
    type_, example = torch_ir.tensor_type(value), torch_ir.example_shape(value)
    assert type_ is not None
    found = []
    for axis, size in enumerate(type_.shape):
        names = getattr(example[axis], "factors", ()) if example is not None else ()
        if size is not None:
            found.append(_Extent(size, Counter()))
        elif names:
            numbers = [int(name) for name in names if name.isdigit()]
            rest = Counter(name for name in names if not name.isdigit())
            found.append(_Extent(numbers[0] if numbers else 1, rest))
        else:
            found.append(_Extent(1, Counter([f"{owner}{axis}"])))
    return found


def _groups(before: Sequence[_Extent], after: Sequence[_Extent]) -> Groups:
    """Axes before and after, in groups of as many elements: the smallest that are proved.

    From the front as far as that goes, then from the back; what is left between is one group.
    """
    front, (a, b) = _matched(before, after)
    back, (c, d) = _matched(before[a:][::-1], after[b:][::-1])
    last, end = len(before) - 1, len(after) - 1
    behind = [([last - i for i in xs[::-1]], [end - i for i in ys[::-1]]) for xs, ys in reversed(back)]
    middle = (list(range(a, len(before) - c)), list(range(b, len(after) - d)))
    return _without_empty([*front, middle, *behind])


def _matched(before: Sequence[_Extent], after: Sequence[_Extent]) -> tuple[Groups, tuple[int, int]]:
    """The groups that begin both lists, and how many axes of each list are in one."""
    groups: Groups = []
    a = b = i = j = 0
    left = right = _ONE
    while i < len(before) or j < len(after):
        if (right.divides(left) and left != right and j < len(after)) or i == len(before):
            right, j = right * after[j], j + 1
        else:
            left, i = left * before[i], i + 1
            if left != right and i > a and j == b and j < len(after):
                right, j = right * after[j], j + 1
        if left == right and i > a and j > b:
            groups.append((list(range(a, i)), list(range(b, j))))
            a, b, left, right = i, j, _ONE, _ONE
    return groups, (a, b)


def _without_empty(groups: Groups) -> Groups:
    """Axes that stand opposite to none, all of size 1, join a neighbour."""
    found: Groups = []
    for xs, ys in groups:
        if found and (not xs or not ys or not all(found[-1])):
            found[-1] = (found[-1][0] + xs, found[-1][1] + ys)
        elif xs or ys:
            found.append((xs, ys))
    return found


def _view(op: ir.Operation) -> list[ir.Value] | None:
    source, wanted = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(op.result)
    if source is None or wanted is None or None not in (*source.shape, *wanted.shape):
        return None
    value = torch_ir.to_builtin(op.operands[0])
    groups = _groups(_extents(op.operands[0], "before"), _extents(op.result, "after"))
    value = _regrouped(value, groups, _target(op, value, wanted))
    return [torch_ir.from_builtin(tensors.cast(value, wanted.builtin()), wanted)]


def _target(op: ir.Operation, value: ir.Value, wanted: torch_ir.TensorType) -> list[tensors.Size]:
    """The sizes that a view asks for, a -1 worked out."""
    given = torch_ir.producer(op.operands[1])
    assert given is not None
    shape = [
        _size(item) if size is None else size for size, item in zip(wanted.shape, given.operands, strict=True)
    ]
    if -1 in shape:
        place = shape.index(-1)
        rest = tensors.product([*shape[:place], *shape[place + 1 :]])
        shape[place] = tensors.quotient(tensors.product(tensors.sizes(value)), rest)
    return shape


def _size(item: ir.Value) -> tensors.Size:
    number = torch_ir.constant(item)
    return number if isinstance(number, int) else tensors.from_torch_int(item)


def _regrouped(value: ir.Value, groups: Groups, shape: Sequence[tensors.Size]) -> ir.Value:
    rank = ir.RankedTensorType(value.type).rank
    if not rank or not shape:
        ones = tensors.typed([1] * rank, ir.RankedTensorType(value.type).element_type)
        flat = tensors.collapse(tensors.cast(value, ones), []) if rank else value
        return tensors.expand(flat, [], [1] * len(shape)) if shape else flat
    before, after = [xs for xs, _ in groups], [ys for _, ys in groups]
    if len(before) < rank:
        value = tensors.collapse(value, before)
    if len(after) < len(shape):
        value = tensors.expand(value, after, shape)
    return value


RULES = dict.fromkeys(_VIEWS, _view)
