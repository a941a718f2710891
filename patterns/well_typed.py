"""Check the types of operands and results that each operation speaks of.

What a recogniser raised is checked by these before it replaces anything, whatever the recogniser looked at;
and every operation again after each step (``operation.Operation.verify``).
"""

from __future__ import annotations

from collections.abc import Sequence

from .canonical import quantized_types
from .contracts import BlockScaledMatmul, GatedActivation, GroupedTopk, Norm, Quantization
from .torch_ir import TensorType

FLOATS = ("float32", "bfloat16", "float16")

Types = Sequence["TensorType | None"]


def why_no_norm(norm: Norm, operands: Types, results: Types) -> str | None:
    """x, [gate], [residual], [weight], [bias] -> y, [sum]."""
    x, *rest = operands or (None,)
    if x is None or not x.shape or x.dtype not in (*FLOATS, "float64"):
        return f"its x is {x}"
    gate = rest.pop(0) if rest and norm.gate is not None else None
    if norm.gate is not None and gate not in (x, *_narrower(x)):
        return f"its gate is {gate}, and x {x}"
    if norm.residual is not None and (not rest or rest.pop(0) != x):
        return f"its residual is no {x}"
    if norm.dtype is not None and (norm.rounding != "once" or _with_dtype(x, norm.dtype) not in _narrower(x)):
        return f"its {x} is not rounded once to {norm.dtype}"
    if norm.group is not None and (x.shape[-1] is None or x.shape[-1] % norm.group):
        return f"it norms groups of {norm.group} of {x}"
    vectors = len(rest) - (norm.bias is not None)
    if list(results[1:]) != [x] * (norm.residual is not None) or vectors not in (0, 1):
        return f"it takes {_listed(operands)} to {_listed(results)}"
    for vector in rest:
        if vector is None or vector.shape != x.shape[-1:] or vector.dtype not in (*FLOATS, x.dtype):
            return f"its weight or bias is {vector}, and x {x}"
    weight, bias = rest[0] if vectors else None, rest[-1] if norm.bias is not None else None
    y = TensorType(x.shape, norm_dtype(norm, x, weight, bias))
    return None if results[0] == y else f"its y is {results[0]}, and not {y}"


def norm_dtype(norm: Norm, x: TensorType, weight: TensorType | None, bias: TensorType | None = None) -> str:
    """The dtype of y."""
    if norm.rounding == "none":
        return "float32"
    dtype = norm.dtype or x.dtype
    if norm.rounding == "twice" and weight is not None:
        dtype = promoted(dtype, "float32" if norm.weight_offset else weight.dtype)
    return promoted(dtype, bias.dtype) if norm.rounding == "twice" and bias is not None else dtype


def _with_dtype(type_: TensorType, dtype: str) -> TensorType:
    return TensorType(type_.shape, dtype)


def _narrower(x: TensorType) -> tuple[TensorType, ...]:
    """The types of 16 bits that a tensor may have which is widened to the float32 ``x``."""
    return tuple(_with_dtype(x, dtype) for dtype in ("bfloat16", "float16") if x.dtype == "float32")


def promoted(x: str, weight: str) -> str:
    """The dtype of a product of two tensors of these floats."""
    if weight == x:
        return x
    return "float64" if "float64" in (x, weight) else "float32"


def why_no_gate(gate: GatedActivation, operands: Types, results: Types) -> str | None:
    """gate_up (packed) or gate, up -> y."""
    if len(operands) != (1 if gate.packed else 2) or len(results) != 1:
        return f"a gated activation has {'one operand' if gate.packed else 'two operands'} and one result"
    x = operands[0]
    if x is None or not x.shape or x.dtype not in FLOATS or any(other != x for other in operands):
        return f"its operands are {' and '.join(map(str, operands))}"
    last = x.shape[-1]
    if gate.packed and (last is None or last % 2):
        return f"its rows of {last} elements are no gate and up"
    shape = (*x.shape[:-1], last // 2) if gate.packed and last else x.shape
    y = TensorType(shape, "float32" if gate.rounding == "none" else x.dtype)
    return None if results[0] == y else f"its y is {results[0]}, and not {y}"


def why_no_quantization(quantization: Quantization, operands: Types, results: Types) -> str | None:
    """x -> q, scale, or of a given scale x, scale -> q."""
    static = quantization.static
    if (len(operands), len(results)) != ((2, 1) if static else (1, 2)):
        return f"it takes {_listed(operands)} to {_listed(results)}"
    x = operands[0]
    if static and not is_given_scale(operands[1]):
        return f"its scale is {operands[1]}, and not one float32"
    if x is None or not x.shape or x.shape[-1] is None or x.dtype not in FLOATS:
        return f"its x is {x}"
    made = quantized_types(x, quantization)
    return None if tuple(results) == made else f"its results are {_listed(results)}, and not {_listed(made)}"


def is_given_scale(type_: TensorType | None) -> bool:
    """Tell whether a tensor of that type may be the scale of all rows: one float32."""
    return type_ is not None and type_.dtype == "float32" and set(type_.shape) <= {1}


def why_no_routing(routing: GroupedTopk, operands: Types, results: Types) -> str | None:
    """gating, [bias] -> weights, ids."""
    if len(results) != 2 or not is_routing((*operands, results[0])):
        return f"it takes {_listed(operands)} to {_listed(results)}"
    weights, ids = results
    if ids is None or weights is None or ids.shape != weights.shape or weights.shape[-1] != routing.topk:
        return f"its results are {_listed(results)}, of {routing.topk} experts"
    return None


def is_routing(types: Types) -> bool:
    """Tell whether these are gating [.., E], perhaps a bias [E], and weights [.., k], E and k known."""
    known = [type_ for type_ in types if type_ is not None]
    if len(known) != len(types) or not 2 <= len(known) <= 3:
        return False
    gating, *bias, weights = known
    return (
        all(type_.dtype in FLOATS for type_ in known)
        and gating.shape[-1:] != (None,)
        and all(type_.shape == gating.shape[-1:] for type_ in bias)
        and weights.shape[:-1] == gating.shape[:-1]
        and len(weights.shape) == len(gating.shape) > 0
        and weights.shape[-1] is not None
    )


def why_no_product(product: BlockScaledMatmul, operands: Types, results: Types) -> str | None:
    """a, b, a_scale, b_scale, [bias] -> out; sizes are compared where the product gets its kernel."""
    if not 4 <= len(operands) <= 5 or len(results) != 1:
        return "a product has four tensors as operands, or five, and one result"
    types = [type_ for type_ in (*operands, *results) if type_ is not None]
    codes, scales, out = types[:2], types[2:4], types[-1]
    fits = (
        len(types) == len(operands) + 1
        and (all(c.dtype.startswith("float8") for c in codes) or all(c.dtype == "int8" for c in codes))
        and all(type_.dtype == "float32" for type_ in scales)
        and out.dtype in FLOATS
    )
    return None if fits else f"it takes {_listed(operands)} to {_listed(results)}"


def _listed(types: Types) -> str:
    return ", ".join(map(str, types))
