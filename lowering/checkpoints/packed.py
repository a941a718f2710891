"""Compute with weights that are integers of 4 or 8 bits, several in a word, as checkpoints hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import unpacked_weight


@dataclass(frozen=True)
class Packing:
    """How words of 32 bits hold codes.

    bits: of a code.  codes_axis, zeros_axis: along which consecutive ones share a word.  order: the place in
    its word, counted from the lowest bits, that each of them has.  transposed: the matrix is [K, N].
    above: what is added to the zero points that are stored; where none are, they are 2^(bits - 1).
    """

    bits: int
    codes_axis: int
    zeros_axis: int
    order: tuple[int, ...]
    transposed: bool
    above: int = 0

    @property
    def in_word(self) -> int:
        return 32 // self.bits

    def codes(self, words: Tensor, size: int, columns: Tensor | None = None) -> Tensor:
        """The codes as ``packed_matmul`` takes them: of each row ``columns``, where they have another order.

        size: codes along the axis on which they share words.
        """
        return torch.ops.lowering.repack(
            words,
            self.bits,
            self.codes_axis,
            self.order,
            size,
            columns,
            transposed=self.transposed,
            to_bits=self.bits,
        )

    def zero_points(self, words: Tensor, size: int) -> Tensor:
        """The zero points, uint8 [N, K/g]; one of 256 is 0, as the libraries' mask has it."""
        return torch.ops.lowering.repack(
            words,
            self.bits,
            self.zeros_axis,
            self.order,
            size,
            transposed=self.transposed,
            above=self.above,
            to_bits=8,
        )


class PackedLinear(nn.Module):
    """y = x . weight^T + bias, weight = (code - zero) * scale, rounded to scale's dtype and then to x's.

    x: [..., in_features], of any float; y: [..., out_features] in its dtype.  The product is
    ``packed_matmul``.  words, zeros: int32 codes as ``packing`` says, zeros one for each scale, or None;
    scale: [N, K/g] or [K/g, N], a float.  group_of: [K], the group of each feature where they are no runs of
    g (act-order), or None: x is then gathered group by group, or, where groups are of different sizes, each
    feature has a scale of its own.  All are buffers and keep their dtype when the model is cast.
    Raises ValueError for a group that there is not.
    Source: compressed-tensors pack-quantized, GPTQ (GPTQModel), AWQ (gemm).
    """

    words: Tensor
    scale: Tensor
    zeros: Tensor | None
    group_of: Tensor | None
    columns: Tensor | None

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
        columns = None
        if group_of is not None:
            columns = _group_by_group(group_of.long(), scale.shape[self.depth_axis])
            group_of = group_of.long() if columns is None else None
        held = {"words": words, "scale": scale, "zeros": zeros, "group_of": group_of, "columns": columns}
        # What there is first: torch.export counts a model's buffers by their places, and loses those behind a
        # None.
        for name, tensor in sorted(held.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, tensor)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero = self._operands()
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        return torch.ops.lowering.packed_matmul(x, codes, scale, zero, self.bias, bits=self.packing.bits)

    def values(self) -> Tensor:
        """The weight [N, K] that the codes stand for, in the dtype of the scales."""
        weight = unpacked_weight(*self._operands(), self.packing.bits)
        return weight if self.columns is None else weight.index_select(1, self.columns.argsort())

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points as the product takes them."""
        packing, scale = self.packing, self.scale
        shared = (self.out_features, self.in_features)[packing.codes_axis ^ packing.transposed]
        codes = packing.codes(self.words, shared, self.columns)
        zero = self.zeros
        if zero is not None:
            zero = packing.zero_points(zero, scale.shape[packing.zeros_axis])
        scale = scale.t() if packing.transposed else scale
        if self.group_of is not None:
            scale = scale.index_select(1, self.group_of)
            zero = zero if zero is None else zero.index_select(1, self.group_of)
        return codes, scale, zero

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


def _group_by_group(group_of: Tensor, groups: int) -> Tensor | None:
    """The features of the first group, then those of the next; None where groups are of different sizes.

    Raises ValueError for a group that there is not.
    """
    if not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
        raise ValueError(f"features of groups {int(group_of.min())} to {int(group_of.max())}, of {groups}")
    sizes = torch.bincount(group_of, minlength=groups)
    return group_of.argsort(stable=True) if (sizes == sizes[0]).all() else None
