"""Raise act(gate) * up, where it is written out, to ``vmfuse.gated_activation``.

Only where it is quantized: an activation nobody quantizes is better left to the code generator,
which can put it behind the product that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import Activation, GatedActivation, Rounding
from .match import ANY, Bindings, Const, Is, Named, Near, OneOf, Op, Pattern, Var, f32, first_match
from .operation import Operation
from .recogniser import Raised
from .well_typed import why_no_gate

OPERATION = Operation(
    canonical.GATED_ACTIVATION,
    GatedActivation,
    why_no_gate,
    site=lambda gate: f"{gate.activation}_mul",
    is_producer=True,
)

_CAST = "torch.prims.convert_element_type"
_G = Var("gate")


# How a step is written: in float32, or in any dtype.
_Step = Callable[..., Op]


def _in_any_dtype(name: str, *operands: Pattern, commutative: bool = False) -> Op:
    return Op(f"torch.aten.{name}", *operands, commutative=commutative)


def _activations(step: _Step) -> OneOf:
    """The activations of ``gate``: torch's, and those whose every operation is a ``step``."""

    def mul(a: Pattern, b: Pattern) -> Op:
        return step("mul.Tensor", a, b, commutative=True)

    def plus_one(a: Pattern) -> Op:
        return step("add.Scalar", a, Is(1), Is(1))

    def half_of_product(a: Pattern, b: Pattern) -> OneOf:
        """a * b / 2, the half taken anywhere."""
        half = [lambda x: step("mul.Scalar", x, Is(0.5)), lambda x: step("div.Scalar", x, Is(2))]
        return OneOf(*(p for h in half for p in (mul(h(a), b), mul(a, h(b)), h(mul(a, b)))))

    cube = OneOf(step("pow.Tensor_Scalar", _G, Is(3)), mul(mul(_G, _G), _G))
    polynomial = step("add.Tensor", _G, step("mul.Scalar", cube, Near(0.044715)), Is(1), commutative=True)
    tanh = step("tanh", step("mul.Scalar", polynomial, Near(math.sqrt(2.0 / math.pi))))
    over_root = [step("mul.Scalar", _G, Near(math.sqrt(0.5))), step("div.Scalar", _G, Near(math.sqrt(2.0)))]
    silu = OneOf(
        Op("torch.aten.silu", _G),
        mul(_G, step("sigmoid", _G)),
        step("div.Tensor", _G, plus_one(step("exp", step("neg", _G)))),
    )
    return OneOf(
        Named("silu", silu),
        Named("gelu", Op("torch.aten.gelu", _G, Const("approximate"))),
        Named("gelu", half_of_product(_G, plus_one(step("erf", OneOf(*over_root))))),
        Named("gelu_tanh", half_of_product(_G, plus_one(tanh))),
    )


def _maybe_cast(activated: Pattern) -> OneOf:
    return OneOf(Op(_CAST, activated, ANY, capture="inner"), activated)


# Written out in float32: there no step between is rounded to less than the activation is.
_GATED = Op("torch.aten.mul.Tensor", _maybe_cast(_activations(f32)), Var("up"), commutative=True)
_NEARLY_ACTIVATED = _maybe_cast(_activations(_in_any_dtype))


def nearly_gated(product: ir.Operation) -> Bindings | None:
    """The parts of a product of an activation, of whatever shapes and dtypes: gate, up, and inner if cast."""
    for factor, up in (product.operands, reversed(list(product.operands))):
        found = first_match(_NEARLY_ACTIVATED, factor)
        if found is not None:
            return {**found, "up": up}
    return None


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
        packed = halves_of(gate, up)
        contract = GatedActivation(activation_of(found), rounding, packed=packed is not None)
        operands = [gate, up] if packed is None else [packed]
        return Raised(canonical.GATED_ACTIVATION, contract, operands, [result])


@dataclass(frozen=True)
class Product:
    """Hold the parts of act(gate) * up, of two tensors of one type, or a gate of 16 bits of float32."""

    gate: ir.Value
    up: ir.Value
    contract: GatedActivation


def product(value: ir.Value) -> Product | None:
    """Read ``value`` as act(gate) * up, whatever reads it; None if it is none, or rounds otherwise.

    ``value`` may be that product widened.
    """
    narrow = torch_ir.widened_from(value)
    found = first_match(_GATED, narrow)
    if found is None:
        return None
    gate, up = torch_ir.widened_from(found["gate"]), torch_ir.widened_from(found["up"])
    rounding = _rounding(narrow, found)
    if rounding is None and "inner" not in found and torch_ir.dtype_of(up) == "float32":
        rounding = "once" if found["gate"].type == up.type == narrow.type else None
    if rounding is None:
        return None
    return Product(gate, up, GatedActivation(activation_of(found), rounding, packed=False))


def _outcome(product: ir.Value, found: Bindings) -> tuple[Rounding, ir.Value] | None:
    """The rounding, and the value that is y; None where no rounding is what is written."""
    rounding = _rounding(product, found)
    if rounding != "none":
        return None if rounding is None else (rounding, product)
    gate, casts = torch_ir.widened_from(found["gate"]), torch_ir.users(product)
    if len(casts) == 1 and casts[0].name == _CAST and casts[0].result.type == gate.type:
        return "once", casts[0].result
    return ("none", product) if views.only_quantized(product) else None


def _rounding(product: ir.Value, found: Bindings) -> Rounding | None:
    """The rounding of ``product`` as it is; None where no rounding is what is written."""
    gate, up = torch_ir.widened_from(found["gate"]), torch_ir.widened_from(found["up"])
    y = torch_ir.tensor_type(product)
    if y is None or gate.type != up.type or torch_ir.tensor_type(gate) is None:
        return None
    dtype, rounded = torch_ir.dtype_of(gate), found.get("inner", found["gate"])
    if product.type == gate.type:
        # In float32 nothing is rounded in between, and one contract is enough.
        fits = found["up"] == up and torch_ir.dtype_of(rounded) == dtype
        return ("once" if dtype == "float32" else "twice") if fits else None
    if "inner" in found or torch_ir.dtype_of(found["gate"]) != "float32" or y.dtype != "float32":
        return None
    return "none"


def activation_of(found: Bindings) -> Activation:
    """Which activation was found."""
    if "silu" in found:
        return "silu"
    return "gelu_tanh" if "gelu_tanh" in found or found.get("approximate") == "tanh" else "gelu"


def halves_of(gate: ir.Value, up: ir.Value) -> ir.Value | None:
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
