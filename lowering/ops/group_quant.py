"""``torch.ops.lowering.group_quant``: rows in 8 bits, with a scale for each group of elements.

Like everything in ``ops``: the plain functions are the definition, in aten operations that torch.export can
trace.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from patterns.contracts import LARGEST_FINITE, Division, Quantization, Quotient, ScaleEncoding

from .checks import (
    FLOAT_DTYPES,
    QUANTIZED_DTYPES,
    check_choice,
    check_dtype,
    check_rank,
    dtype_name,
    dtype_names,
)
from .scalars import float32
from .scale_layouts import (
    check_layout,
    column_geometry,
    from_physical,
    pack_exponents,
    packed_words,
    to_physical,
)

SCALE_ENCODINGS: tuple[ScaleEncoding, ...] = get_args(ScaleEncoding)
DIVISIONS: tuple[Division, ...] = get_args(Division)
QUOTIENTS: tuple[Quotient, ...] = get_args(Quotient)
WHOLE_ROW = 0


def group_quant_reference(y: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Quantize groups of the last axis, as ``quantization`` says.

    y: [..., K]; K divisible by the group.  Returns q [..., K] in ``quantization.dtype`` and the scale
    with the strides of ``quantization.layout``: float32 [..., Gn], or int32 [..., ceil(Gn/4)] for
    ``ue8m0_packed``.  The conversion rounds to nearest even.

    A group that holds a NaN becomes NaN, scale and values; an int8 of NaN is 0, a packed byte of NaN 255.

    Source: vLLM's per_token_group_quant_fp8 and its fused kernels, AITER, FlashInfer, DeepGEMM.
    """
    q, scale = group_quant_contiguous_reference(y, quantization)
    if quantization.layout == "row":
        return q, scale
    return q, from_physical(to_physical(scale, quantization.layout), y.shape[:-1], quantization.layout)


def group_quant_physical_reference(y: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """``group_quant_reference``, but the scale as it lies in memory: see ``to_physical``.

    This is the form a program returns, since a program's tensors have no strides.
    """
    q, scale = group_quant_contiguous_reference(y, quantization)
    return q, to_physical(scale, quantization.layout)


def group_quant_contiguous_reference(y: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """``group_quant_reference``, but the scale too is contiguous in its logical shape.

    This is what a program computes with where nothing outside it sees the scale.
    """
    hidden, qmax = y.shape[-1], quantization.qmax
    group = hidden if quantization.group is None else quantization.group
    blocks = y.to(torch.float32).unflatten(-1, (quantization.groups(hidden), group))
    amax = _bounded(blocks.abs().amax(dim=-1), quantization)
    scale = _scale(amax, quantization)
    if quantization.scale == "ue8m0":
        scale = _power_of_two_above(scale, infinite=quantization.infinite)
    divisor = amax if quantization.quotient == "inverse" else scale
    values = _quotient(blocks, divisor.unsqueeze(-1), quantization)
    q = _convert(_clip(values, -qmax, qmax), quantization.dtype)
    stored = pack_exponents(scale) if quantization.layout == "ue8m0_packed" else scale
    return q.flatten(-2).contiguous(), stored.contiguous()


def static_quant_reference(y: Tensor, scale: Tensor, quantization: Quantization) -> Tensor:
    """Quantize by a scale that is given, as ``quantization``, which is static, says.

    y: [..., K]; scale: one float32.  Returns q [..., K] in ``quantization.dtype``.  An int8 of NaN is 0.

    Source: compressed-tensors (true), vLLM's static_scaled_fp8_quant (reciprocal), Transformer Engine
    (inverse).
    """
    x, scale = y.to(torch.float32), scale.reshape(())
    if quantization.quotient == "true":
        values = x / scale
    else:
        values = x * (scale if quantization.quotient == "inverse" else torch.reciprocal(scale))
    return _convert(_clip(values, quantization.least, quantization.qmax), quantization.dtype).contiguous()


def _bounded(amax: Tensor, quantization: Quantization) -> Tensor:
    amax = _at_least(amax, quantization.amax_floor)
    return amax if quantization.amax_ceiling is None else _at_most(amax, quantization.amax_ceiling)


def _scale(amax: Tensor, quantization: Quantization) -> Tensor:
    """float32 scales, before they are rounded to powers of two if they are."""
    if quantization.scale_division == "true":
        scale = amax / _qmax(amax, quantization)
    elif quantization.scale_division == "inverse":
        scale = torch.reciprocal(_inverse(amax, quantization))
    else:
        scale = amax * float32(1 / quantization.qmax)
    return _at_least(scale, quantization.scale_floor) if quantization.scale_floor else scale


def _qmax(like: Tensor, quantization: Quantization) -> Tensor:
    # A tensor, not a Python number: CUDA turns division by a number into a product with 1/number.
    return torch.full((), quantization.qmax, dtype=torch.float32, device=like.device)


def _inverse(amax: Tensor, quantization: Quantization) -> Tensor:
    """The inverse of a scale, from the largest magnitude itself."""
    if quantization.inverse == "true":
        return _qmax(amax, quantization) / amax
    return torch.reciprocal(amax) * float32(quantization.qmax)


def _quotient(blocks: Tensor, scale: Tensor, quantization: Quantization) -> Tensor:
    """Divide ``blocks`` by ``scale``, which is the largest magnitude where the quotient is by its inverse."""
    if quantization.quotient == "inverse":
        return blocks * _inverse(scale, quantization)
    # By a power of two the two are equal, but 1/2^127 is a subnormal, zero on some devices.
    if quantization.quotient == "true" or quantization.scale == "ue8m0":
        return blocks / scale
    return blocks * torch.reciprocal(scale)


def _power_of_two_above(scale: Tensor, *, infinite: bool) -> Tensor:
    """The least power of two that is not below; NaN stays NaN.

    Its biased exponent is kept in [1, 254]; up to 255, infinity, where the scale may be ``infinite``.

    From the bits, since log2 of a float is off by one unit here and there, and its ceiling then by one
    power of two.  Source: DeepGEMM's ceil_to_ue8m0.
    """
    bits = scale.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    exponent = (exponent + (mantissa != 0).to(torch.int32)).clamp(1, 255 if infinite else 254)
    return torch.where(scale.isnan(), scale, (exponent << 23).view(torch.float32))


def _convert(values: Tensor, dtype: str) -> Tensor:
    """Values that fit, rounded to nearest even."""
    if dtype == "int8":
        values = torch.where(values.isnan(), 0.0, torch.round(values))
    return values.to(getattr(torch, dtype))


# Bounds that let a NaN through.  Not clamp: IREE's lowering of it takes the bound for a NaN.


def _at_least(x: Tensor, bound: float) -> Tensor:
    bound = float32(bound)
    return torch.where(x < bound, bound, x)


def _at_most(x: Tensor, bound: float) -> Tensor:
    bound = float32(bound)
    return torch.where(x > bound, bound, x)


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    return _at_most(_at_least(x, low), high)


@torch.library.custom_op(
    "lowering::group_quant",
    mutates_args=(),
    schema=(
        "(Tensor x, int group_size, *, ScalarType dtype=float8_e4m3fn, str scale='float32', "
        "str scale_layout='row', float amax_floor=1e-10, float? amax_ceiling=None, float scale_floor=0.0, "
        "str scale_division='true', str quotient='true', float? limit=None, bool infinite=False, "
        "str inverse='true') -> (Tensor, Tensor)"
    ),
)
def group_quant(
    x: Tensor,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: str = "float32",
    scale_layout: str = "row",
    amax_floor: float = 1e-10,
    amax_ceiling: float | None = None,
    scale_floor: float = 0.0,
    scale_division: str = "true",
    quotient: str = "true",
    limit: float | None = None,
    infinite: bool = False,
    inverse: str = "true",
) -> tuple[Tensor, Tensor]:
    """Quantize every ``group_size`` elements of the last axis with one scale; 0: the whole row.

    x: [..., K] float32, bfloat16 or float16, K divisible by group_size.  By default, per group
    amax = max(max|x|, 1e-10), scale = amax / 448, q = round(clamp(x / scale)): true divisions,
    round to nearest even.  Returns q [..., K] in ``dtype`` and scale float32 [..., Gn], Gn = K/group_size.

    dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8; qmax is its largest finite value, or ``limit``
    where that is given (vLLM has 224 for e4m3fnuz).
    scale ``ue8m0``: scales are powers of two, rounded up, at most 2^127; of a group with an infinity infinite
    if ``infinite``.
    scale_layout ``row``: scale is contiguous.  The others are column-major; with the leading dimensions
    flattened to M, ``column`` has strides (1, M), ``column_tma`` (1, Mp), Mp = M rounded up to 4, and
    ``ue8m0_packed`` (for scale ``ue8m0`` in groups) is int32 [..., ceil(Gn/4)] with strides (1, Mp), four
    biased exponents in each, the first in the lowest byte.  Pad rows and bytes are zero.
    amax_floor, amax_ceiling (fp8 only), scale_floor: bounds of amax and of scale = amax / qmax.
    scale_division, quotient: ``true``, or ``reciprocal`` for amax * (1/qmax) and x * (1/scale), or
    ``inverse`` for 1/s and x * s of s = qmax/amax, or qmax * (1/amax) where ``inverse`` is ``reciprocal``.

    Raises ValueError naming the argument that does not fit, or that contradicts another.
    Source: vLLM per_token_group_quant_fp8; DeepGEMM for column_tma and ue8m0_packed.
    """
    contract = _quantization(
        x,
        group_size,
        dtype=dtype,
        scale=scale,
        scale_layout=scale_layout,
        amax_floor=amax_floor,
        amax_ceiling=amax_ceiling,
        scale_floor=scale_floor,
        scale_division=scale_division,
        quotient=quotient,
        limit=limit,
        infinite=infinite,
        inverse=inverse,
    )
    return group_quant_reference(x, contract)


@group_quant.register_fake
def _(x: Tensor, group_size: int, **scheme: Any) -> tuple[Tensor, Tensor]:
    contract = _quantization(x, group_size, **scheme)
    q = x.new_empty(x.shape, dtype=getattr(torch, contract.dtype))
    leading, last = tuple(x.shape[:-1]), contract.groups(x.shape[-1])
    if contract.layout == "row":
        return q, x.new_empty((*leading, last), dtype=torch.float32)
    packed = contract.layout == "ue8m0_packed"
    geometry = column_geometry(leading, packed_words(last) if packed else last, contract.layout)
    return q, x.new_empty_strided(*geometry, dtype=torch.int32 if packed else torch.float32)


def _quantization(
    x: Tensor,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: str = "float32",
    scale_layout: str = "row",
    **numbers: Any,
) -> Quantization:
    """The contract these arguments ask for, after checking all of them."""
    check_dtype("x", x, FLOAT_DTYPES)
    check_rank("x", x, 1)
    _check_group("x", x, group_size)
    if dtype not in QUANTIZED_DTYPES:
        raise ValueError(
            f"dtype: {dtype_name(dtype)} is not available; choose {dtype_names(QUANTIZED_DTYPES)}"
        )
    check_choice("scale", scale, SCALE_ENCODINGS)
    quantization = Quantization(
        group=None if group_size == WHOLE_ROW else group_size,
        dtype=dtype_name(dtype),
        scale=scale,  # pyright: ignore[reportArgumentType]
        layout=check_layout(scale_layout),
        **numbers,
    )
    _check_bounds(quantization)
    check_choice("scale_division", quantization.scale_division, QUOTIENTS)
    check_choice("quotient", quantization.quotient, QUOTIENTS)
    check_choice("inverse", quantization.inverse, DIVISIONS)
    _check_inverse(quantization)
    if quantization.infinite and (quantization.scale != "ue8m0" or quantization.layout == "ue8m0_packed"):
        raise ValueError("infinite: is for scale 'ue8m0' in float32, of which 2^127 is the largest otherwise")
    if quantization.layout == "ue8m0_packed":
        if quantization.scale != "ue8m0":
            raise ValueError(f"scale: scale_layout 'ue8m0_packed' holds 'ue8m0' alone, not {scale!r}")
        if quantization.group is None:
            raise ValueError("group_size: scale_layout 'ue8m0_packed' holds groups, not whole rows (0)")
    return quantization


def _check_inverse(quantization: Quantization) -> None:
    """Check that an inverse scale goes with what else there is."""
    if quantization.inverts and quantization.scale != "float32":
        raise ValueError(f"scale: {quantization.scale!r} has no inverse that is computed before it")
    if quantization.inverts and quantization.scale_floor:
        raise ValueError("scale_floor: bounds no scale whose inverse is computed first; bound amax instead")
    if quantization.inverse != "true" and not quantization.inverts:
        raise ValueError(
            "inverse: says how 1/scale is computed where scale_division or quotient is 'inverse'"
        )


def _check_bounds(quantization: Quantization) -> None:
    """Check that every number can bound what it is there to bound."""
    for name in ("amax_floor", "scale_floor"):
        value = getattr(quantization, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    floor, ceiling = quantization.amax_floor, quantization.amax_ceiling
    if ceiling is not None:
        if quantization.dtype == "int8":
            raise ValueError("amax_ceiling: bounds fp8 scales alone, and dtype is int8")
        if not (0 < ceiling < math.inf and floor <= ceiling):
            least = f"at least amax_floor, {floor}" if floor else "above 0"
            raise ValueError(f"amax_ceiling: expected a number {least}, got {ceiling}")
    largest = LARGEST_FINITE[quantization.dtype]
    if quantization.limit is not None and not 0 < quantization.limit <= largest:
        raise ValueError(
            f"limit: expected a number above 0, at most the {largest:g} of {quantization.dtype}, "
            f"got {quantization.limit:g}"
        )


def _check_group(name: str, tensor: Tensor, group: int) -> None:
    if group < 0:
        raise ValueError(f"group_size: expected a positive number, or 0 for the whole row, got {group}")
    last = tensor.shape[-1]
    if group == WHOLE_ROW:
        if last == 0:
            raise ValueError(f"{name}: the last axis is empty")
    elif last == 0 or last % group != 0:
        raise ValueError(f"{name}: group {group} does not divide the last axis, {last}")
