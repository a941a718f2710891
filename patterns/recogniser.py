"""Define a recogniser: something that looks at one operation and may say what it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from iree.compiler import ir

from .contracts import Contract
from .torch_ir import TensorType


@dataclass(frozen=True)
class WithoutLastAxis:
    """An old value that a result replaces once its last axis, of one element, is dropped."""

    value: ir.Value


@dataclass(frozen=True)
class Raised:
    """A recognised spelling: the canonical op to create and the values it replaces.

    ``operands`` are values, or other Raised whose first result is the operand (an op that stands
    for a norm and its quantization).  ``results`` are in the order of the canonical op's results:
    the old value that a result replaces (as it is or WithoutLastAxis), only its type where nothing is
    replaced, or None where the canonical op is to be made without that result.  ``place``: the operation
    whose line a report gives, where that is not the last.
    """

    op: str
    contract: Contract | None
    operands: Sequence[ir.Value | Raised]
    results: Sequence[ir.Value | WithoutLastAxis | TensorType | None]
    place: ir.Operation | None = None


class Recogniser(Protocol):
    """Recognise what an operation ends.  ``roots``: the operations it may be, so that others cost nothing."""

    @property
    def roots(self) -> tuple[str, ...]: ...

    def recognise(self, op: ir.Operation) -> Raised | None: ...


@dataclass(frozen=True)
class NearMiss:
    """Describe what looks like a site and is none: the canonical name, and what would have to change.

    Where ``is_site`` is false it is remarked only: no site, but a reader must know of it.
    """

    op: str
    reason: str
    is_site: bool = True


class Suspicion(Protocol):
    """Looks at what no recogniser took.

    ``roots``: names of the telltale operations, of which a spelling holds exactly one.
    """

    @property
    def roots(self) -> tuple[str, ...]: ...

    def why_not(self, op: ir.Operation) -> NearMiss | None: ...
