"""Spell attention out where IREE's own lowering of it is slow, and what that makes wrong of masks elsewhere.

On the CPU, IREE's fused attention takes vectors of single elements where a length is not known when
compiling; two products with a softmax between them, which it compiles as well as any others, are several
times as fast (docs/measurements.md).  Heads that share keys and values are rows of one product, which reads
these once, also where the model repeats them for each head.  What it costs is room for the scores of all
heads.  On GPUs the fused one is three to four times as fast, and gives NaN for a query that may look at no
key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterns.attention import Attention


def reference(attention: Attention) -> Callable[..., Tensor]:
    """The function of query [.., L, E], key [.., S, E], value [.., S, V] and mask [.., L, S] that this is.

    As torch.nn.functional.scaled_dot_product_attention on the CPU: computed in float32, rounded once; a
    query that may look at no key gives zeros.
    """

    def computed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (tensor.to(torch.float32) for tensor in (query, key, value))
        scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        scores = _times(q, k.transpose(-1, -2)) * scale
        if attention.causal:
            allowed = torch.ones_like(scores, dtype=torch.bool).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if mask is not None:
            bias = mask if mask.dtype != torch.bool else torch.zeros(()).masked_fill(~mask, -torch.inf)
            scores = scores + bias
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
        total = weights.sum(-1, keepdim=True)
        return (_times(weights, v) / torch.where(total == 0, 1.0, total)).to(query.dtype)

    return computed


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows`` [.., H, L, K] times ``matrix`` [.., KV, K, N], each of which is for several heads in a row."""
    if rows.dim() < 3 or rows.shape[-3] == matrix.shape[-3]:
        return rows @ matrix
    (heads, length), shared = rows.shape[-3:-1], matrix.shape[-3]
    # Axes are split and joined one by one: of a reshape torch.export asks for conditions on the length.
    together = rows.unflatten(-3, (shared, heads // shared)).flatten(-3, -2)
    return (together @ matrix).unflatten(-2, (heads // shared, length)).flatten(-4, -3)


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
