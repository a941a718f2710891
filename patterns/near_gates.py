"""Find what looks like a quantized gated activation and is none that a kernel computes, and say why not.

What gives one away is a product of which one factor is an activation, and which is quantized, past views and
casts.
"""

from __future__ import annotations

from iree.compiler import ir

from . import gated_activation, torch_ir, views
from .match import Bindings
from .near_norms import CAST, short
from .recogniser import NearMiss
from .well_typed import FLOATS


class UnmatchedGate:
    """A product of an activation, which is quantized and is no gated activation."""

    roots = ("torch.aten.mul.Tensor",)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        found = gated_activation.nearly_gated(op)
        if found is None or not _is_quantized(op.result):
            return None
        return NearMiss(f"{gated_activation.activation_of(found)}_mul", _why_no_gate(op.result, found))


def _is_quantized(value: ir.Value) -> bool:
    casts = (op for op in torch_ir.users(value) if op.name == CAST or views.is_view(op))
    return views.is_quantized(value) or any(_is_quantized(op.result) for op in casts)


def _why_no_gate(product: ir.Value, found: Bindings) -> str:
    gate, up = torch_ir.widened_from(found["gate"]), torch_ir.widened_from(found["up"])
    of_gate, of_up = torch_ir.tensor_type(gate), torch_ir.tensor_type(up)
    if of_gate is None or of_up is None:
        return "a factor of its product has no known rank"
    for type_ in (of_gate, of_up):
        if type_.dtype not in FLOATS:
            return f"it multiplies {type_.dtype}; the row kernel gates {', '.join(FLOATS)}"
    if of_gate.shape != of_up.shape:
        return f"it multiplies {of_gate} by {of_up}; the row kernel's gate and other factor have one shape"
    if of_gate.dtype != of_up.dtype:
        return (
            f"its gate is {of_gate.dtype} and the other factor {of_up.dtype}; the row kernel reads both in "
            "one dtype: cast one to the other's"
        )
    return _why_not_rounded(product, found, of_gate.dtype)


def _why_not_rounded(product: ir.Value, found: Bindings, dtype: str) -> str:
    """Say where it rounds otherwise than a kernel that reads ``dtype`` does."""
    activated, y = torch_ir.dtype_of(found["gate"]), torch_ir.dtype_of(product)
    if "inner" in found or activated != y:
        what = f"its activation is computed in {activated}, and its product in {y}"
    elif y != "float32":
        what = f"its activation is written out in {y}, which rounds each step"
    else:
        readers = dict.fromkeys(short(op) for op in torch_ir.users(product))
        what = f"its product in float32 is read by {', '.join(readers)}"
    return (
        f"{what}; the row kernel rounds torch's activation and the product to {dtype} each, or once the "
        "float32 product of a float32 activation"
    )


SUSPICIONS = (UnmatchedGate(),)
