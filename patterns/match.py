"""Declared patterns over the operations that compute a value.

A pattern is written as an expression and asked for its bindings:

    mean = Op("torch.aten.mean.dim", square, Const("dims"), Is(True), ANY)
    bindings = first_match(mean, value)          # {"dims": [-1], ...} or None

A name bound twice must be bound to the same value.  Patterns only look; they never rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iree.compiler import ir

from . import torch_ir

Bindings = dict[str, Any]


class Pattern:
    """Something a value may be; the classes below are the kinds."""

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

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        if self.name not in bound:
            yield {**bound, self.name: value}
        elif bound[self.name] == value:
            yield bound


@dataclass(frozen=True)
class Exact(Pattern):
    """Any value, remembered by name as it was before it was widened from a 16-bit float."""

    name: str

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        yield from Var(self.name).match(torch_ir.uncast(value), bound)


@dataclass(frozen=True)
class Named(Pattern):
    """What ``pattern`` matches, remembered by name."""

    name: str
    pattern: Pattern

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        for found in self.pattern.match(value, bound):
            yield {**found, self.name: value}


class _Anything(Pattern):
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


class Op(Pattern):
    """The first result of the operation ``name`` whose operands match ``operands`` in order.

    ``commutative`` also tries the first two operands swapped; ``capture`` remembers the result, whose
    dtype must be ``dtype`` where that is given.
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
        for order in orders:
            for found in _match_all(self.operands, order, bound):
                yield {**found, self.capture: value} if self.capture else found


class OneOf(Pattern):
    """The first alternatives that match, in the order given."""

    def __init__(self, *alternatives: Pattern):
        self.alternatives = alternatives

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        for alternative in self.alternatives:
            yield from alternative.match(value, bound)


def _match_all(patterns: tuple[Pattern, ...], values: list[ir.Value], bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in patterns[0].match(values[0], bound):
        yield from _match_all(patterns[1:], values[1:], found)
