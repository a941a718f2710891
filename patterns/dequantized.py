"""Remark weights that are stored in eight bits and made floats again before a product reads them.

Such a product is none of codes: it is taken in the floats, and its activations are not quantized.
"""

from __future__ import annotations

from iree.compiler import ir

from . import torch_ir, weight_layouts
from .contracts import LARGEST_FINITE
from .near_norms import FACTORS
from .recogniser import NearMiss

# Which operand of a product is the weight.
_PRODUCTS = {
    "torch.aten.linear": 1,
    "torch.aten.mm": 1,
    "torch.aten.matmul": 1,
    "torch.aten.bmm": 1,
    "torch.aten.addmm": 2,
}


class DequantizedWeight:
    """A product of a weight that is codes times their scales."""

    roots = tuple(_PRODUCTS)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        found = _codes(op.operands[_PRODUCTS[op.name]])
        if found is None:
            return None
        name, dtype = found
        return NearMiss(
            "linear",
            f"its weight {name!r} is {dtype} and is dequantized, multiplied by its scales, before the "
            f"product, which is taken in {torch_ir.dtype_of(op.results[0])} of activations that are not "
            "quantized; for a product of codes use lowering.nn.BlockScaledLinear or "
            "torch.ops.lowering.block_scaled_matmul",
            is_site=False,
        )


def _codes(weight: ir.Value) -> tuple[str, str] | None:
    """Name and dtype of the codes that ``weight``, which is computed, is a product of; None if it is none."""
    found, scaled = None, False
    pending, seen = [weight], set[ir.Operation]()
    while pending:
        value = pending.pop()
        op, dtype = torch_ir.producer(value), torch_ir.dtype_of(value)
        if op in seen:
            continue
        if op is None or op.name in (*_PRODUCTS, "torch.operator"):
            return None  # an argument, or something computed of one: no weight
        seen.add(op)
        if weight_layouts.parameter(value) is not None:
            (name,) = weight_layouts.names(value)
            found = (name, dtype) if dtype in (*LARGEST_FINITE, "uint8") else found
            continue
        scaled |= op.name in FACTORS
        pending += op.operands
    return found if scaled else None


SUSPICIONS = (DequantizedWeight(),)
