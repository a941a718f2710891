"""``torch.ops.lowering.rms_norm`` and ``add_rms_norm``: RMSNorm, alone and after a residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from patterns.contracts import Norm

from .checks import FLOAT_DTYPES, check_dtype, check_rank, check_shape
from .gated_activation import gated_activation_reference
from .scalars import float32


def norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm: Norm,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norm the last axis, as ``norm`` says; and the residual sum.

    x, residual, gate: [..., H]; weight, bias: [H] or None.  ``residual``, ``bias`` and ``gate`` are given
    exactly when ``norm`` has them.  Returns (y, sum): y is x's dtype (``once``), the promoted dtype of x,
    weight and bias (``twice``) or float32 (``none``); sum is round(x + residual) in x's dtype, or None.  The
    order in which elements and squares are added is free.

    The factor is weight, or float32(weight) + ``norm.weight_offset``, a float32, where that is not zero.

    Source: torch.nn.RMSNorm, LayerNorm and FlashInfer (once), Hugging Face and vLLM CUDA (twice), AITER
    (none), Gemma (weight_offset).
    """
    for name, given, says in (("bias", bias, norm.bias), ("gate", gate, norm.gate)):
        if (given is None) != (says is None):
            raise ValueError(f"{name}: the contract says {says!r}")
    dtype = x.dtype if norm.dtype is None else getattr(torch, norm.dtype)
    if gate is not None and norm.gate is not None:
        x = gated_activation_reference(gate, x, norm.gate)
    x32, total = _statistic_input(x, residual, norm)
    centred, rstd = _statistics(x32 if norm.group is None else x32.unflatten(-1, (-1, norm.group)), norm)
    weight = _offset(weight, norm)
    if norm.bias == "once":
        return _rounded(_fused_sum(centred, rstd, weight, bias, x.shape), norm, dtype), total
    y = (centred * rstd).reshape(x32.shape)
    if norm.rounding == "twice":
        y = y.to(dtype)
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias), total
    y = y if weight is None else y * weight.to(x32.dtype)
    y = y if bias is None else y + bias.to(x32.dtype)
    return _rounded(y, norm, dtype), total


def _rounded(y: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    return y if norm.rounding == "none" else y.to(dtype)


def _statistics(groups: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Subtract from ``groups``, [..., G], what the statistic says; give the rest, and 1 over its root."""
    if norm.statistic == "variance":
        groups = groups - groups.mean(dim=-1, keepdim=True)
    # In float64, so that both roundings are to nearest wherever this runs: on the CPU float32 torch.sqrt is
    # off by one unit in the last place for one value in seven, and on CUDA torch.rsqrt is an approximation.
    eps = norm.eps if groups.dtype == torch.float64 else float32(norm.eps)
    mean = torch.mean(groups * groups, dim=-1, keepdim=True) + eps
    return groups, torch.reciprocal(torch.sqrt(mean.to(torch.float64)).to(groups.dtype))


def _fused_sum(
    centred: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, shape: torch.Size
) -> Tensor:
    """Add the bias to the last product, in float64, where a product of float32 is exact."""
    assert bias is not None
    factor = rstd if weight is None else weight.to(torch.float64)
    first = centred if weight is None else (centred * rstd).reshape(shape)
    product = (first.to(torch.float64) * factor).reshape(shape)
    return (product + bias.to(torch.float64)).to(centred.dtype)


def _statistic_input(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """float32 [..., H] that the norm works on, and round(x + residual) or None."""
    if (residual is None) != (norm.residual is None):
        raise ValueError(f"residual: the contract says {norm.residual!r}")
    wide = torch.promote_types(x.dtype, torch.float32)  # float64 has no kernel, and stays what it is
    x32 = x.to(wide)
    if residual is None:
        return x32, None
    x32 = x32 + residual.to(wide)
    total = x32.to(x.dtype)
    return (x32 if norm.residual == "exact" else total.to(wide)), total


def _offset(weight: Tensor | None, norm: Norm) -> Tensor | None:
    """Give what the normed row is multiplied by."""
    if norm.weight_offset == 0:
        return weight
    if weight is None:
        raise ValueError(f"weight: the contract adds {norm.weight_offset} to it, and there is none")
    return weight.to(torch.float32) + float32(norm.weight_offset)


@torch.library.custom_op(
    "lowering::rms_norm", mutates_args=(), schema="(Tensor x, Tensor? weight, float eps) -> Tensor"
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = round(x32 * rstd * float32(weight)), rstd = 1/sqrt(mean(x32^2) + eps); contract ``once``.

    x: [..., H] float32, bfloat16 or float16; weight: [H] of any of these dtypes, or None.
    Returns [..., H] in x's dtype.  Raises ValueError naming the argument that does not fit.
    Source: torch.nn.RMSNorm, FlashInfer.
    """
    _check(x, None, weight)
    return norm_reference(x, None, weight, Norm(eps))[0].contiguous()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    _check(x, None, weight)
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "lowering::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (contract ``once``) of the unrounded x + residual, and the rounded sum.

    x, residual: [..., H], one dtype (float32, bfloat16, float16); weight: [H] of any of these, or None.
    Returns (y, residual'), both [..., H] in x's dtype: the statistic and y use
    float32(x) + float32(residual) unrounded (contract ``exact``), residual' = round(x + residual).
    Raises ValueError naming the argument that does not fit.
    Source: fused_add_rms_norm of FlashInfer and vLLM, without the mutation.
    """
    _check(x, residual, weight)
    y, total = norm_reference(x, residual, weight, Norm(eps, residual="exact"))
    assert total is not None
    return y.contiguous(), total.contiguous()


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> None:
    check_dtype("x", x, FLOAT_DTYPES)
    check_rank("x", x, 1)
    if residual is not None:
        check_dtype("residual", residual, (x.dtype,))
        check_shape("residual", residual, x.shape)
    if weight is not None:
        check_dtype("weight", weight, FLOAT_DTYPES)
        check_shape("weight", weight, x.shape[-1:])
