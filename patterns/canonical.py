"""Define the canonical operations every spelling is raised to, and those a kernel computes.

They are ``torch.operator`` ops whose names start with ``vmfuse.`` and whose attributes hold one of
the frozen values of ``patterns.contracts``:

``vmfuse.norm``                  x, [gate], [residual], [weight], [bias] -> y, [sum]  contract: Norm
``vmfuse.gated_activation``      gate_up (packed) or gate, up -> y          contract: GatedActivation
``vmfuse.group_quant``           x, [scale] -> q, [scale]                  contract: Quantization
``vmfuse.block_scaled_matmul``   a, b, a_scale, b_scale, [bias] -> out      contract: BlockScaledMatmul
``vmfuse.grouped_topk``          gating, [bias] -> weights, ids             contract: GroupedTopk
``vmfuse.packed_matmul``         a, codes, scale, [zero], [bias] -> out     contract: PackedMatmul

``vmfuse.physical_scale``        scale, layout -> the buffer that holds it, of a quantization without kernel

and those that a kernel computes, made of them by the fusion:

``vmfuse.row``                   x, [up], [residual], [weight], [bias], scale* -> [sum], [y], (q, [scale])*
                                                                           spec: RowSpec
``vmfuse.topk``                  gating, [bias] -> weights, ids                             spec: TopkSpec
``vmfuse.matmul``                a, b, a_scale, b_scale, [bias], [residual] -> out          spec: MatmulSpec
``vmfuse.linear``                a, b, [bias], [residual] -> out                            spec: LinearSpec
``vmfuse.packed``                a, codes, scale, [zero], [bias], [residual] -> out         spec: PackedSpec
``vmfuse.selection``             x -> values, places                                     spec: SelectionSpec
``vmfuse.attention``             q, k, v, [mask] -> parts; parts -> out                  spec: AttentionSpec
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

from iree.compiler import ir

from . import torch_ir
from .contracts import (
    BlockScaledMatmul,
    GatedActivation,
    GroupedTopk,
    Norm,
    Quantization,
    ScaleLayout,
)
from .sites import Cost
from .torch_ir import TensorType

NORM = "vmfuse.norm"
GATED_ACTIVATION = "vmfuse.gated_activation"
GROUP_QUANT = "vmfuse.group_quant"
BLOCK_SCALED_MATMUL = "vmfuse.block_scaled_matmul"
# What makes the value a row kernel quantizes.
PRODUCERS = (NORM, GATED_ACTIVATION)
GROUPED_TOPK = "vmfuse.grouped_topk"
ROW = "vmfuse.row"
TOPK = "vmfuse.topk"
MATMUL = "vmfuse.matmul"
LINEAR = "vmfuse.linear"
PACKED_MATMUL = "vmfuse.packed_matmul"
PACKED = "vmfuse.packed"
SELECTION = "vmfuse.selection"
ATTENTION = "vmfuse.attention"
PHYSICAL_SCALE = "vmfuse.physical_scale"

# A site's number in the ledger, and the numbers of the sites a fused operation stands for.
SITE = "site"
SITES = "sites"
# On a group_quant: why it could not be moved above the views between it and its norm.
BLOCKED = "blocked"

T = TypeVar("T")


def quantized_types(y: TensorType, quantization: Quantization) -> tuple[TensorType, ...]:
    """The types of q, and of the scale unless it is given, when ``quantization`` is done to a ``y``."""
    hidden = y.shape[-1]
    assert hidden is not None
    if quantization.static:
        return (y.with_last(hidden, quantization.dtype),)
    groups = quantization.groups(hidden)
    packed = quantization.layout == "ue8m0_packed"
    scale = y.with_last(-(-groups // 4), "int32") if packed else y.with_last(groups, "float32")
    return y.with_last(hidden, quantization.dtype), scale


def create(
    name: str, operands: Sequence[ir.Value], results: Sequence[TensorType], **attributes: ir.Attribute
) -> ir.Operation:
    """A canonical operation at the current insertion point."""
    return ir.Operation.create(
        "torch.operator",
        results=[result.torch() for result in results],
        operands=list(operands),
        attributes={"name": ir.StringAttr.get(name), **attributes},
        regions=0,
    )


def to_attribute(value: Any) -> ir.Attribute:
    """A frozen contract value as an MLIR attribute: a dictionary of the fields that are not at their default.

    A field that is None and has no default is left out as well.
    """
    if is_dataclass(value):
        items = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return ir.DictAttr.get({k: to_attribute(v) for k, v in items.items() if v is not None})
    if isinstance(value, tuple):
        return ir.ArrayAttr.get([to_attribute(item) for item in value])
    if isinstance(value, bool):
        return ir.BoolAttr.get(value)
    if isinstance(value, int):
        return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)
    if isinstance(value, float):
        return ir.FloatAttr.get_f64(value)
    return ir.StringAttr.get(str(value))


def from_attribute(kind: type[T], attribute: ir.Attribute) -> T:
    """The contract value of type ``kind`` that ``to_attribute`` wrote."""
    dictionary = ir.DictAttr(attribute)
    present = {item.name: item.attr for item in dictionary}
    hints = _hints(kind)
    required = {f.name: None for f in fields(kind) if f.default is MISSING}  # type: ignore[arg-type]
    return kind(**{**required, **{name: _decode(hints[name], attr) for name, attr in present.items()}})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(hint: Any, attribute: ir.Attribute) -> Any:
    if isinstance(attribute, ir.DictAttr):
        return from_attribute(_without_none(hint), attribute)
    if isinstance(attribute, ir.ArrayAttr):
        item = typing.get_args(hint)[0]
        return tuple(_decode(item, entry) for entry in ir.ArrayAttr(attribute))
    return getattr(attribute, "value", attribute)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def physical_scale(scale: ir.Value, result: TensorType, layout: ScaleLayout) -> ir.Value:
    """The logical ``scale`` as it lies in memory in ``layout``, at the current insertion point."""
    return create(PHYSICAL_SCALE, [scale, torch_ir.make_str(layout)], [result]).result


def norm_contract(op: ir.Operation) -> Norm:
    """Read what a ``vmfuse.norm`` computes."""
    return from_attribute(Norm, op.attributes["contract"])


def gate_contract(op: ir.Operation) -> GatedActivation:
    """Read what a ``vmfuse.gated_activation`` computes."""
    return from_attribute(GatedActivation, op.attributes["contract"])


def quantization(op: ir.Operation) -> Quantization:
    """Read what a ``vmfuse.group_quant`` computes."""
    return from_attribute(Quantization, op.attributes["contract"])


def given_scale(quant: ir.Operation) -> ir.Value | None:
    """Find the scale that a ``vmfuse.group_quant`` is given; None where it computes its own."""
    return quant.operands[1] if quantization(quant).static else None


def routing_contract(op: ir.Operation) -> GroupedTopk:
    """Read what a ``vmfuse.grouped_topk`` computes."""
    return from_attribute(GroupedTopk, op.attributes["contract"])


def product_contract(op: ir.Operation) -> BlockScaledMatmul:
    """Read what a ``vmfuse.block_scaled_matmul`` computes."""
    return from_attribute(BlockScaledMatmul, op.attributes["contract"])


def cost(op: ir.Operation) -> Cost:
    """Count what ``op`` costs as a kernel of its own: every operand read once, every result written once."""
    sizes = [torch_ir.example_bytes(value) for value in (*op.operands, *op.results)]
    known = [size for size in sizes if size is not None]
    return Cost(sum(known) if len(known) == len(sizes) else None, dispatches=1)


def site_of(op: ir.Operation) -> int:
    """The ledger's number of the site that ``op`` is."""
    return ir.IntegerAttr(op.attributes[SITE]).value


def sites_of(op: ir.Operation) -> list[int]:
    """The ledger's numbers of all that an operation of a kernel stands for."""
    return [ir.IntegerAttr(item).value for item in ir.ArrayAttr(op.attributes[SITES])]
