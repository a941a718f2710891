"""``torch.ops.lowering.block_scaled_matmul``: the product of two matrices of 8-bit codes that have scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patterns.contracts import BiasRounding, WeightLayout, scale_kind, scale_rows

from .checks import (
    FLOAT_DTYPES,
    FP8_DTYPES,
    QUANTIZED_DTYPES,
    check_dtype,
    check_rank,
    check_shape,
    dtype_name,
    dtype_names,
    shape_text,
)
from .shuffle_weight import check_stored, unshuffle_weight_reference


def block_scaled_matmul_reference(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    b_layout: WeightLayout = "row",
    bias_rounding: BiasRounding = "once",
) -> Tensor:
    """a . b^T with the scales applied, bias added, one rounding to ``out_dtype`` at the end.

    Arguments as for ``block_scaled_matmul``; with a ``bias_rounding`` of ``twice`` the product is rounded
    before the bias is added as well.  The sum over float8 is one of float32; its order, and whether a
    scale multiplies the factors or a group's partial sum, is free: compare with a tolerance.

    Source: DeepGEMM fp8_gemm_nt, vLLM w8a8_block_fp8_matmul; of whole rows CUTLASS's scaled_mm in vLLM.
    """
    b = unshuffle_weight_reference(b, b_layout)
    groups = a_scale.shape[-1]
    if groups == 1:
        product = _whole(a, b) * a_scale * _of_each_row(b_scale, b).t()
    else:
        rows = a.to(torch.float32).unflatten(-1, (groups, -1)) * a_scale.unsqueeze(-1)
        columns = b.to(torch.float32).unflatten(-1, (groups, -1)) * _of_each_row(b_scale, b).unsqueeze(-1)
        product = torch.matmul(rows.flatten(-2), columns.flatten(-2).t())
    if bias is not None and bias_rounding == "twice":
        return product.to(out_dtype) + bias
    return (product if bias is None else product + bias.to(torch.float32)).to(out_dtype)


def _whole(a: Tensor, b: Tensor) -> Tensor:
    """The product of the codes in float32; of int8 the exact one, rounded."""
    if a.dtype == torch.int8:
        # PyTorch multiplies int32 on the CPU alone; float64 holds the sums of any depth.
        exact = torch.int32 if a.device.type == "cpu" else torch.float64
        return torch.matmul(a.to(exact), b.to(exact).t()).to(torch.float32)
    return torch.matmul(a.to(torch.float32), b.to(torch.float32).t())


def _of_each_row(b_scale: Tensor, b: Tensor) -> Tensor:
    """The scales of each row of b, from those of blocks, of rows or of all."""
    rows, depth = b.shape
    if scale_kind(tuple(b_scale.shape), rows, depth) == "blocks":
        group = depth // b_scale.shape[1]
        return b_scale.unsqueeze(1).expand(-1, group, -1).flatten(0, 1)[:rows]
    return b_scale


@torch.library.custom_op(
    "lowering::block_scaled_matmul",
    mutates_args=(),
    schema=(
        "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, "
        "Tensor? bias=None, *, str b_layout='row') -> Tensor"
    ),
)
def block_scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    b_layout: str = "row",
) -> Tensor:
    """out[..., n] = sum over groups g of (a_g . b_g[n]) * a_scale[..., g] * b_scale[n, g] + bias[n].

    a: [..., K], b: [N, K] (a row is an output feature), both of fp8 or both int8.  a_scale: float32
    [..., K/G] of any strides, or [1], one for all of a; G = K / a_scale.shape[-1].  b_scale: float32
    [R, K/G], where R is N, or ceil(N/G), of which n reads row n // G; or [1, 1].  So [..., 1] and [N, 1] are
    scales of tokens and of channels.  int8 has one scale in a row at most: the sum is exact, rounded to
    float32, multiplied by the scale of a and then by that of b.  bias: [N] in ``out_dtype``, or None.
    b_layout: how the bytes of b lie, as ``shuffle_weight`` returns them; N is then its padded number
    of rows.  A weight is best given in ``row``: the compiler finds the layout for its target.
    Returns [..., N] in ``out_dtype`` (float32, bfloat16, float16), accumulated in float32, the bias added
    there, and rounded once; the order of accumulation is free.
    Raises ValueError naming the argument that does not fit.
    Source: DeepGEMM, vLLM (block-scaled fp8 GEMM, 1xG by GxG); vLLM cutlass_scaled_mm, torch._scaled_mm
    (row-wise).
    """
    _check(a, b, a_scale, b_scale, out_dtype, bias, b_layout)
    layout: Any = b_layout
    return block_scaled_matmul_reference(a, b, a_scale, b_scale, out_dtype, bias, layout)


@block_scaled_matmul.register_fake
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    *bias: Any,
    **b_layout: Any,
) -> Tensor:
    _check(a, b, a_scale, b_scale, out_dtype, *bias, **b_layout)
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=out_dtype)


def _check(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    b_layout: str = "row",
) -> None:
    check_dtype("a", a, QUANTIZED_DTYPES)
    check_dtype("b", b, (torch.int8,) if a.dtype == torch.int8 else FP8_DTYPES)
    check_dtype("a_scale", a_scale, (torch.float32,))
    check_dtype("b_scale", b_scale, (torch.float32,))
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype: expected {dtype_names(FLOAT_DTYPES)}, got {dtype_name(out_dtype)}")
    check_rank("a", a, 1)
    check_rank("a_scale", a_scale, 1)
    depth = a.shape[-1]
    if b.dim() != 2 or b.shape[1] != depth:
        raise ValueError(f"b: expected shape [N, {depth}], got {shape_text(b)}")
    check_stored("b", b, "b_layout", b_layout)
    groups = a_scale.shape[-1]
    if groups == 0 or depth % groups != 0:
        raise ValueError(f"a_scale: {groups} groups do not divide the last axis of a, {depth}")
    if a.dtype == torch.int8 and groups > 1:
        raise ValueError(f"a_scale: a product of int8 has one scale in a row, got {groups}")
    if a_scale.shape != (1,):
        check_shape("a_scale", a_scale, (*a.shape[:-1], groups))
    fits = b_scale.dim() == 2 and b_scale.shape[1] == groups
    if not fits or scale_kind(tuple(b_scale.shape), b.shape[0], depth) is None:
        check_shape("b_scale", b_scale, (scale_rows("blocks", b.shape[0], depth // groups), groups))
    if bias is not None:
        check_dtype("bias", bias, (out_dtype,))
        check_shape("bias", bias, b.shape[:1])
