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
from dataclasses import dataclass, replace

import torch
from iree.compiler import ir
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterns import torch_ir, views

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


def shared(op: ir.Operation, found: Attention) -> tuple[Attention, list[ir.Value]]:
    """What ``op`` computes of which tensors: keys and values before the model repeats their heads."""
    query, key, value, *mask = operands = tensors(op)
    keys, values = _repeated(key), _repeated(value)
    if found.grouped or keys is None or values is None or _heads(keys) != _heads(values):
        return found, operands
    return replace(found, grouped=True), [query, keys, values, *mask]


def _heads(value: ir.Value) -> int | None:
    type_ = torch_ir.tensor_type(value)
    return type_ and type_.shape[-3]


def _repeated(value: ir.Value) -> ir.Value | None:
    """The x [.., KV, S, E] of which ``value`` [.., H, S, E] has each head several times in a row, or None."""
    whole, flat = torch_ir.tensor_type(value), torch_ir.producer(value)
    if whole is None or flat is None or not views.is_flat_view(flat):
        return None
    expanded = torch_ir.producer(flat.operands[0])
    if expanded is None or expanded.name != "torch.aten.expand":
        return None
    apart = torch_ir.producer(expanded.operands[0])
    if apart is None or not views.is_flat_view(apart) or _is_slice(apart.operands[0]):
        return None
    before, between, after = (
        torch_ir.tensor_type(each) for each in (apart.operands[0], apart.result, expanded.result)
    )
    if before is None or between is None or after is None or len(before.shape) < 3:
        return None
    *leading, heads, length, size = before.shape
    times = after.shape[-3]
    if heads is None or times is None or list(leading).count(None) + (length is None) > 1:
        return None
    expected = [
        (between, [*leading, heads, 1, length, size]),
        (after, [*leading, heads, times, length, size]),
        (whole, [*leading, heads * times, length, size]),
    ]
    return apart.operands[0] if all(list(type_.shape) == shape for type_, shape in expected) else None


def _is_slice(value: ir.Value) -> bool:
    """Tell whether ``value`` is part of a tensor: IREE copies that for a product, and a cache would move."""
    owner = torch_ir.producer(value)
    return owner is not None and owner.name == "torch.aten.slice.Tensor"


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
