"""Find what looks like a quantization and is none that a kernel computes, and say why not.

What gives one away is a cast to eight bits of a product or quotient.
"""

from __future__ import annotations

from collections.abc import Iterator

from iree.compiler import ir

from . import group_quant, torch_ir, views, weight_layouts
from .contracts import LARGEST_FINITE
from .match import reduced_axes
from .near_norms import BOUNDS, CAST, FACTORS, RESHAPES, SPREAD, SUMS, short
from .recogniser import NearMiss

_LARGEST = tuple(
    f"torch.aten.{name}" for name in ("amax", "max.dim", "max", "linalg_vector_norm", "aminmax", "amin")
)
_ROUNDS = (group_quant.ROUND, "torch.aten.floor", "torch.aten.ceil", "torch.aten.trunc")
# What may lie between a quotient and the cast of it.
_QUOTIENTS = (*FACTORS, "torch.aten.div.Tensor_mode")
_STORES = (*BOUNDS, *RESHAPES, *SUMS, *_ROUNDS, CAST, "torch.aten.where.self", "torch.aten.nan_to_num")
_IN_A_SCALE = (*FACTORS, *BOUNDS, *RESHAPES, CAST, *_ROUNDS, "torch.aten.reciprocal")


class UnmatchedQuantization:
    """A cast to eight bits of a quotient that is no group quantization."""

    roots = (CAST,)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        source, codes = torch_ir.dtype_of(op.operands[0]), torch_ir.tensor_type(op.result)
        if codes is None or codes.dtype not in (*LARGEST_FINITE, "uint8") or "float" not in (source or ""):
            return None
        if codes.shape[-1:] == (1,):
            return None  # one number for each row: a scale, or a zero point
        path = _path_to_quotient(op.operands[0])
        if path is None:
            return None
        *stored, quotient = path
        if not _is_scaled(codes.dtype, stored, quotient):
            return None
        return NearMiss("group_quant", _why_no_quantization(op.result, stored, quotient))


def _is_scaled(dtype: str, stored: list[ir.Operation], quotient: ir.Operation) -> bool:
    """Tell whether the cast of ``quotient`` is a quantization, not one of some product to whole numbers."""
    if dtype not in ("int8", "uint8"):
        return not any(op.name in SUMS for op in stored)
    bounded = any(op.name in (*BOUNDS, *_ROUNDS) for op in stored)
    # A picture's values are multiplied by 255 and cast.
    by_number = quotient.name in ("torch.aten.div.Scalar", "torch.aten.mul.Scalar")
    is_scale = dtype == "int8" or not by_number or _path_to_largest(list(quotient.operands)) is not None
    return bounded and is_scale


def _path_to_quotient(value: ir.Value) -> list[ir.Operation] | None:
    """The operations from ``value`` up to a product or quotient, whose elements become those of ``value``."""
    op = torch_ir.producer(value)
    if op is None or op.name not in (*_STORES, *_QUOTIENTS):
        return None
    if op.name in _QUOTIENTS:
        return [op]
    # Zero points are made of quotients too, but have fewer elements.
    whole = [operand for operand in op.operands if _is_whole(operand, op)]
    for operand in whole:
        above = _path_to_quotient(operand)
        if above is not None:
            return [op, *above]
    return None


def _is_whole(operand: ir.Value, op: ir.Operation) -> bool:
    type_, result = torch_ir.tensor_type(operand), torch_ir.tensor_type(op.results[0])
    if type_ is None or result is None or torch_ir.constant(operand) is not torch_ir.NOT_CONSTANT:
        return False
    return op.name in RESHAPES or type_.shape == result.shape


def _why_no_quantization(q: ir.Value, stored: list[ir.Operation], quotient: ir.Operation) -> str:
    found = group_quant.written_out(q)
    contract = group_quant.read_contract(found, q) if found is not None else None
    if isinstance(contract, str):
        return contract
    by_given = group_quant.by_given_scale(q)
    static = group_quant.read_static_contract(by_given, q) if by_given is not None else None
    if isinstance(static, str):
        return static
    why = next(_why_not_stored(q, stored, quotient), None)
    if why is not None:
        return why
    if contract is not None:
        return f"it has other scales than one float32 for each row or group of values of {contract.dtype}"
    path = _path_to_largest(list(quotient.operands)[::-1])
    if path is not None:
        return _why_no_scale(path[:-1], path[-1], quotient)
    narrow = torch_ir.dtype_of(quotient.result)
    if narrow != "float32":
        return f"the quotient is taken in {narrow}; widen the tensor with .float() before"
    return (
        f"its scale, {_given(quotient)}, is not computed from the largest magnitude of a row or group of "
        "its values; one that is given must be a tensor that holds one float32, for all rows"
    )


def _why_not_stored(q: ir.Value, stored: list[ir.Operation], quotient: ir.Operation) -> Iterator[str]:
    """Say what is wrong with how the values are made of the scale, and stored."""
    if any(op.name in SUMS for op in stored):
        yield "it has a zero point (something is added before the cast); kernels quantize symmetrically"
    if torch_ir.dtype_of(q) not in LARGEST_FINITE:
        yield f"its values are {torch_ir.dtype_of(q)}; kernels write {', '.join(LARGEST_FINITE)}"
    if quotient.name not in FACTORS:
        yield "its quotient is rounded towards a whole number (rounding_mode); kernels round to the nearest"
    given = torch_ir.dtype_of(quotient.operands[0])
    if "float" not in (given or ""):
        yield f"it quantizes {given}; kernels quantize floats"


def _given(quotient: ir.Operation) -> str:
    """Say what the scale of ``quotient`` is, where no row gives it."""
    scale = quotient.operands[1]
    if torch_ir.constant(scale) is not torch_ir.NOT_CONSTANT:
        return f"the constant {torch_ir.constant(scale):g}"
    names = weight_layouts.names(scale)
    return f"of the parameter {' and '.join(map(repr, names))}" if names else str(torch_ir.tensor_type(scale))


def _why_no_scale(path: list[ir.Operation], largest: ir.Operation, quotient: ir.Operation) -> str:
    """Say what is wrong with a scale computed along ``path`` from the reduction ``largest``."""
    dtype = torch_ir.dtype_of(quotient.result)
    if dtype != "float32":
        return f"the quotient is taken in {dtype}; widen the tensor with .float() before"
    x = torch_ir.widened_from(quotient.operands[0])
    return next(_objections(path, largest, x), None) or (
        _why_spread(path, largest, quotient)
        or "its scale is not the largest magnitude over one constant within constant bounds"
    )


def _objections(path: list[ir.Operation], largest: ir.Operation, x: ir.Value) -> Iterator[str]:
    if largest.name == "torch.aten.max":
        yield "it has one scale for the whole tensor; kernels have one for each row or group of it"
    narrow = (op for op in path if op.name in (*FACTORS, *BOUNDS))
    dtype = next((d for op in narrow if (d := torch_ir.dtype_of(op.result)) != "float32"), None)
    if dtype is not None:
        yield f"its scale is computed in {dtype}; widen the largest magnitude with .float() first"
    rounded = (d for op in path if op.name == CAST and (d := torch_ir.dtype_of(op.result)) != "float32")
    if dtype := next(rounded, None):
        yield f"its scale is rounded to {dtype}; divide by it as it is, in float32"
    other = next((op for op in path if op.name not in _IN_A_SCALE), None)
    if other is not None:
        yield (
            f"{short(other)} is part of its scale, which must be the largest magnitude over a constant, "
            "within constant bounds, or that rounded up to a power of two"
        )
    source, type_ = _past_views(largest.operands[0]), torch_ir.tensor_type(largest.operands[0])
    magnitude = source is not None and source.name == "torch.aten.abs"
    if not magnitude and largest.name != "torch.aten.linalg_vector_norm":
        yield "its scale is made of the largest value; take the largest magnitude, x.abs().amax(...)"
    axes = reduced_axes(largest)
    if type_ is not None and axes != [len(type_.shape) - 1]:
        yield f"the largest magnitude is taken over axes {axes}; the groups of a kernel lie in the last one"
    of = source.operands[0] if source is not None and magnitude else largest.operands[0]
    if torch_ir.widened_from(of) != x:
        yield "its scale is the largest magnitude of another tensor, or of another view, than it divides"


def _past_views(value: ir.Value) -> ir.Operation | None:
    """Find the operation that makes what ``value`` is a view of."""
    op = torch_ir.producer(value)
    while op is not None and views.is_view(op):
        op = torch_ir.producer(op.operands[0])
    return op


def _why_spread(path: list[ir.Operation], largest: ir.Operation, quotient: ir.Operation) -> str | None:
    """Tell whether the scale is spread along another axis than its largest magnitude was taken over."""
    scale, result = torch_ir.tensor_type(quotient.operands[1]), torch_ir.tensor_type(quotient.result)
    kept = torch_ir.tensor_type(largest.results[0])
    if scale is None or result is None or kept is None:
        return None
    one_a_row = scale.shape[-1:] == (1,) and len(scale.shape) == len(result.shape)
    moved = any(op.name in RESHAPES and torch_ir.tensor_type(op.result) != scale for op in path)
    if one_a_row and not moved:
        return None
    return f"its scale {SPREAD}"


def _path_to_largest(values: list[ir.Value], depth: int = 16) -> list[ir.Operation] | None:
    """The operations from one of ``values`` up to the reduction that it was computed from."""
    for value in values:
        op = torch_ir.producer(value)
        if op is None or depth == 0:
            continue
        if op.name in _LARGEST:
            return [op]
        above = _path_to_largest(list(op.operands), depth - 1)
        if above is not None:
            return [op, *above]
    return None


SUSPICIONS = (UnmatchedQuantization(),)
