"""Declare patterns over the operations that compute a value.

A pattern is written as an expression and asked for its bindings:

    mean = Op("torch.aten.mean.dim", square, Const("dims"), Is(True), ANY)
    bindings = first_match(mean, value)          # {"dims": [-1], ...} or None

A name bound twice must be bound to the same value.  Patterns only look; they never rewrite.

What a recogniser might forget is part of the patterns themselves.  An ``Op`` that spreads a smaller operand
over its result takes a computed one only where it is one number, or one for each row; a ``Statistic`` is
taken over the last axis alone; ``Aside`` follows it only past views that put that axis back where it was;
``Exact`` sees through no cast but one that loses nothing; ``f32`` is an operation whose result is float32.
What is raised in the end is checked once more, in ``well_typed``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iree.compiler import ir

from . import torch_ir, views
from .torch_ir import TensorType

Bindings = dict[str, Any]


class Pattern:
    """Something a value may be; the classes below are the kinds.

    ``may_be_vector``: an operation may spread it over all rows.  Only what is given may be, such as a weight:
    a vector that is computed of a square tensor may as well hold one number for each of its rows.
    """

    @property
    def may_be_vector(self) -> bool:
        return False

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        """Yield every way ``value`` can be this pattern, each extending ``bound``."""
        raise NotImplementedError


def first_match(pattern: Pattern, value: ir.Value) -> Bindings | None:
    """The first way ``value`` is ``pattern``, or None."""
    return next(pattern.match(value, {}), None)


@dataclass(frozen=True)
class Var(Pattern):
    """Any value, remembered by name."""

    name: str
    may_be_vector = True  # pyright: ignore[reportAssignmentType]

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        if self.name not in bound:
            yield {**bound, self.name: value}
        elif bound[self.name] == value:
            yield bound


@dataclass(frozen=True)
class Exact(Pattern):
    """Any value, remembered by name as it was before it was widened from a 16-bit float to float32."""

    name: str
    may_be_vector = True  # pyright: ignore[reportAssignmentType]

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        yield from Var(self.name).match(torch_ir.widened_from(value), bound)


@dataclass(frozen=True)
class One(Pattern):
    """A float32 tensor of one element that is no constant, remembered by name."""

    name: str

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        type_ = torch_ir.tensor_type(value)
        if type_ is None or type_.dtype != "float32" or not set(type_.shape) <= {1}:
            return
        if torch_ir.constant(value) is torch_ir.NOT_CONSTANT:
            yield from Var(self.name).match(value, bound)


@dataclass(frozen=True)
class Named(Pattern):
    """Remember by name what ``pattern`` matches."""

    name: str
    pattern: Pattern

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        for found in self.pattern.match(value, bound):
            yield {**found, self.name: value}


class _Anything(Pattern):
    may_be_vector = True  # pyright: ignore[reportAssignmentType]

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        yield bound


ANY = _Anything()


@dataclass(frozen=True)
class Const(Pattern):
    """A constant of any kind, its Python value remembered by name."""

    name: str

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        found = torch_ir.constant(value)
        if found is not torch_ir.NOT_CONSTANT:
            yield {**bound, self.name: found}


@dataclass(frozen=True)
class Is(Pattern):
    """A constant equal to ``expected``."""

    expected: Any

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        if torch_ir.constant(value) == self.expected:
            yield bound


@dataclass(frozen=True)
class Near(Pattern):
    """A constant that is ``expected`` to about the precision of float32."""

    expected: float

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        found = torch_ir.constant(value)
        if isinstance(found, (int, float)) and math.isclose(found, self.expected, rel_tol=2.0**-20):
            yield bound


# Elementwise operations of several tensors, the smaller of which they spread over the shape of the result.
_SPREADING = frozenset(
    f"torch.aten.{name}"
    for name in (
        *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "div.Tensor_mode", "pow.Tensor_Tensor"),
        *("maximum", "minimum", "clamp.Tensor", "where.self", "bitwise_and.Tensor", "remainder.Tensor"),
    )
)


class Op(Pattern):
    """The first result of the operation ``name`` whose operands match ``operands`` in order.

    An operand that the operation spreads over its result must be one number, one for each row, or a vector
    that is given.  ``commutative`` also tries the first two operands swapped; ``capture`` remembers the
    result, whose dtype must be ``dtype`` where that is given.
    """

    def __init__(
        self,
        name: str,
        *operands: Pattern,
        commutative: bool = False,
        capture: str | None = None,
        dtype: str | None = None,
    ):
        self.name = name
        self.operands = operands
        self.commutative = commutative
        self.capture = capture
        self.dtype = dtype

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        op = torch_ir.producer(value)
        if op is None or torch_ir.op_name(op) != self.name or len(op.operands) != len(self.operands):
            return
        if value != op.results[0] or (self.dtype and torch_ir.dtype_of(value) != self.dtype):
            return
        operands = list(op.operands)
        orders = [operands]
        if self.commutative:
            orders.append([operands[1], operands[0], *operands[2:]])
        for order in filter(lambda order: self._spreads(order, value), orders):
            for found in _match_all(self.operands, order, bound):
                yield {**found, self.capture: value} if self.capture else found

    def _spreads(self, operands: list[ir.Value], value: ir.Value) -> bool:
        result = torch_ir.tensor_type(value)
        if self.name not in _SPREADING:
            return True
        pairs = zip(self.operands, operands, strict=True)
        return result is not None and all(_is_spread(pattern, operand, result) for pattern, operand in pairs)


def _is_spread(pattern: Pattern, operand: ir.Value, result: TensorType) -> bool:
    """Tell whether an operation may spread ``operand``, which is to be a ``pattern``, over ``result``."""
    type_ = torch_ir.tensor_type(operand)
    if type_ is None:
        return "tensor" not in str(operand.type)  # a number
    same = type_.shape == result.shape
    one_a_row = type_.shape == (*result.shape[:-1], 1)
    if same or one_a_row or (set(type_.shape) <= {1} and len(type_.shape) <= len(result.shape)):
        return True
    *lead, last = type_.shape
    return pattern.may_be_vector and set(lead) <= {1} and last is not None and last == result.shape[-1]


def f32(name: str, *operands: Pattern, commutative: bool = False, capture: str | None = None) -> Op:
    """The operation ``torch.aten.name`` where its result is float32: arithmetic as a kernel does it."""
    full = f"torch.aten.{name}"
    return Op(full, *operands, commutative=commutative, capture=capture, dtype="float32")


# Which operand of a reduction says over what it is taken.
_REDUCTIONS = {
    "torch.aten.mean.dim": 1,
    "torch.aten.sum.dim_IntList": 1,
    "torch.aten.amax": 1,
    "torch.aten.amin": 1,
    "torch.aten.max.dim": 1,
    "torch.aten.linalg_vector_norm": 2,
    "torch.aten.var.correction": 1,
}


class Statistic(Pattern):
    """The reduction ``name`` of ``of`` over its last axis alone, which it keeps or drops.

    ``others`` are what its operands before the axes must be, ``then`` those behind.  What it computes is of
    the tensor's dtype, or float32 of 16 bits.
    """

    def __init__(self, name: str, of: Pattern, *others: Pattern, then: tuple[Pattern, ...] = ()):
        self.name, self.operands, self.then = f"torch.aten.{name}", (of, *others), then
        assert _REDUCTIONS[self.name] == len(self.operands)

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        op = torch_ir.producer(value)
        if op is None or op.name != self.name or value != op.results[0]:
            return
        source, result = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(value)
        if source is None or result is None or result.dtype not in _EXACTLY.get(source.dtype, ()):
            return
        before, behind = len(self.operands), len(self.operands) + 1
        if reduced_axes(op) == [len(source.shape) - 1]:
            operands = [*list(op.operands)[:before], *list(op.operands)[behind : behind + len(self.then)]]
            yield from _match_all((*self.operands, *self.then), operands, bound)


# What a reduction may compute in without rounding what it is taken of.
_EXACTLY = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "float32"),
}


def reduced_axes(reduction: ir.Operation) -> list[int] | None:
    """The axes a reduction is taken over, counted from the front; None where they are not known."""
    source, place = torch_ir.tensor_type(reduction.operands[0]), _REDUCTIONS.get(reduction.name)
    if source is None:
        return None
    if not source.shape:
        return []
    given = None if place is None else torch_ir.constant(reduction.operands[place])
    if given is torch_ir.NOT_CONSTANT:
        return None
    axes = given if isinstance(given, list) else [] if given is None else [given]
    return sorted(axis % len(source.shape) for axis in axes) or list(range(len(source.shape)))


class Aside(Pattern):
    """``inner``, seen through views that add or drop a last axis of one, and casts that lose nothing."""

    def __init__(self, inner: Pattern):
        self.inner = inner

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        while (source := past_unit_axis(value)) is not None:
            value = source
        yield from self.inner.match(value, bound)


class Regrouped(Pattern):
    """``inner``, seen through views that only regroup it: whoever uses it says what they may."""

    def __init__(self, inner: Pattern):
        self.inner = inner

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        while (view := torch_ir.producer(value)) is not None and views.is_flat_view(view):
            value = view.operands[0]
        yield from self.inner.match(value, bound)


def past_unit_axis(value: ir.Value) -> ir.Value | None:
    """Look past a widening, or past a last axis of one element that is added or dropped; None otherwise."""
    op = torch_ir.producer(value)
    if op is None:
        return None
    if torch_ir.widened_from(value) != value:
        return torch_ir.widened_from(value)
    if not views.is_flat_view(op):
        return None
    before, after = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(value)
    if before is None or after is None:
        return None
    shorter, longer = sorted((before.shape, after.shape), key=len)
    if longer != (*shorter, 1):
        return None
    # Of two unknown sizes a view may make one of the other: only what names its axis says which it is.
    axis = _named_axis(op, len(longer))
    settled = shorter.count(None) <= 1 if axis is None else axis == len(shorter)
    return op.operands[0] if settled else None


def _named_axis(view: ir.Operation, rank: int) -> int | None:
    """The axis of one, of ``rank`` with it, that ``view`` adds or drops; None for a view that names none."""
    if view.name not in ("torch.aten.unsqueeze", "torch.aten.squeeze.dim"):
        return None
    axis = torch_ir.constant(view.operands[1])
    return axis % rank if isinstance(axis, int) else None


class OneOf(Pattern):
    """The first alternatives that match, in the order given."""

    def __init__(self, *alternatives: Pattern):
        self.alternatives = alternatives

    @property
    def may_be_vector(self) -> bool:
        return all(alternative.may_be_vector for alternative in self.alternatives)

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        for alternative in self.alternatives:
            yield from alternative.match(value, bound)


def times_one(a: Pattern) -> OneOf:
    """Match 1.0 / x as PyTorch traces it: the reciprocal ``a``, times one or not."""
    return OneOf(f32("mul.Scalar", a, Is(1)), f32("mul.Tensor", a, Is(1)), a)


def _match_all(patterns: tuple[Pattern, ...], values: list[ir.Value], bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in patterns[0].match(values[0], bound):
        yield from _match_all(patterns[1:], values[1:], found)
