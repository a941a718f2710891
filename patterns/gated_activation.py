"""act(gate) * up written out, raised to ``vmfuse.gated_activation``.

Only where it is quantized: an activation nobody quantizes is better left to the code generator,
which can put it behind the product that makes it.
"""

from __future__ import annotations

import math

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import Activation, GatedActivation, Rounding
from .match import ANY, Bindings, Const, Is, Named, Near, OneOf, Op, Pattern, Var, f32, first_match
from .operation import Operation
from .recogniser import Raised
from .well_typed import why_no_gate

OPERATION = Operation(
    canonical.GATED_ACTIVATION, GatedActivation, why_no_gate, site=lambda gate: f"{gate.activation}_mul"
)

_CAST = "torch.prims.convert_element_type"
_G = Var("gate")


def _mul(a: Pattern, b: Pattern) -> Op:
    return f32("mul.Tensor", a, b, commutative=True)


def _plus_one(a: Pattern) -> Op:
    return f32("add.Scalar", a, Is(1), Is(1))


# Written out, in float32: there no step between is rounded to less than the activation is.
_CUBE = OneOf(f32("pow.Tensor_Scalar", _G, Is(3)), _mul(_mul(_G, _G), _G))
_POLYNOMIAL = f32("add.Tensor", _G, f32("mul.Scalar", _CUBE, Near(0.044715)), Is(1), commutative=True)
_TANH = f32("tanh", f32("mul.Scalar", _POLYNOMIAL, Near(math.sqrt(2.0 / math.pi))))
_ERF = f32(
    "erf", OneOf(f32("mul.Scalar", _G, Near(math.sqrt(0.5))), f32("div.Scalar", _G, Near(math.sqrt(2.0))))
)


def _half_of_product(a: Pattern, b: Pattern) -> OneOf:
    """a * b / 2, the half taken anywhere."""
    half = [lambda x: f32("mul.Scalar", x, Is(0.5)), lambda x: f32("div.Scalar", x, Is(2))]
    return OneOf(*(p for h in half for p in (_mul(h(a), b), _mul(a, h(b)), h(_mul(a, b)))))


_SILU = OneOf(
    Op("torch.aten.silu", _G),
    _mul(_G, f32("sigmoid", _G)),
    f32("div.Tensor", _G, _plus_one(f32("exp", f32("neg", _G)))),
)
_ACTIVATED = OneOf(
    Named("silu", _SILU),
    Named("gelu", Op("torch.aten.gelu", _G, Const("approximate"))),
    Named("gelu", _half_of_product(_G, _plus_one(_ERF))),
    Named("gelu_tanh", _half_of_product(_G, _plus_one(_TANH))),
)
_GATED = Op(
    "torch.aten.mul.Tensor",
    OneOf(Op(_CAST, _ACTIVATED, ANY, capture="inner"), _ACTIVATED),
    Var("up"),
    commutative=True,
)


class DecomposedGate:
    """``silu(gate) * up`` and ``gelu(gate) * up`` of two tensors, or of the halves of one.

    The activation may be torch's, or written out in float32; the product may be taken in the tensors' dtype
    (``twice``), or in float32 and then rounded (``once``) or quantized as it is (``none``).
    """

    roots = ("torch.aten.mul.Tensor",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_GATED, op.result)
        outcome = _outcome(op.result, found) if found is not None else None
        if found is None or outcome is None or not views.is_quantized(outcome[1]):
            return None
        rounding, result = outcome
        gate, up = torch_ir.widened_from(found["gate"]), torch_ir.widened_from(found["up"])
        packed = _halves_of(gate, up)
        contract = GatedActivation(_activation(found), rounding, packed=packed is not None)
        operands = [gate, up] if packed is None else [packed]
        return Raised(canonical.GATED_ACTIVATION, contract, operands, [result])


def _outcome(product: ir.Value, found: Bindings) -> tuple[Rounding, ir.Value] | None:
    """The rounding, and the value that is y; None where no rounding is what is written."""
    gate, up = torch_ir.widened_from(found["gate"]), torch_ir.widened_from(found["up"])
    y = torch_ir.tensor_type(product)
    if y is None or gate.type != up.type or torch_ir.tensor_type(gate) is None:
        return None
    dtype, rounded = torch_ir.dtype_of(gate), found.get("inner", found["gate"])
    if product.type == gate.type:
        # In float32 nothing is rounded in between, and one contract is enough.
        fits = found["up"] == up and torch_ir.dtype_of(rounded) == dtype
        return ("once" if dtype == "float32" else "twice", product) if fits else None
    if "inner" in found or torch_ir.dtype_of(found["gate"]) != "float32" or y.dtype != "float32":
        return None
    casts = torch_ir.users(product)
    if len(casts) == 1 and casts[0].name == _CAST and casts[0].result.type == gate.type:
        return "once", casts[0].result
    return ("none", product) if views.only_quantized(product) else None


def _activation(found: Bindings) -> Activation:
    if "silu" in found:
        return "silu"
    return "gelu_tanh" if "gelu_tanh" in found or found.get("approximate") == "tanh" else "gelu"


def _halves_of(gate: ir.Value, up: ir.Value) -> ir.Value | None:
    """The tensor whose first half along the last axis is ``gate`` and whose second is ``up``, or None."""
    first, second = torch_ir.producer(gate), torch_ir.producer(up)
    if first is None or second is None or not (views.is_view(first) and views.is_view(second)):
        return None
    whole = torch_ir.tensor_type(first.operands[0])
    if first.operands[0] != second.operands[0] or whole is None or not whole.shape[-1]:
        return None
    last, half = len(whole.shape) - 1, whole.shape[-1] // 2
    halves = (views.SliceBounds(last, 0, half), views.SliceBounds(last, half, 2 * half))
    fits = whole.shape[-1] % 2 == 0 and (views.slice_bounds(first), views.slice_bounds(second)) == halves
    return first.operands[0] if fits else None


RECOGNISERS = (DecomposedGate(),)
