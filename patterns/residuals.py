"""Make the call of a product's kernel, with the residual add behind the product where the kernel does it.

Rows are fused first, so the add before a norm is the norm's, which reads both anyway.  What is left are sums
that no norm takes: a shared expert's, or of attention and a feed-forward network side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol

from iree.compiler import ir

from . import canonical, torch_ir
from .operation import Support, Types


class ProductSpec(Protocol):
    """Specialise the kernel of a product, which may add a residual; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def residual(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


def replace_product(
    op: ir.Operation,
    name: str,
    spec: ProductSpec,
    operands: Sequence[ir.Value],
    support: Support,
    sites: Sequence[ir.Attribute] = (),
) -> None:
    """Replace the product ``op`` by a call of its kernel, and the add behind it if there is one for both.

    name: of the call.  operands: what the product alone reads.
    """
    last, operands = op, list(operands)
    add, with_residual = add_behind(op.results[0]), replace(spec, residual=True)
    if add is not None and support(with_residual) is None:
        last, spec = add, with_residual
        operands += [value for value in list(add.operands)[:2] if value != op.results[0]]
    result = torch_ir.tensor_type(last.results[0])
    assert result is not None
    with ir.InsertionPoint(last), op.location:
        attributes = {"spec": canonical.to_attribute(spec), canonical.SITES: ir.ArrayAttr.get(list(sites))}
        made = canonical.create(name, operands, [result], **attributes)
        torch_ir.set_example(made, [torch_ir.example_shape(last.results[0])])
    last.results[0].replace_all_uses_with(made.results[0])
    for replaced in dict.fromkeys((last, op)):
        replaced.erase()


def residual_types(spec: ProductSpec, results: Types) -> Types:
    """The type of the residual, the result's, in a list; none where there is no residual."""
    return results[:1] if spec.residual else []


def add_behind(product: ir.Value) -> ir.Operation | None:
    """The add of another tensor of the same type, if that alone reads ``product``."""
    uses = [use.owner.operation for use in product.uses]
    return uses[0] if len(uses) == 1 and torch_ir.is_plain_add(uses[0]) else None
