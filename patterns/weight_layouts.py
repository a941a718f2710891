"""Carry the layout of a weight's bytes in the IR.

A value is in the layout that ``torch.ops.lowering.shuffle_weight`` gave it.  A parameter is in ``row``,
unless its load and its global say otherwise: that is written there for what folding shuffled and for what
the model says is shuffled already.  Nothing is ever inferred from sizes or names.
"""

from __future__ import annotations

from iree.compiler import ir

from . import torch_ir
from .contracts import WeightLayout, stored_rows

SHUFFLE = "torch.lowering.shuffle_weight"
UNSHUFFLE = "torch.lowering.unshuffle_weight"
# On a util.global.load, and on the global it reads.
ATTRIBUTE = "weight_layout"


def shuffle(weight: ir.Value, layout: WeightLayout) -> ir.Value:
    """``weight`` [N, K] shuffled to ``layout``, padding included, at the current insertion point."""
    return _moved(SHUFFLE, weight, layout)


def unshuffle(weight: ir.Value, layout: WeightLayout) -> ir.Value:
    """``weight``, whose bytes are in ``layout``, as it was before, at the current insertion point."""
    return _moved(UNSHUFFLE, weight, layout)


def _moved(name: str, weight: ir.Value, layout: WeightLayout) -> ir.Value:
    type_ = torch_ir.tensor_type(weight)
    assert type_ is not None and type_.shape[0] is not None
    rows = stored_rows(type_.shape[0], layout)
    return ir.Operation.create(
        "torch.operator",
        results=[torch_ir.TensorType((rows, type_.shape[1]), type_.dtype).torch()],
        operands=[weight, torch_ir.make_str(layout)],
        attributes={"name": ir.StringAttr.get(name)},
        regions=0,
    ).result


def carried(weight: ir.Value) -> str | None:
    """The layout of a value's bytes; None for an argument of the program, whose reader alone can tell."""
    op = torch_ir.producer(weight)
    if op is None:
        return None
    if torch_ir.op_name(op) == SHUFFLE:
        return torch_ir.constant(op.operands[1])
    load = parameter(weight)
    return noted(load) if load is not None else "row"


def computed_from(weight: ir.Value) -> str | None:
    """A layout other than ``row`` of something that ``weight`` was computed from; None if there is none."""
    pending, seen = [weight], set[ir.Operation]()
    while pending:
        op = torch_ir.producer(pending.pop())
        if op is None or op in seen or torch_ir.op_name(op) == UNSHUFFLE:
            continue
        seen.add(op)
        found = [carried(result) for result in op.results if torch_ir.tensor_type(result) is not None]
        other = next((layout for layout in found if layout not in (None, "row")), None)
        if other is not None:
            return other
        pending += op.operands
    return None


def parameter(weight: ir.Value) -> ir.Operation | None:
    """The ``util.global.load`` that ``weight`` is; None if it is anything else."""
    bridge = torch_ir.producer(weight)
    if bridge is None or bridge.name != "torch_c.from_builtin_tensor":
        return None
    load = torch_ir.producer(bridge.operands[0])
    return load if load is not None and load.name == "util.global.load" else None


def names(weight: ir.Value) -> list[str]:
    """The parameters that ``weight`` is, or is computed from."""
    found: dict[str, None] = {}
    pending, seen = [weight], set[ir.Operation]()
    while pending:
        op = torch_ir.producer(pending.pop())
        if op is None or op in seen:
            continue
        seen.add(op)
        if op.name == "util.global.load":
            found[ir.FlatSymbolRefAttr(op.attributes["global"]).value] = None
        pending += op.operands
    return list(found)


def noted(load: ir.Operation) -> str:
    """The layout written on a load."""
    return ir.StringAttr(load.attributes[ATTRIBUTE]).value if ATTRIBUTE in load.attributes else "row"


def note(load: ir.Operation, layout: str) -> None:
    """Write the layout on a load, and on the global it reads."""
    if layout == "row":
        return
    function = load.parent
    assert function is not None and function.operation.parent is not None
    name = ir.FlatSymbolRefAttr(load.attributes["global"]).value
    stored = ir.SymbolTable(function.operation.parent.operation)[name].operation
    for op in (load, stored):
        op.attributes[ATTRIBUTE] = ir.StringAttr.get(layout)
