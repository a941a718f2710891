"""Raise RMSNorm, where it is written out, to ``vmfuse.norm`` with the rounding it computes."""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import Norm, Rounding
from .match import (
    ANY,
    Aside,
    Bindings,
    Const,
    Exact,
    Is,
    OneOf,
    Op,
    Statistic,
    Var,
    f32,
    first_match,
    times_one,
)
from .operation import Operation
from .recogniser import Raised
from .torch_ir import TensorType
from .well_typed import why_no_norm

OPERATION = Operation(canonical.NORM, Norm, why_no_norm, site=lambda norm: "rms_norm", is_producer=True)

_CAST = "torch.prims.convert_element_type"
# A product of 16-bit and float32 tensors is taken in float32: of what was widened, or as it is.
_H = Exact("h")
_SQUARE = OneOf(f32("pow.Tensor_Scalar", _H, Is(2)), f32("mul.Tensor", _H, _H))
_SUM = Aside(Statistic("sum.dim_IntList", _SQUARE))
_MEAN = Aside(
    OneOf(
        Statistic("mean.dim", _SQUARE),
        f32("div.Scalar", _SUM, Const("size")),
        f32("div.Tensor", _SUM, Const("size")),
        f32("mul.Scalar", _SUM, Const("one_over_size")),
        f32("mul.Tensor", _SUM, Const("one_over_size"), commutative=True),
    )
)
_SHIFTED = Aside(
    OneOf(
        f32("add.Scalar", _MEAN, Const("eps"), Is(1)),
        f32("add.Tensor", _MEAN, Const("eps"), Is(1), commutative=True),
        _MEAN,
    )
)
_ROOT = OneOf(f32("sqrt", _SHIFTED), f32("pow.Tensor_Scalar", _SHIFTED, Is(0.5)))
# PyTorch computes a power of -0.5 as rsqrt, and rsqrt as 1 over the root.
RSTD = Aside(
    OneOf(
        f32("rsqrt", _SHIFTED),
        f32("pow.Tensor_Scalar", _SHIFTED, Is(-0.5)),
        times_one(f32("reciprocal", Aside(_ROOT))),
    )
)
NORMED = f32("mul.Tensor", _H, RSTD, commutative=True, capture="normed")
_INNER = Op(_CAST, NORMED, ANY, capture="inner")
_WEIGHTED = OneOf(
    Op("torch.aten.mul.Tensor", _INNER, Var("weight"), commutative=True),
    f32("mul.Tensor", NORMED, Exact("weight"), commutative=True),
    NORMED,
)


@dataclass(frozen=True)
class _Inputs:
    """Hold what is normed, ``x`` or its float32 sum with ``residual``, and that sum where it is rounded."""

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

    The mean may be a sum over the size, and the reciprocal root a power or 1 over a root.

    Hugging Face Llama and its kin (cast back, then times weight: ``twice``), the forms that stay in
    float32 until the end (``once``), and those whose float32 value is quantized (``none``).  A sum of two
    tensors widened to float32 before it is the residual add of the fused ops (``exact``).
    """

    roots = ("torch.aten.mul.Tensor",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_WEIGHTED, op.result)
        if found is None or why_not_mean(found) is not None:
            return None
        inputs = _inputs(found["h"], found.get("weight"))
        weight = torch_ir.tensor_type(found["weight"]) if "weight" in found else None
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
        contract = Norm(float(found.get("eps", 0.0)), rounding, residual, offset)
        total = None if inputs.residual is None else inputs.rounded_sum or inputs.type
        return Raised(canonical.NORM, contract, operands, [result, total])


def why_not_mean(found: Bindings) -> str | None:
    """Say why the sum of squares that ``found`` holds (h, size) is not made a mean; None if it is."""
    h = torch_ir.tensor_type(found["h"])
    if h is None or not h.shape:
        return "the normed tensor has no known rank"
    size, divisor, factor = h.shape[-1], found.get("size"), found.get("one_over_size")
    if divisor not in (None, size):
        return f"its sum of squares is divided by {divisor:g}, and its rows have {size or 'unknown'} elements"
    # 1 over a power of two is exact.
    if factor is not None and (size is None or factor * size != 1 or size & (size - 1)):
        return (
            f"its sum of squares is multiplied by {factor:g}, which rounds otherwise than a division by the "
            "size of a row: use .mean(-1)"
        )
    return None


def _inputs(h: ir.Value, weight: ir.Value | None) -> _Inputs:
    add = torch_ir.producer(h)
    if add is None or not torch_ir.is_plain_add(add):
        return _Inputs(torch_ir.widened_from(h))
    x, residual = (torch_ir.widened_from(operand) for operand in list(add.operands)[:2])
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
