"""The contract in plain PyTorch, and the operation that a model may call by name."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.ops.group_quant import group_quant_reference
from lowering.ops.scalars import float32
from patterns.contracts import Quantization

from .contract import LayerNorm


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: LayerNorm) -> Tensor:
    """Compute y of ``contract.LayerNorm``: what kernels are compared with."""
    share = 1.0 / x.shape[-1]
    wide = x.to(torch.float64)
    mean = (wide.sum(-1, keepdim=True) * share).to(torch.float32)
    off = wide - mean.to(torch.float64)
    variance = ((off * off).sum(-1, keepdim=True) * share).to(torch.float32)
    # By way of float64: on a CPU one float32 root in six of PyTorch is off by one in the last place.
    root = torch.sqrt((variance + float32(norm.eps)).to(torch.float64)).to(torch.float32)
    rstd = torch.reciprocal(root)
    y = (x.to(torch.float32) - mean) * rstd
    if weight is not None:
        y = y * weight.to(torch.float32)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def without_kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: LayerNorm) -> Tensor:
    """Compute a site that gets no kernel, in operations that IREE compiles for every target.

    PyTorch's own LayerNorm, since IREE has no float64 sums on CUDA.
    """
    vectors = [None if vector is None else vector.to(torch.float32) for vector in (weight, bias)]
    return torch.nn.functional.layer_norm(
        x.to(torch.float32), x.shape[-1:], vectors[0], vectors[1], norm.eps
    ).to(x.dtype)


@torch.library.custom_op(
    "vmfuse_layer_norm::layer_norm_fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps=1e-05) -> (Tensor, Tensor)",
)
def layer_norm_fp8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Norm the last axis of x [.., H] and quantize each row: q float8_e4m3fn [.., H], scale float32 [.., 1].

    weight, bias: [H], or None.  The contract is ``LayerNorm(eps)``, then ``Quantization(group=None)``.
    """
    return group_quant_reference(
        layer_norm_reference(x, weight, bias, LayerNorm(eps)), Quantization(group=None)
    )


@layer_norm_fp8.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(
        (*x.shape[:-1], 1), dtype=torch.float32
    )
