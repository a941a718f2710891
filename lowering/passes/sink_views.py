"""Step 4, sink views: move a view between a producer and a quantization below the quantization."""

from __future__ import annotations

from iree.compiler import ir

from patterns import canonical, torch_ir, views
from patterns.hoist import hoist

from ..families.registry import operation_of


def sink_views(function: ir.Operation) -> None:
    """Move the views between a producer and a ``vmfuse.group_quant`` below it, whole chains, in place.

    Where groups would not survive, the quantization keeps the reason for the report.  Behind any
    other value views stay: they hide nothing there.
    """
    for op in [op.operation for op in torch_ir.block_of(function).operations]:
        if torch_ir.op_name(op) == canonical.GROUP_QUANT:
            while (below := _sink_one(op)) is not None:
                op = below
    torch_ir.erase_dead(torch_ir.block_of(function))


def _sink_one(quant: ir.Operation) -> ir.Operation | None:
    """Move the view right above ``quant`` below it; the new quantization, or None if there is none."""
    view = torch_ir.producer(quant.operands[0])
    if view is None or not views.is_view(view) or not _starts_at_producer(view):
        return None
    given = canonical.given_scale(quant)
    if given is None or hoist(given, view):
        returned = any(map(_is_returned, list(quant.results)[1:]))
        blocked = views.why_blocked(view, canonical.quantization(quant), returned=returned)
    else:
        blocked = views.SCALE_COMES_LATER
    if blocked is not None:
        quant.attributes[canonical.BLOCKED] = ir.StringAttr.get(blocked)
        return None
    return _quantize_first(view, quant)


def _quantize_first(view: ir.Operation, quant: ir.Operation) -> ir.Operation:
    quantization = canonical.quantization(quant)
    before, after = torch_ir.tensor_type(view.operands[0]), torch_ir.tensor_type(view.result)
    assert before is not None and after is not None
    types = canonical.quantized_types(after, quantization)
    with ir.InsertionPoint(view), quant.location:
        new = canonical.create(
            canonical.GROUP_QUANT,
            [view.operands[0], *list(quant.operands)[1:]],
            canonical.quantized_types(before, quantization),
            contract=quant.attributes["contract"],
            site=quant.attributes[canonical.SITE],
        )
        viewed = [views.replay(view, made, type_) for made, type_ in zip(new.results, types, strict=True)]
    for old, value in zip(quant.results, viewed, strict=True):
        old.replace_all_uses_with(value)
    quant.erase()
    return new


def _is_returned(scale: ir.Value) -> bool:
    """Tell whether the program returns ``scale``, as it is or a view of it: there its strides are seen."""
    return any(
        user.name == "func.return" or (views.is_view(user) and _is_returned(user.result))
        for user in torch_ir.users(scale)
    )


def _starts_at_producer(view: ir.Operation) -> bool:
    source: ir.Operation | None = view
    while source is not None and views.is_view(source):
        source = torch_ir.producer(source.operands[0])
    operation = None if source is None else operation_of(source)
    return operation is not None and operation.is_producer
