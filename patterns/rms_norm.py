"""RMSNorm written out, raised to ``vmfuse.rms_norm`` with the rounding it computes."""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import RmsNorm, Rounding
from .match import ANY, Bindings, Const, Exact, Is, OneOf, Op, Pattern, Var, first_match
from .recogniser import Raised
from .torch_ir import TensorType


def _mul(a: Pattern, b: Pattern, capture: str | None = None) -> Op:
    return Op("torch.aten.mul.Tensor", a, b, commutative=True, capture=capture)


def _unsqueezed(inner: Pattern) -> OneOf:
    """``inner`` of a mean that kept its axis, or of one that got it back."""
    return OneOf(inner, Op("torch.aten.unsqueeze", inner, ANY))


_CAST = "torch.prims.convert_element_type"
_H = Var("h")
_SQUARE = OneOf(Op("torch.aten.pow.Tensor_Scalar", _H, Is(2)), _mul(_H, _H))
_MEAN = _unsqueezed(Op("torch.aten.mean.dim", _SQUARE, Const("axes"), ANY, ANY))
_SHIFTED = _unsqueezed(
    OneOf(
        Op("torch.aten.add.Scalar", _MEAN, Const("eps"), Is(1)),
        Op("torch.aten.add.Tensor", _MEAN, Const("eps"), Is(1)),
    )
)
RSTD = _unsqueezed(Op("torch.aten.rsqrt", _SHIFTED))
_NORMED = _mul(_H, RSTD, capture="normed")
_WEIGHTED = OneOf(
    _mul(Op(_CAST, _NORMED, ANY, capture="inner"), Var("weight")),
    _mul(_NORMED, Exact("weight")),
    _NORMED,
)


@dataclass(frozen=True)
class _Inputs:
    """What is normed: ``x``, or in float32 its sum with ``residual``; and that sum where it is rounded."""

    x: ir.Value
    residual: ir.Value | None = None
    rounded_sum: ir.Value | None = None

    @property
    def type(self) -> TensorType:
        type_ = torch_ir.tensor_type(self.x)
        assert type_ is not None
        return type_


class DecomposedNorm:
    """x.pow(2).mean(-1, keepdim=True), rsqrt(.. + eps) and the products around it.

    Hugging Face Llama and its kin (cast back, then times weight: ``twice``), the forms that stay in
    float32 until the end (``once``), and those whose float32 value is quantized (``none``).  A sum of two
    tensors widened to float32 before it is the residual add of the fused ops (``exact``).
    """

    roots = ("torch.aten.mul.Tensor",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_WEIGHTED, op.result)
        if found is None or why_not_core(found) is not None:
            return None
        inputs = _inputs(found["h"], found.get("weight"))
        weight = torch_ir.tensor_type(found["weight"]) if "weight" in found else None
        if "weight" in found and (weight is None or weight.shape != (inputs.type.shape[-1],)):
            return None
        outcome = _outcome(op.result, found, inputs.type, weight)
        if outcome is None:
            return None
        rounding, result = outcome
        operands, offset = [inputs.x], 0.0
        if inputs.residual is not None:
            operands.append(inputs.residual)
        if "weight" in found:
            stored, offset = _offset_weight(found["weight"])
            operands.append(stored)
        residual = None if inputs.residual is None else "exact"
        contract = RmsNorm(float(found["eps"]), rounding, residual, offset)
        total = None if inputs.residual is None else inputs.rounded_sum or inputs.type
        return Raised(canonical.RMS_NORM, contract, operands, [result, total])


def why_not_core(found: Bindings) -> str | None:
    """Why the statistic that ``found`` holds (h, axes, eps) is not that of a norm; None if it is."""
    h = torch_ir.tensor_type(found["h"])
    if h is None or not h.shape:
        return "the normed tensor has no known rank"
    if h.dtype != "float32":
        return f"the mean of squares is taken in {h.dtype}; convert the tensor with .float() before"
    axes = found["axes"] or []
    if [axis % len(h.shape) for axis in axes] != [len(h.shape) - 1]:
        return f"the mean of squares is over axes {axes} of {len(h.shape)}; a kernel norms the last axis"
    return None


def _inputs(h: ir.Value, weight: ir.Value | None) -> _Inputs:
    add = torch_ir.producer(h)
    if add is None or not torch_ir.is_plain_add(add):
        return _Inputs(torch_ir.uncast(h))
    x, residual = (torch_ir.uncast(operand) for operand in list(add.operands)[:2])
    if x.type != residual.type or x == add.operands[0]:
        return _Inputs(h)
    # The rounded sum becomes a result of the norm, which stands where the first of its results stood.
    later = [op for op in torch_ir.users(h) if weight is None or torch_ir.dominates(weight, op)]
    sums = [op.result for op in later if op.name == _CAST and op.result.type == x.type]
    return _Inputs(x, residual, sums[0] if sums else None)


def _outcome(
    value: ir.Value, found: Bindings, x: TensorType, weight: TensorType | None
) -> tuple[Rounding, ir.Value] | None:
    """The rounding, and the value that is y; None where no rounding is what is written."""
    result, inner = torch_ir.dtype_of(value), torch_ir.dtype_of(found.get("inner", value))
    if "inner" in found:
        promoted = x.dtype if weight is None or weight.dtype == x.dtype else "float32"
        written = result == x.dtype or views.only_quantized(value)
        return ("twice", value) if inner == x.dtype and result == promoted and written else None
    if result == x.dtype:
        return "once", value
    casts = torch_ir.users(value)
    if len(casts) == 1 and casts[0].name == _CAST and torch_ir.dtype_of(casts[0].result) == x.dtype:
        return "once", casts[0].result
    return ("none", value) if result == "float32" and views.only_quantized(value) else None


_OFFSET_WEIGHT = Op("torch.aten.add.Scalar", Exact("weight"), Const("offset"), Is(1), dtype="float32")


def _offset_weight(weight: ir.Value) -> tuple[ir.Value, float]:
    """The stored weight and what is added to it in float32: Gemma's norms multiply by 1 + w."""
    found = first_match(_OFFSET_WEIGHT, weight)
    return (weight, 0.0) if found is None else (found["weight"], float(found["offset"]))


RECOGNISERS = (DecomposedNorm(),)
