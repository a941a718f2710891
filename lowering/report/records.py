"""Make the plain data of a report of what the compiler has written down."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from patterns import torch_ir
from patterns.sites import Remark, SiteRecord

from ..signature import Constant, Signature, TensorSpec
from .sites import IN_PLACE, READ, Change, Kept, Site


def kept(signatures: Mapping[str, Signature], reasons: Mapping[str, Mapping[int, str]]) -> tuple[Kept, ...]:
    """What the program keeps, and what each function does with it."""
    specs = {spec.name: spec for signature in signatures.values() for spec in signature.state}
    functions: dict[str, dict[str, str]] = {name: {} for name in specs}
    for function, signature in signatures.items():
        first = sum(not isinstance(leaf, Constant) for leaf in signature.inputs or ())
        written = {item.argument for item in signature.written}
        for number, spec in enumerate(signature.state, first):
            how = reasons[function].get(number, IN_PLACE) if number in written else READ
            functions[spec.name][function] = how
    return tuple(
        Kept(name, spec.dtype, spec.sizes, _bytes(spec), functions[name]) for name, spec in specs.items()
    )


def unshared(state: Collection[Kept]) -> tuple[Remark, ...]:
    """A remark where several functions keep something, each for itself.

    Then a cache that one of them reads is not what another has written.
    """
    owners: dict[str, list[str]] = {}
    for each in state:
        for function in each.functions:
            owners.setdefault(function, []).append(each.name)
    if len(owners) < 2 or any(len(each.functions) > 1 for each in state):
        return ()
    said = "; ".join(f"{function} keeps {names[0]}" for function, names in owners.items())
    advice = "Where they are to share a cache, give them the same module"
    return (Remark("state", "unknown", f"no function reads what another writes: {said}. {advice}"),)


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.sizes) * torch_ir.element_bytes(spec.dtype)


def site_of(record: SiteRecord) -> Site:
    """What became of a site."""
    after = record.after or record.before
    return Site(
        record.op,
        record.location,
        "fused" if record.fused else "unfused",
        record.pattern,
        record.kernel,
        record.reason,
        record.contract,
        _change(record.before.bytes, after.bytes),
        Change(record.before.dispatches, after.dispatches),
        record.note,
    )


def _change(before: int | None, after: int | None) -> Change | None:
    return None if before is None or after is None else Change(before, after)
