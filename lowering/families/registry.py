"""All families: those of this project, and those that installed packages bring.

A package brings one by an entry point in the group ``vmfuse.families`` that names a ``Family`` or a tuple of
them; docs/extending.md walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from iree.compiler import ir

from patterns import torch_ir
from patterns.contracts import Spec
from patterns.named_call import nearest
from patterns.operation import Operation

from ..errors import UsageError
from ..targets import Target
from . import attention, grouped_topk, linear, packed, row, selection
from .base import Family, Reference
from .instance import KernelInstance
from .matmul import family as matmul

GROUP = "vmfuse.families"

FAMILIES: tuple[Family, ...] = (
    grouped_topk.FAMILY,
    row.FAMILY,
    matmul.FAMILY,
    packed.FAMILY,
    linear.FAMILY,
    selection.FAMILY,
    attention.FAMILY,
)


@cache
def families() -> tuple[Family, ...]:
    """Every family, those that packages bring first, by the names of their entry points.

    They are asked before this project's, like recognisers that a user names: what somebody installs is meant
    for a narrower case.  Raises UsageError, naming the entry point, for one that brings none, and naming both
    families where two have an operation, or what operations carry, of one name.
    """
    found: list[Family] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        found += _brought(entry)
    found += FAMILIES
    _refuse_equal_names(found)
    return tuple(found)


def _refuse_equal_names(found: Sequence[Family]) -> None:
    """Raise UsageError where a name stands for two things: in the IR, or in a written report."""
    owners: dict[str, tuple[Family, object]] = {}
    for number, family in enumerate(found):
        for operation in family.patterns.operations:
            carried = number if operation.is_kernel else operation.carries  # a spec says whose kernel it is
            for name, meant in ((operation.name, number), (operation.carries.__name__, carried)):
                owner, other = owners.setdefault(name, (family, meant))
                if other != meant:
                    raise UsageError(f"the families {owner.name} and {family.name} both have a {name}")


def _brought(entry: EntryPoint) -> tuple[Family, ...]:
    try:
        value = entry.load()
    except Exception as error:  # another package's code
        raise UsageError(f"the entry point {entry.value} of {GROUP} cannot be loaded: {error}") from error
    brought = (value,) if isinstance(value, Family) else tuple(value) if isinstance(value, tuple) else ()
    if not brought or not all(isinstance(family, Family) for family in brought):
        raise UsageError(f"the entry point {entry.value} of {GROUP} is no lowering.families.base.Family")
    return brought


@cache
def _operations() -> dict[str, tuple[Family, Operation]]:
    return {
        operation.name: (family, operation)
        for family in families()
        for operation in family.patterns.operations
    }


def operation_of(op: ir.Operation) -> Operation | None:
    """The declaration of ``op``; None where it is no operation of a family."""
    return operation_named(torch_ir.op_name(op))


def operation_named(name: str) -> Operation | None:
    """The declaration of the operation of that name; None where no family has it."""
    found = _operations().get(name)
    return None if found is None else found[1]


def contract_kind(name: str) -> type | None:
    """The contract of that name; None where no operation of a family carries one."""
    carried = (operation.carries for family in families() for operation in family.patterns.operations)
    return next((kind for kind in carried if kind.__name__ == name), None)


def spec_of(op: ir.Operation) -> Spec | None:
    """Give what an operation that a kernel computes is specialised by; None for any other."""
    operation = operation_of(op)
    return operation.value(op) if operation is not None and operation.is_kernel else None


def reference_of(op: ir.Operation) -> Callable[[ir.Operation], Reference] | None:
    """Find what computes ``op`` in plain PyTorch; None for an operation of a kernel or of none."""
    name = torch_ir.op_name(op)
    found = _operations().get(name)
    return None if found is None else found[0].references.get(name)


def why_not_named(op: ir.Operation) -> str | None:
    """Say why the call ``op`` of another library's operation stands for none here; None for any other."""
    name = torch_ir.op_name(op)
    rows = [row for family in families() for row in family.patterns.named if name in row.roots]
    return f"{rows[0].name} cannot be compiled: {nearest(rows, op).why_not(op)}" if rows else None


def family_of(spec: Spec) -> Family:
    """The family whose kernels ``spec`` specialises."""
    return next(family for family in families() if family.spec is type(spec))


def instance(spec: Spec, target: Target) -> KernelInstance:
    """The kernel for ``spec`` on ``target``.  Raises CompileError where there is none, with the reason."""
    return family_of(spec).instance(spec, target)


def supported(target: Target) -> Callable[[Spec], str | None]:
    """Give what the fusion asks: why ``target`` has no kernel for a spec, or None."""
    return lambda spec: family_of(spec).why_unsupported(spec, target)
