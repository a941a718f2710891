"""Compute with weights that are integers of 4 or 8 bits, several in a word: unpacked at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Packing:
    """How words of 32 bits hold codes.

    bits: of a code.  codes_axis, zeros_axis: along which consecutive ones share a word.  order: the place in
    its word, counted from the lowest bits, that each of them has.  transposed: the matrix is [K, N].
    zero: what is subtracted from every code, where no zero points are stored.  above: what is added to those
    that are.
    """

    bits: int
    codes_axis: int
    zeros_axis: int
    order: tuple[int, ...]
    transposed: bool
    zero: int
    above: int = 0

    @property
    def in_word(self) -> int:
        return 32 // self.bits

    def unpack(self, words: Tensor, axis: int, size: int) -> Tensor:
        """The ``size`` codes along ``axis``, as int32 from 0 on."""
        places = [self.bits * place for place in self.order]
        shifts = torch.tensor(places, dtype=torch.int32, device=words.device)
        shifts = shifts.view(-1, *(1,) * (words.dim() - axis - 1))
        codes = (words.unsqueeze(axis + 1) >> shifts) & ((1 << self.bits) - 1)
        return codes.flatten(axis, axis + 1).narrow(axis, 0, size)


class PackedLinear(nn.Module):
    """y = x . weight^T + bias, weight = (code - zero) * scale, rounded to scale's dtype and then to x's.

    x: [..., in_features], of any float; y: [..., out_features] in its dtype.  words, zeros: int32 codes as
    ``packing`` says, zeros one for each scale, or None; scale: [N, K/g] or [K/g, N], a float.  group_of: [K],
    the group of each feature where they are no runs of g (act-order), or None.  All are buffers and keep
    their dtype when the model is cast.  Raises ValueError for a group that there is not.
    Source: compressed-tensors pack-quantized, GPTQ (GPTQModel), AWQ (gemm).
    """

    words: Tensor
    scale: Tensor
    zeros: Tensor | None
    group_of: Tensor | None

    def __init__(
        self,
        packing: Packing,
        words: Tensor,
        scale: Tensor,
        zeros: Tensor | None = None,
        group_of: Tensor | None = None,
        bias: nn.Parameter | None = None,
    ):
        super().__init__()
        self.packing, self.depth_axis = packing, 0 if packing.transposed else 1
        self.out_features = scale.shape[1 - self.depth_axis]
        shared = packing.codes_axis == self.depth_axis
        self.in_features = words.shape[self.depth_axis] * (packing.in_word if shared else 1)
        groups = scale.shape[self.depth_axis]
        if group_of is not None and not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
            found = f"{int(group_of.min())} to {int(group_of.max())}"
            raise ValueError(f"features of groups {found}, of {groups}")
        for name, tensor in (("words", words), ("scale", scale), ("zeros", zeros), ("group_of", group_of)):
            self.register_buffer(name, tensor)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values().to(x.dtype), self.bias)

    def values(self) -> Tensor:
        """The weight [N, K] that the codes stand for, in the dtype of the scales."""
        packing = self.packing
        shared = (self.out_features, self.in_features)[packing.codes_axis ^ packing.transposed]
        codes = packing.unpack(self.words, packing.codes_axis, shared)
        if self.zeros is None:
            codes = codes - packing.zero
        else:
            zeros = packing.unpack(self.zeros, packing.zeros_axis, self.scale.shape[packing.zeros_axis])
            codes = codes - self._of_each(zeros + packing.above)
        weight = codes.to(self.scale.dtype) * self._of_each(self.scale)
        return weight.t() if packing.transposed else weight

    def _of_each(self, values: Tensor) -> Tensor:
        """What each feature has, of what each group has."""
        axis = self.depth_axis
        if self.group_of is not None:
            return values.index_select(axis, self.group_of)
        sizes = [-1, -1, -1]
        sizes[axis + 1] = self.in_features // values.shape[axis]
        return values.unsqueeze(axis + 1).expand(sizes).flatten(axis, axis + 1)

    def extra_repr(self) -> str:
        groups = self.scale.shape[self.depth_axis]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.packing.bits}, "
            f"group_size={self.in_features // groups}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move with the model, but keep the scales: a cast is about the other weights."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self
