"""Spell attention out where IREE's own lowering of it is slow, and what that makes wrong of masks elsewhere.

On the CPU, IREE's fused attention takes vectors of single elements where a length is not known when
compiling; two products with a softmax between them, which it compiles as well as any others, are several
times as fast (docs/measurements.md).  What it costs is room for the scores of all heads.  On GPUs the fused
one is three to four times as fast, and gives NaN for a query that may look at no key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from iree.compiler import ir
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterns import torch_ir

ATTENTION = "torch.aten.scaled_dot_product_attention"


@dataclass(frozen=True)
class Attention:
    """Hold what an attention says besides its tensors: query, key and value, and a mask if ``masked``."""

    masked: bool
    causal: bool
    scale: float | None
    grouped: bool

    def axes(self, ranks: list[int]) -> list[list[str]]:
        """Names of the axes of the operands, by rank: what has one name has one size, or size 1."""
        ends = [("queries", "depth"), ("keys", "depth"), ("keys", "width"), ("queries", "keys")]
        return [
            [f"leading{rank - axis}" for axis in range(rank - 2)] + list(end)
            for rank, end in zip(ranks, ends[: len(ranks)], strict=True)
        ]


def attention(op: ir.Operation) -> Attention | None:
    """Read what ``op`` computes; None if it is no attention, or one whose attributes are not constants."""
    if torch_ir.op_name(op) != ATTENTION:
        return None
    mask, dropout, causal, scale, grouped = list(op.operands)[3:]
    values = [torch_ir.constant(value) for value in (dropout, causal, grouped)]
    size = torch_ir.constant(scale)
    if values[0] != 0 or not all(isinstance(flag, bool) for flag in values[1:]):
        return None
    if size is None and str(scale.type) != "!torch.none":
        return None
    return Attention(torch_ir.tensor_type(mask) is not None, values[1], size, values[2])


def tensors(op: ir.Operation) -> list[ir.Value]:
    """The operands of an attention that are tensors."""
    return [operand for operand in op.operands if torch_ir.tensor_type(operand) is not None]


def reference(attention: Attention) -> Callable[..., Tensor]:
    """The function of query [.., L, E], key [.., S, E], value [.., S, V] and mask [.., L, S] that this is.

    As torch.nn.functional.scaled_dot_product_attention on the CPU: computed in float32, rounded once; a
    query that may look at no key gives zeros.
    """

    def computed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (tensor.to(torch.float32) for tensor in (query, key, value))
        if attention.grouped:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        scores = q @ k.transpose(-1, -2) * scale
        if attention.causal:
            allowed = torch.ones_like(scores, dtype=torch.bool).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if mask is not None:
            bias = mask if mask.dtype != torch.bool else torch.zeros(()).masked_fill(~mask, -torch.inf)
            scores = scores + bias
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
        total = weights.sum(-1, keepdim=True)
        return (weights @ v / torch.where(total == 0, 1.0, total)).to(query.dtype)

    return computed


def guarded(attention: Attention) -> Callable[..., Tensor]:
    """The same function by the fused attention, which never sees a query that may look at no key."""

    def computed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
        some = allowed.any(-1, keepdim=True)
        passed = mask | ~some if mask.dtype == torch.bool else torch.where(some, mask, 0.0)
        result = scaled_dot_product_attention(
            query, key, value, passed, scale=attention.scale, enable_gqa=attention.grouped
        )
        return torch.where(some, result, 0.0)

    return computed
