"""RMSNorm written out, raised to ``vmfuse.rms_norm`` with the rounding it computes."""

from __future__ import annotations

from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import RmsNorm
from .match import ANY, Bindings, Const, Is, OneOf, Op, Var, first_match
from .recogniser import Raised
from .views import is_quantized


def _mul(a: Any, b: Any, capture: str | None = None) -> Op:
    return Op("torch.aten.mul.Tensor", a, b, commutative=True, capture=capture)


def _cast(inner: Any, capture: str | None = None) -> Op:
    return Op("torch.prims.convert_element_type", inner, ANY, capture=capture)


def _maybe_cast(inner: Any) -> OneOf:
    return OneOf(_cast(inner), inner)


_H = Var("h")
_SQUARE = OneOf(Op("torch.aten.pow.Tensor_Scalar", _H, Is(2)), _mul(_H, _H))
_MEAN = Op("torch.aten.mean.dim", _SQUARE, Const("dims"), Is(True), ANY)
_RSTD = Op("torch.aten.rsqrt", Op("torch.aten.add.Scalar", _MEAN, Const("eps"), Is(1)))
_NORMED = _mul(_H, _RSTD, capture="normed")
_WEIGHTED = OneOf(
    _mul(_cast(_NORMED, capture="inner"), Var("weight")),
    _mul(_NORMED, _maybe_cast(Var("weight"))),
    _NORMED,
)


class DecomposedNorm:
    """x.pow(2).mean(-1, keepdim=True), rsqrt(.. + eps) and the products around it.

    Hugging Face Llama and its kin (cast back, then times weight: ``twice``), the forms that stay in
    float32 until the end (``once``), and those that are quantized unrounded (``none``).
    """

    roots = ("torch.aten.mul.Tensor",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_WEIGHTED, op.result)
        if found is None:
            return None
        x = torch_ir.uncast(found["h"])
        x_type, h_type = torch_ir.tensor_type(x), torch_ir.tensor_type(found["h"])
        if x_type is None or h_type is None or h_type.dtype != "float32":
            return None
        if found["dims"] not in ([-1], [len(x_type.shape) - 1]) or not _is_vector(
            found.get("weight"), x_type
        ):
            return None
        outcome = self._outcome(op, found, x_type)
        if outcome is None:
            return None
        rounding, result = outcome
        inputs, offset = [x], 0.0
        if "weight" in found:
            weight, offset = _offset_weight(found["weight"])
            inputs.append(weight)
        contract = RmsNorm(float(found["eps"]), rounding, weight_offset=offset)
        return Raised(canonical.RMS_NORM, contract, inputs, [result, None])

    def _outcome(
        self, op: ir.Operation, found: Bindings, x: torch_ir.TensorType
    ) -> tuple[Any, ir.Value] | None:
        """The rounding and the value that is y, which must have x's dtype."""
        result = torch_ir.tensor_type(op.result)
        if result is None:
            return None
        if "inner" in found:
            inner = torch_ir.tensor_type(found["inner"])
            same = inner is not None and inner.dtype == result.dtype == x.dtype
            return ("twice", op.result) if same else None
        if result.dtype == x.dtype:
            return "once", op.result
        casts = torch_ir.users(op.result)
        if len(casts) == 1 and casts[0].name == "torch.prims.convert_element_type":
            cast_type = torch_ir.tensor_type(casts[0].result)
            if cast_type is not None and cast_type.dtype == x.dtype:
                return "once", casts[0].result
        if result.dtype == "float32" and is_quantized(op.result):
            return "none", op.result
        return None


_OFFSET_WEIGHT = Op("torch.aten.add.Scalar", Var("weight"), Const("offset"), Is(1))


def _offset_weight(weight: ir.Value) -> tuple[ir.Value, float]:
    """The stored weight and what is added to it in float32: Gemma's norms multiply by 1 + w."""
    found = first_match(_OFFSET_WEIGHT, weight)
    type_ = torch_ir.tensor_type(weight)
    if found is None or type_ is None or type_.dtype != "float32":
        return weight, 0.0
    return torch_ir.uncast(found["weight"]), float(found["offset"])


def _is_vector(weight: ir.Value | None, x: torch_ir.TensorType) -> bool:
    if weight is None:
        return True
    type_ = torch_ir.tensor_type(weight)
    return type_ is not None and type_.shape == (x.shape[-1],)


RECOGNISERS = (DecomposedNorm(),)
