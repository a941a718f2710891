"""Routing becomes one kernel: it is whole already when it is raised, and takes in nothing around it."""

from __future__ import annotations

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import TopkSpec
from .row_fusion import Support
from .sites import Ledger


def fuse_routing(routing: ir.Operation, ledger: Ledger, support: Support) -> None:
    """Give a ``vmfuse.grouped_topk`` to a kernel, or refuse it with a reason."""
    site, spec = canonical.site_of(routing), _spec(routing)
    reason = support(spec)
    if reason is not None:
        ledger.refuse(site, reason)
        return
    types = [torch_ir.tensor_type(result) for result in routing.results]
    with ir.InsertionPoint(routing), routing.location:
        fused = canonical.create(
            canonical.TOPK,
            list(routing.operands),
            [type_ for type_ in types if type_ is not None],
            spec=canonical.to_attribute(spec),
            sites=canonical.to_attribute((site,)),
        )
    torch_ir.set_example(fused, [torch_ir.example_shape(result) for result in routing.results])
    for old, new in zip(routing.results, fused.results, strict=True):
        old.replace_all_uses_with(new)
    routing.erase()
    ledger.fuse(site, "grouped_topk")


def _spec(routing: ir.Operation) -> TopkSpec:
    gating, bias = (torch_ir.tensor_type(operand) for operand in routing.operands)
    ids = torch_ir.tensor_type(routing.results[1])
    assert gating is not None and bias is not None and ids is not None
    experts = gating.shape[-1]
    assert experts is not None
    return TopkSpec(experts, gating.dtype, bias.dtype, canonical.routing_contract(routing), ids.dtype)
