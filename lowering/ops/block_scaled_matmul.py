"""``torch.ops.lowering.block_scaled_matmul``: the product of two fp8 matrices whose blocks have scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patterns.contracts import WeightLayout

from .checks import (
    FLOAT_DTYPES,
    FP8_DTYPES,
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
) -> Tensor:
    """a . b^T with the scales applied, bias added, one rounding to ``out_dtype`` at the end.

    a: [..., K] fp8, b: [N, K] fp8 in ``b_layout``, a_scale: float32 [..., K/G], b_scale: float32
    [ceil(N/G), K/G], bias: [N] or None.  The accumulation is float32; its order, and whether a scale
    multiplies the factors or a block's partial sum, is free: compare with a tolerance.

    Source: DeepGEMM fp8_gemm_nt, vLLM w8a8_block_fp8_matmul.
    """
    b = unshuffle_weight_reference(b, b_layout)
    groups = a_scale.shape[-1]
    group = a.shape[-1] // groups
    rows = a.to(torch.float32).unflatten(-1, (groups, group)) * a_scale.unsqueeze(-1)
    blocks = b.to(torch.float32).unflatten(-1, (groups, group))
    row_scale = b_scale.unsqueeze(1).expand(-1, group, -1).flatten(0, 1)[: b.shape[0]]
    columns = blocks * row_scale.unsqueeze(-1)
    product = torch.matmul(rows.flatten(-2), columns.flatten(-2).t())
    return (product if bias is None else product + bias.to(torch.float32)).to(out_dtype)


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
    """out[..., n] = sum over groups g of (a_g . b_g[n]) * a_scale[..., g] * b_scale[n // G, g] + bias[n].

    a: [..., K] fp8, b: [N, K] fp8 (a row is an output feature), a_scale: float32 [..., K/G] of any
    strides, b_scale: float32 [ceil(N/G), K/G]; G = K / a_scale.shape[-1].  bias: [N] in ``out_dtype``, or
    None.  b_layout: how the bytes of b lie, as ``shuffle_weight`` returns them; N is then its padded number
    of rows.  A weight is best given in ``row``: the compiler finds the layout for its target.
    Returns [..., N] in ``out_dtype`` (float32, bfloat16, float16), accumulated in float32, the bias added
    there, and rounded once; the order of accumulation is free.
    Raises ValueError naming the argument that does not fit.
    Source: DeepGEMM, vLLM (block-scaled fp8 GEMM, 1xG by GxG).
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
    check_dtype("a", a, FP8_DTYPES)
    check_dtype("b", b, FP8_DTYPES)
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
    check_shape("a_scale", a_scale, (*a.shape[:-1], groups))
    group = depth // groups
    check_shape("b_scale", b_scale, ((b.shape[0] + group - 1) // group, groups))
    if bias is not None:
        check_dtype("bias", bias, (out_dtype,))
        check_shape("bias", bias, b.shape[:1])
