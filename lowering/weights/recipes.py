"""Say what a frozen value is made of: torch operations on parameters, evaluated when the value is stored.

A ``Recipe`` is an expression that knows its type, its bytes and the memory it takes to evaluate, without
holding the value.  It is evaluated by PyTorch itself, one operation after the other, so that the value is
the very one the source graph computes.  Nothing here knows about IR or files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import CompileError

WORKING = 64 << 20
"""Bytes that making a value may always take; beyond, twice the largest tensor it is made from, or it."""

_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor the program carries: a parameter, by name, or a constant of the graph (name None)."""

    name: str | None
    tensor: Tensor

    @cached_property
    def metas(self) -> tuple[Tensor, ...]:
        return (_meta(self.tensor),)


@dataclass(frozen=True, eq=False)
class Call:
    """One operation.  ``args``: constants, recipes and lists of them, in the order of the schema.

    ``metas`` are its results as meta tensors: shape, dtype, strides, and whose memory they are views of.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    location: str
    metas: tuple[Tensor, ...]
    serial: int = field(default_factory=lambda: next(_serial))

    @property
    def operands(self) -> list[Recipe]:
        return [leaf for leaf in _leaves(self.args) if isinstance(leaf, Recipe)]

    @property
    def fresh(self) -> int:
        """Bytes of memory of its own that it fills; 0 for a view."""
        given = _storages(operand.meta for operand in self.operands)
        return sum(n for storage, n in _storages(self.metas).items() if storage not in given)

    @property
    def traffic(self) -> int:
        """Bytes it reads and writes as a kernel of its own."""
        return self.fresh and self.fresh + sum(operand.nbytes for operand in self.operands)


@dataclass(frozen=True)
class Recipe:
    """One tensor: result ``number`` of ``origin``.  Equal recipes of one program are equal objects."""

    origin: Source | Call
    number: int = 0

    @property
    def meta(self) -> Tensor:
        return self.origin.metas[self.number]

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @property
    def shape(self) -> torch.Size:
        return self.meta.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the value, contiguous."""
        return self.meta.numel() * self.meta.element_size()

    def calls(self) -> list[Call]:
        """The operations that make the value, in the order they are evaluated."""
        found: set[Call] = set()
        pending: list[Source | Call] = [self.origin]
        while pending:
            origin = pending.pop()
            if isinstance(origin, Call) and origin not in found:
                found.add(origin)
                pending += [operand.origin for operand in origin.operands]
        # An operation is traced after its operands: the serial numbers are an order of evaluation.
        return sorted(found, key=lambda call: call.serial)

    def sources(self) -> list[Source]:
        """The tensors it is made from, parameters and constants, in the order in which they are used."""
        used = [operand.origin for call in self.calls() for operand in call.operands]
        return list(dict.fromkeys(origin for origin in used if isinstance(origin, Source)))

    @property
    def memory(self) -> int:
        """The most bytes that evaluating takes at a time, beside the sources, the value included."""
        sources = self.sources()
        given = _storages(meta for source in sources for meta in source.metas)
        fetched = sum(source.tensor.nbytes for source in sources if not source.tensor.is_cpu)
        live: set[Call] = set()
        most = 0
        for call, last_used in self._schedule():
            live.add(call)
            held = _storages(meta for one in live for meta in one.metas)
            most = max(most, sum(n for storage, n in held.items() if storage not in given))
            live.difference_update(last_used)
        if self.meta.is_contiguous():
            return fetched + most
        viewed = sum(n for storage, n in _storages([self.meta]).items() if storage not in given)
        return fetched + max(most, viewed + self.nbytes)

    def evaluate(self) -> Tensor:
        """The value, contiguous, on the CPU.  Raises CompileError where an operation cannot be computed."""
        made: dict[Source | Call, Any] = {s: (s.tensor.detach().cpu(),) for s in self.sources()}
        with torch.no_grad():
            for call, last_used in self._schedule():
                made[call] = _run(call, made)
                for done in last_used:
                    del made[done]
            return made[self.origin][self.number].contiguous()

    def _schedule(self) -> Iterator[tuple[Call, list[Call]]]:
        """Each operation, and those whose results nobody reads after it."""
        calls = self.calls()
        uses = Counter(operand.origin for call in calls for operand in set(call.operands))
        uses[self.origin] += 1
        for call in calls:
            last_used = []
            for operand in set(call.operands):
                uses[operand.origin] -= 1
                if not uses[operand.origin] and isinstance(operand.origin, Call):
                    last_used.append(operand.origin)
            yield call, last_used


def traced(op: torch._ops.OpOverload, args: tuple[Any, ...], location: str) -> Call | None:
    """The call of ``op``, run on meta tensors; None where that is impossible or a result is no tensor."""
    try:
        with torch.no_grad():
            results = _invoke(op, _mapped(args, lambda recipe: recipe.meta))
    except Exception:  # whatever an operation raises that has no meta kernel or takes no such arguments
        return None
    results = (results,) if isinstance(results, Tensor) else results
    if not (isinstance(results, tuple) and all(isinstance(result, Tensor) for result in results)):
        return None
    # A generator such as arange makes a real tensor; only its type is wanted here.
    return Call(op, args, location, tuple(r if r.is_meta else _meta(r) for r in results))


def _run(call: Call, made: Mapping[Source | Call, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    try:
        results = _invoke(call.op, _mapped(call.args, lambda recipe: made[recipe.origin][recipe.number]))
    except Exception as error:  # the operation's own words say what is wrong
        raise CompileError(
            f"{call.op} at {call.location} depends on parameters alone, and cannot be computed: {error}"
        ) from error
    return (results,) if isinstance(results, Tensor) else results


def _invoke(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """``op`` of all its arguments in the order of its schema, keywords included."""
    given = list(zip(op._schema.arguments, args, strict=True))
    keywords = {argument.name: value for argument, value in given if argument.kwarg_only}
    return op(*(value for argument, value in given if not argument.kwarg_only), **keywords)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _storages(metas: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each memory that the tensors are views of."""
    return {meta.untyped_storage()._cdata: meta.untyped_storage().nbytes() for meta in metas}


def _mapped(args: Any, change: Any) -> Any:
    """``args`` with every recipe in it, also inside lists, replaced by ``change`` of it."""
    if isinstance(args, (tuple, list)):
        return type(args)(_mapped(item, change) for item in args)
    return change(args) if isinstance(args, Recipe) else args


def _leaves(args: Any) -> Iterator[Any]:
    if isinstance(args, (tuple, list)):
        for item in args:
            yield from _leaves(item)
    else:
        yield args
