"""Raise RMSNorm and LayerNorm, where they are written out, to ``vmfuse.norm`` as they round."""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from . import canonical, gated_activation, torch_ir, views
from .contracts import GatedActivation, Norm, Rounding
from .contracts import Statistic as StatisticName
from .match import (
    ANY,
    Aside,
    Bindings,
    Const,
    Exact,
    Is,
    OneOf,
    Op,
    Regrouped,
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

OPERATION = Operation(
    canonical.NORM,
    Norm,
    why_no_norm,
    site=lambda norm: "layer_norm" if norm.statistic == "variance" else "rms_norm",
    is_producer=True,
)

_CAST = "torch.prims.convert_element_type"
# A product of 16-bit and float32 tensors is taken in float32: of what was widened, or as it is.
_H = Exact("h")
_X = Exact("x")
CENTRED = f32("sub.Tensor", _X, Aside(Statistic("mean.dim", _X)), Is(1))
_SQUARE = OneOf(
    *(f32("pow.Tensor_Scalar", squared, Is(2)) for squared in (_H, CENTRED)),
    *(f32("mul.Tensor", squared, squared) for squared in (_H, CENTRED)),
)
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
_VARIANCE = Aside(Statistic("var.correction", _X, then=(Is(0),)))
_SPREAD = OneOf(_MEAN, _VARIANCE)
_SHIFTED = Aside(
    OneOf(
        f32("add.Scalar", _SPREAD, Const("eps"), Is(1)),
        f32("add.Tensor", _SPREAD, Const("eps"), Is(1), commutative=True),
        _SPREAD,
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
# The groups that are normed may be parts of longer rows, which are viewed as such again.
_ROWS = Regrouped(NORMED)
_INNER = Regrouped(Op(_CAST, _ROWS, ANY, capture="inner"))
_WEIGHTED = OneOf(
    Op("torch.aten.mul.Tensor", _INNER, Var("weight"), commutative=True),
    f32("mul.Tensor", _ROWS, Exact("weight"), commutative=True),
    NORMED,
)
_WHOLE = OneOf(
    Op("torch.aten.add.Tensor", _WEIGHTED, Var("bias"), Is(1), commutative=True),
    _WEIGHTED,
)


@dataclass(frozen=True)
class _Inputs:
    """Hold what is normed: ``x``, its float32 sum with ``residual`` (and that rounded), or act(gate) * x."""

    x: ir.Value
    residual: ir.Value | None = None
    rounded_sum: ir.Value | None = None
    gate: ir.Value | None = None
    activation: GatedActivation | None = None

    @property
    def type(self) -> TensorType:
        type_ = torch_ir.tensor_type(self.x)
        assert type_ is not None
        return type_


class DecomposedNorm:
    """x.pow(2).mean(-1, keepdim=True), rsqrt(.. + eps) and the products around it.

    The mean may be a sum over the size, and the reciprocal root a power or 1 over a root.  Where the mean of
    x is subtracted first, or the variance taken, it is a LayerNorm.  What is normed may be the product of a
    gate, and a view of longer rows in groups.

    Hugging Face Llama and its kin (cast back, then times weight: ``twice``), the forms that stay in
    float32 until the end (``once``), and those whose float32 value is quantized (``none``).  A sum of two
    tensors widened to float32 before it is the residual add of the fused ops (``exact``).
    """

    roots = ("torch.aten.mul.Tensor", "torch.aten.add.Tensor")

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_WHOLE, op.result)
        if found is None or why_not_mean(found) is not None:
            return None
        centred = _centred(found)
        rows = None if centred is None else _rows(centred[1], op.result)
        if centred is None or rows is None:
            return None
        inputs = _inputs(rows.of, found.get("weight"))
        outcome = _outcome(op.result, found, inputs.type)
        if outcome is None:
            return None
        rounding, result = outcome
        weight, offset = _offset_weight(found["weight"]) if "weight" in found else (None, 0.0)
        contract = Norm(
            float(found.get("eps", 0.0)),
            rounding,
            None if inputs.residual is None else "exact",
            offset,
            centred[0],
            rows.group,
            None if "bias" not in found else "twice",
            inputs.activation,
            _narrow_dtype(result, inputs.type) if rounding == "once" else None,
        )
        bias = torch_ir.widened_from(found["bias"]) if "bias" in found else None
        given = (inputs.x, inputs.gate, inputs.residual, weight, bias)
        total = None if inputs.residual is None else inputs.rounded_sum or inputs.type
        return Raised(canonical.NORM, contract, [v for v in given if v is not None], [result, total])


def _centred(found: Bindings) -> tuple[StatisticName, ir.Value] | None:
    """The statistic, and the tensor it is taken of; None where a variance is not that of what is normed.

    x, if found, is what it is the variance of, in one operation or as the mean of squares of deviations.
    """
    deviation = first_match(CENTRED, found["h"])
    if "x" not in found:
        return ("mean_square", found["h"]) if deviation is None else ("variance", deviation["x"])
    return None if deviation is None or deviation["x"] != found["x"] else ("variance", found["x"])


@dataclass(frozen=True)
class _Rows:
    """Hold what is normed, and the ``group`` of elements that it was viewed in; None if it was not."""

    of: ir.Value
    group: int | None = None


def _rows(groups: ir.Value, y: ir.Value) -> _Rows | None:
    """Find the rows, of the shape of ``y``, that ``groups`` is a view of; None where there are none."""
    of, wanted = torch_ir.tensor_type(groups), torch_ir.tensor_type(y)
    group = of.shape[-1] if of is not None and of.shape else None
    if of is None or wanted is None or of.shape == wanted.shape:
        return _Rows(groups)
    value = torch_ir.widened_from(groups)
    while (view := torch_ir.producer(value)) is not None and views.is_flat_view(view):
        value = torch_ir.widened_from(view.operands[0])
        type_ = torch_ir.tensor_type(value)
        if type_ is not None and type_.shape == wanted.shape and _same_sizes(value, y):
            whole = group is not None and wanted.shape[-1] is not None and wanted.shape[-1] % group == 0
            return _Rows(value, None if group == wanted.shape[-1] else group) if whole else None
    return None


def _same_sizes(a: ir.Value, b: ir.Value) -> bool:
    """Tell whether two tensors of one type have the same sizes, of which views may have made others."""
    type_ = torch_ir.tensor_type(a)
    sizes = [[getattr(size, "factors", size) for size in torch_ir.example_shape(v) or ()] for v in (a, b)]
    return type_ is not None and (type_.shape.count(None) <= 1 or sizes[0] == sizes[1] != [])


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
    add, gated = torch_ir.producer(h), gated_activation.product(h)
    if gated is not None:
        return _Inputs(gated.up, gate=gated.gate, activation=gated.contract)
    if add is None or not torch_ir.is_plain_add(add):
        return _Inputs(torch_ir.widened_from(h))
    x, residual = (torch_ir.widened_from(operand) for operand in list(add.operands)[:2])
    if x.type != residual.type or x == add.operands[0]:
        return _Inputs(h)
    # The rounded sum becomes a result of the norm, which stands where the first of its results stood.
    later = [op for op in torch_ir.users(h) if weight is None or torch_ir.dominates(weight, op)]
    sums = [op.result for op in later if op.name == _CAST and op.result.type == x.type]
    return _Inputs(x, residual, sums[0] if sums else None)


def _outcome(value: ir.Value, found: Bindings, x: TensorType) -> tuple[Rounding, ir.Value] | None:
    """The rounding, and the value that is y; None where no rounding is what is written."""
    result, inner = torch_ir.dtype_of(value), torch_ir.dtype_of(found.get("inner", value))
    if "inner" in found:
        vectors = {torch_ir.dtype_of(found[name]) for name in ("weight", "bias") if name in found}
        promoted = x.dtype if vectors <= {x.dtype} else "float32"
        written = result == x.dtype or views.only_quantized(value)
        return ("twice", value) if inner == x.dtype and result == promoted and written else None
    if "bias" in found and result != "float32":
        return None  # a product of 16 bits, or a sum
    later = torch_ir.rounded_later(value)
    if later is not None and x.dtype in ("float32", torch_ir.dtype_of(later)):
        return "once", later
    if result == x.dtype:
        return "once", value
    return ("none", value) if result == "float32" and views.only_quantized(value) else None


def _narrow_dtype(y: ir.Value, x: TensorType) -> str | None:
    """The dtype of ``y`` where it is not that of ``x``, a float32."""
    return None if torch_ir.dtype_of(y) == x.dtype else torch_ir.dtype_of(y)


_OFFSET_WEIGHT = Op("torch.aten.add.Scalar", Exact("weight"), Const("offset"), Is(1), dtype="float32")


def _offset_weight(weight: ir.Value) -> tuple[ir.Value, float]:
    """The stored weight and what is added to it in float32: Gemma's norms multiply by 1 + w."""
    found = first_match(_OFFSET_WEIGHT, weight)
    return (weight, 0.0) if found is None else (found["weight"], float(found["offset"]))


RECOGNISERS = (DecomposedNorm(),)
