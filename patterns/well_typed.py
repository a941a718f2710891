"""Whether the tensors of a raised operation are those that its contract speaks of.

The last check before a spelling is replaced, and the same for every recogniser: shapes and dtypes must be
what the canonical operation computes with, whatever a recogniser looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import GatedActivation, Quantization, RmsNorm
from .recogniser import Raised, WithoutLastAxis
from .torch_ir import TensorType

FLOATS = ("float32", "bfloat16", "float16")

Types = Sequence[TensorType | None]


def is_well_typed(raised: Raised) -> bool:
    """Whether ``raised``, and what is nested in it, has the types that its contract speaks of."""
    operands = [_type_of(operand) for operand in raised.operands]
    results = [_type_of(result) for result in raised.results if result is not None]
    nested = (operand for operand in raised.operands if isinstance(operand, Raised))
    return _fits(raised, operands, results) and all(map(is_well_typed, nested))


def is_routing(types: Types) -> bool:
    """Whether these are gating [.., E], bias [E] and float32 weights [.., k], E and k known."""
    known = [type_ for type_ in types if type_ is not None]
    if len(known) != 3 or len(types) != 3:
        return False
    gating, bias, weights = known
    return (
        gating.dtype in FLOATS
        and bias.dtype in FLOATS
        and weights.dtype == "float32"
        and bias.shape == gating.shape[-1:] != (None,)
        and weights.shape[:-1] == gating.shape[:-1]
        and len(weights.shape) == len(gating.shape) > 0
        and weights.shape[-1] is not None
    )


def promoted(x: str, weight: str) -> str:
    """The dtype of a product of two tensors of these floats."""
    if weight == x:
        return x
    return "float64" if "float64" in (x, weight) else "float32"


def norm_dtype(norm: RmsNorm, x: TensorType, weight: TensorType | None) -> str:
    """The dtype of y."""
    if norm.rounding == "none":
        return "float32"
    factor = weight.dtype if weight is not None and not norm.weight_offset else "float32"
    return promoted(x.dtype, factor) if norm.rounding == "twice" and weight is not None else x.dtype


def _type_of(value: ir.Value | Raised | WithoutLastAxis | TensorType | None) -> TensorType | None:
    if isinstance(value, Raised):
        return _type_of(value.results[0])
    if isinstance(value, WithoutLastAxis):
        type_ = torch_ir.tensor_type(value.value)
        return type_ and TensorType((*type_.shape, 1), type_.dtype)
    return torch_ir.tensor_type(value) if isinstance(value, ir.Value) else value


def _fits(raised: Raised, operands: Types, results: Types) -> bool:
    contract = raised.contract
    if isinstance(contract, RmsNorm):
        return _is_norm(contract, operands, results)
    if isinstance(contract, GatedActivation):
        return _is_gate(contract, operands, results)
    if isinstance(contract, Quantization):
        return _is_quantization(contract, operands, results)
    return raised.op != canonical.GROUPED_TOPK or is_routing([*operands, results[0]])


def _is_norm(norm: RmsNorm, operands: Types, results: Types) -> bool:
    x, *rest = operands
    if x is None or not x.shape or x.dtype not in (*FLOATS, "float64"):
        return False
    if norm.residual is not None and (not rest or rest.pop(0) != x or results[1:] != [x]):
        return False
    weight = rest[0] if rest else None
    if rest and (weight is None or weight.shape != x.shape[-1:] or weight.dtype not in (*FLOATS, x.dtype)):
        return False
    return results[0] == TensorType(x.shape, norm_dtype(norm, x, weight))


def _is_gate(gate: GatedActivation, operands: Types, results: Types) -> bool:
    x, y = operands[0], results[0]
    if x is None or not x.shape or x.dtype not in FLOATS or any(other != x for other in operands):
        return False
    last = x.shape[-1]
    if gate.packed and (last is None or last % 2):
        return False
    shape = (*x.shape[:-1], last // 2) if gate.packed and last else x.shape
    return y == TensorType(shape, "float32" if gate.rounding == "none" else x.dtype)


def _is_quantization(quantization: Quantization, operands: Types, results: Types) -> bool:
    (x,) = operands
    if x is None or not x.shape or x.shape[-1] is None or x.dtype not in FLOATS:
        return False
    return tuple(results) == canonical.quantized_types(x, quantization)
