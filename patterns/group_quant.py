"""Group quantization written out, raised to ``vmfuse.group_quant``, and the product that reads it."""

from __future__ import annotations

import struct
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import LARGEST_FINITE, Division, Quantization
from .match import ANY, Bindings, Const, Is, OneOf, Op, Pattern, Var, first_match
from .recogniser import Raised


def _true_division(a: Pattern, name: str) -> Pattern:
    return OneOf(Op("torch.aten.div.Scalar", a, Const(name)), Op("torch.aten.div.Tensor", a, Const(name)))


def _product(a: Pattern, name: str) -> Pattern:
    return OneOf(
        Op("torch.aten.mul.Scalar", a, Const(name)),
        Op("torch.aten.mul.Tensor", a, Const(name), commutative=True),
    )


_H = Var("h")
_LARGEST = Op("torch.aten.amax", Op("torch.aten.abs", _H), Const("dims"), Is(True))
_AMAX = OneOf(
    Op("torch.aten.clamp", _LARGEST, Const("floor"), Is(None)),
    Op("torch.aten.clamp_min", _LARGEST, Const("floor")),
    Op("torch.aten.maximum", _LARGEST, Const("floor"), commutative=True),
    _LARGEST,
)


def _times_one(a: Pattern) -> Pattern:
    """How PyTorch traces 1.0 / a, behind the reciprocal."""
    return OneOf(Op("torch.aten.mul.Scalar", a, Is(1)), Op("torch.aten.mul.Tensor", a, Is(1)))


class _Scale(Pattern):
    """amax / qmax or amax * (1/qmax), remembered as a value of its own."""

    _formula = OneOf(_true_division(_AMAX, "qmax"), _product(_AMAX, "inverse_qmax"))

    def match(self, value: ir.Value, bound: Bindings) -> Any:
        if bound.get("scale", value) != value:
            return
        for found in self._formula.match(value, bound):
            yield {**found, "scale": value}


_SCALE = _Scale()
_INVERSE = Op("torch.aten.reciprocal", _SCALE, capture="inverse")
_QUOTIENT = OneOf(
    Op("torch.aten.div.Tensor", _H, _SCALE),
    Op("torch.aten.mul.Tensor", _H, OneOf(_INVERSE, _times_one(_INVERSE)), commutative=True),
)
_QUANTIZED = Op(
    "torch.prims.convert_element_type",
    Op("torch.aten.clamp", _QUOTIENT, Const("low"), Const("high")),
    ANY,
)


class DecomposedGroupQuant:
    """Group quantization written out: abs, amax, floor, division, clamp, cast over a last axis of one group.

    The reshape into groups before it and back after it are views like any other.
    """

    roots = ("torch.prims.convert_element_type",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        q = torch_ir.tensor_type(op.result)
        if q is None or q.dtype not in LARGEST_FINITE or q.dtype == "int8":
            return None  # a cast to int8 truncates: what rounds before it is another spelling
        found = first_match(_QUANTIZED, op.result)
        if found is None:
            return None
        contract = _contract(found, q)
        h = torch_ir.tensor_type(found["h"])
        if contract is None or h is None or h.dtype != "float32":
            return None
        if found["dims"] not in ([-1], [len(h.shape) - 1]):
            return None
        return Raised(
            canonical.GROUP_QUANT, contract, [torch_ir.uncast(found["h"])], [op.result, found["scale"]]
        )


def _contract(found: Bindings, q: torch_ir.TensorType) -> Quantization | None:
    """What was written, or None where its constants do not fit together."""
    largest = LARGEST_FINITE[q.dtype]
    limit = found["high"]
    if q.shape[-1] is None or found["low"] != -limit or not 0 < limit <= largest:
        return None
    if "qmax" in found:
        division: Division = "true"
        agrees = found["qmax"] == limit
    else:
        division = "reciprocal"
        agrees = _float32(found["inverse_qmax"]) == _float32(1.0 / limit)
    if not agrees:
        return None
    return Quantization(
        group=q.shape[-1],
        dtype=q.dtype,
        amax_floor=float(found.get("floor", 0.0)),
        scale_division=division,
        quotient="reciprocal" if "inverse" in found else "true",
        limit=None if limit == largest else float(limit),
    )


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


class LoweringBlockScaledMatmul:
    """``torch.ops.lowering.block_scaled_matmul(a, b, a_scale, b_scale, out_dtype)``."""

    roots = ("torch.lowering.block_scaled_matmul",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        return Raised(canonical.BLOCK_SCALED_MATMUL, None, list(op.operands)[:4], list(op.results))


RECOGNISERS = (DecomposedGroupQuant(), LoweringBlockScaledMatmul())
