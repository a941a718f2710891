"""Move what a fused operation is given before it: a model may compute it later than it has to."""

from __future__ import annotations

from iree.compiler import ir

from . import torch_ir


def hoist(value: ir.Value, place: ir.Operation) -> bool:
    """Make ``value`` known where ``place`` stands; False, and nothing is moved, where it depends on it."""
    behind: set[ir.Operation] = set()
    pending = [value]
    while pending:
        op = torch_ir.producer(pending.pop())
        if op is None or op in behind or op.is_before_in_block(place):
            continue
        if op == place:
            return False
        behind.add(op)
        pending += list(op.operands)
    for op in torch_ir.in_block_order(behind):
        op.move_before(place)
    return True
