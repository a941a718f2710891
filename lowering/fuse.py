"""Step 5, fuse: from each producer outward, one ``vmfuse.row`` takes all that reads it; routing is alone."""

from __future__ import annotations

from iree.compiler import ir

from patterns import canonical, torch_ir
from patterns.linear_fusion import LINEAR, fuse_linear
from patterns.row_fusion import Support, fuse_plain, fuse_producer
from patterns.selection_fusion import SELECT, fuse_selection
from patterns.sites import Ledger
from patterns.topk_fusion import fuse_routing


def fuse(function: ir.Operation, ledger: Ledger, support: Support) -> None:
    """Fuse every site of ``function`` in place; ``support`` says why a spec has no kernel, or None.

    Producers come first: what is quantized behind them is theirs.  Every site's fate is in ``ledger``.
    Block-scaled products are no sites; ``layout`` gives them to kernels.
    """
    block = torch_ir.block_of(function)
    for producer in _ops(block, *canonical.PRODUCERS):
        fuse_producer(producer, ledger, support)
    for value in _quantized(block):
        fuse_plain(value, ledger, support)
    for routing in _ops(block, canonical.GROUPED_TOPK):
        fuse_routing(routing, ledger, support)
    for linear in _ops(block, LINEAR):
        fuse_linear(linear, support)
    for selection in _ops(block, SELECT):
        fuse_selection(selection, support)
    torch_ir.erase_dead(block)


def _ops(block: ir.Block, *names: str) -> list[ir.Operation]:
    return [op.operation for op in block.operations if torch_ir.op_name(op.operation) in names]


def _quantized(block: ir.Block) -> list[ir.Value]:
    """The tensors that still have quantizations, once each, in block order."""
    values: list[ir.Value] = []
    for quant in _ops(block, canonical.GROUP_QUANT):
        if quant.operands[0] not in values:
            values.append(quant.operands[0])
    return values
