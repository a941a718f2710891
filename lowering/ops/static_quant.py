"""``torch.ops.lowering.static_quant``: rows in 8 bits, by a scale that is given."""

from __future__ import annotations

import torch
from torch import Tensor

from patterns.contracts import LARGEST_FINITE, Quantization, static_quantization

from .checks import (
    FLOAT_DTYPES,
    QUANTIZED_DTYPES,
    check_choice,
    check_dtype,
    check_rank,
    dtype_name,
    dtype_names,
)
from .group_quant import QUOTIENTS, static_quant_reference


@torch.library.custom_op(
    "lowering::static_quant",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor scale, *, ScalarType dtype=float8_e4m3fn, str quotient='true', "
        "float? limit=None, float? lowest=None) -> Tensor"
    ),
)
def static_quant(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    quotient: str = "true",
    limit: float | None = None,
    lowest: float | None = None,
) -> Tensor:
    """Quantize by one scale that is given: q = round(clamp(x / scale, -448, 448)) in float32.

    x: [..., K] float32, bfloat16 or float16; scale: one float32, of any number of axes.  Returns q [..., K]
    in ``dtype``, rounded to nearest even.  A NaN stays one; an int8 of NaN is 0.

    dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8; values are clamped to its largest finite
    value, or ``limit`` where that is given, of either sign, or down to ``lowest`` (-128 for all of int8).
    quotient: ``true``, ``reciprocal`` for x * (1/scale), or ``inverse`` for x * scale, where what is given is
    1 over the scale.

    Raises ValueError naming the argument that does not fit.
    Source: compressed-tensors and ModelOpt (true), vLLM (reciprocal), Transformer Engine (inverse).
    """
    return static_quant_reference(x, scale, _quantization(x, scale, dtype, quotient, limit, lowest))


@static_quant.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    quotient: str = "true",
    limit: float | None = None,
    lowest: float | None = None,
) -> Tensor:
    _quantization(x, scale, dtype, quotient, limit, lowest)
    return x.new_empty(x.shape, dtype=dtype)


def _quantization(
    x: Tensor, scale: Tensor, dtype: torch.dtype, quotient: str, limit: float | None, lowest: float | None
) -> Quantization:
    """The contract these arguments ask for, after checking all of them."""
    check_dtype("x", x, FLOAT_DTYPES)
    check_rank("x", x, 1)
    check_dtype("scale", scale, (torch.float32,))
    if scale.numel() != 1:
        raise ValueError(f"scale: expected one number for all of x, got {list(scale.shape)}")
    if dtype not in QUANTIZED_DTYPES:
        raise ValueError(
            f"dtype: {dtype_name(dtype)} is not available; choose {dtype_names(QUANTIZED_DTYPES)}"
        )
    check_choice("quotient", quotient, QUOTIENTS)
    name = dtype_name(dtype)
    largest = LARGEST_FINITE[name]
    if limit is not None and not 0 < limit <= largest:
        raise ValueError(
            f"limit: expected a number above 0, at most the {largest:g} of {name}, got {limit:g}"
        )
    smallest = -128.0 if name == "int8" else -largest
    if lowest is not None and not smallest <= lowest < 0:
        raise ValueError(
            f"lowest: expected a number below 0, at least the {smallest:g} of {name}, got {lowest:g}"
        )
    return static_quantization(name, quotient, limit, lowest)  # pyright: ignore[reportArgumentType]
