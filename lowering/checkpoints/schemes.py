"""Say how a quantized weight is stored, and make the layer of ``lowering.nn`` that computes with it.

A scheme is one declaration: the codes, the tensors beside them with their shapes, and the layer.  What is
checked and what an error says follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..nn import BlockScaledLinear, ScaledLinear
from .packed import PackedLinear, Packing

Shape = tuple[int, ...]
E8M0 = torch.float8_e8m0fnu
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized layer.

    name: what stands behind the weight's, as in ``weight_scale``; ".input_scale" stands for the weight's own.
    shapes: those it may have, by the weight's [N, K].  optional: not every such layer has it.
    positive: a zero in it is wrong, as it is not in the scale of a block of zeros.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]
    optional: bool = False
    positive: bool = False

    def of(self, weight: str) -> str:
        """The tensor's full name, by that of the weight."""
        return (weight.removesuffix(".weight") if self.name.startswith(".") else weight) + self.name

    def weight(self, name: str) -> str | None:
        """The weight that the tensor ``name`` belongs to, if it is such a one."""
        if not name.endswith(self.name):
            return None
        front = name.removesuffix(self.name)
        return f"{front}.weight" if self.name.startswith(".") else front


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored: ``layer`` makes it of its parts, by name, and of the bias, or None.

    whole: what N and K of the weight are multiples of.
    """

    format: str
    codes: Part
    beside: tuple[Part, ...]
    layer: Callable[[Mapping[str, Tensor], nn.Parameter | None], nn.Module]
    whole: tuple[int, int] = (1, 1)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.codes, *self.beside


def _matrix(rows: int, depth: int) -> tuple[Shape, ...]:
    return ((rows, depth),)


def _one(rows: int, depth: int) -> tuple[Shape, ...]:
    return (1,), ()


def _of_channels(rows: int, depth: int) -> tuple[Shape, ...]:
    return (rows, 1), (rows,)


def block_fp8(group: int, scale: str, *, powers_of_two: bool = False) -> Scheme:
    """Blocks of ``group`` x ``group`` e4m3 codes that a scale multiplies; activations in groups of a row.

    powers_of_two: those scales of the activations are rounded up to powers of two, as DeepGEMM does for
    weights of scale_fmt "ue8m0".
    """

    def blocks(rows: int, depth: int) -> tuple[Shape, ...]:
        return ((-(-rows // group), -(-depth // group)),)

    def layer(parts: Mapping[str, Tensor], bias: nn.Parameter | None) -> nn.Module:
        encoding = "ue8m0" if powers_of_two else "float32"
        return BlockScaledLinear.from_codes(parts[""], exact(parts[scale]), group, bias, scale=encoding)

    return Scheme(
        f"FP8 in blocks of {group} x {group}",
        Part("", (torch.float8_e4m3fn,), _matrix),
        (Part(scale, (*_SCALES, E8M0), blocks),),
        layer,
    )


def scaled(codes: torch.dtype, scale: str, *, channels: bool, input_scale: str | None) -> Scheme:
    """Codes with a scale for each row of the weight, or one for all; activations alike.

    input_scale: the name of the activations' scale where it is stored; otherwise each token has its own.
    """
    kind = "FP8" if codes == torch.float8_e4m3fn else "INT8"
    of = "channel" if channels else "tensor"
    inputs = () if input_scale is None else (Part(input_scale, _SCALES, _one, positive=True),)
    return Scheme(
        f"{kind} per {of}, activations {'per token' if input_scale is None else 'static'}",
        Part("", (codes,), _matrix),
        (Part(scale, _SCALES, _of_channels if channels else _one), *inputs),
        partial(_scaled, scale=scale, input_scale=input_scale),
    )


def _scaled(
    parts: Mapping[str, Tensor], bias: nn.Parameter | None, *, scale: str, input_scale: str | None
) -> ScaledLinear:
    given = None if input_scale is None else exact(parts[input_scale]).reshape(1)
    return ScaledLinear(parts[""], exact(parts[scale]).reshape(-1, 1), given, bias)


def packed_integers(bits: int, group: int | None, *, zeros: bool) -> Scheme:
    """compressed-tensors' pack-quantized: [N, K] with consecutive codes along K in a word, and their offset.

    group: elements along K that share a scale; None for whole rows.  zeros: zero points are stored.
    """
    in_word = 32 // bits
    packing = Packing(bits, 1, 0, tuple(range(in_word)), transposed=False)

    def words(rows: int, depth: int) -> tuple[Shape, ...]:
        return ((rows, depth // in_word),)

    def groups(rows: int, depth: int) -> tuple[Shape, ...]:
        return ((rows, depth // (group or depth)),)

    def zero_words(rows: int, depth: int) -> tuple[Shape, ...]:
        return ((-(-rows // in_word), depth // (group or depth)),)

    beside = [
        Part("_scale", _SCALES, groups),
        Part("_shape", (torch.int64, torch.int32), lambda rows, depth: ((2,),), optional=True),
        Part("_g_idx", (torch.int32, torch.int64), _features, optional=True),
    ]
    if zeros:
        beside.append(Part("_zero_point", (torch.int32,), zero_words))
    return Scheme(
        f"int{bits} in groups of {group or 'whole rows'}, packed",
        Part("_packed", (torch.int32,), words),
        tuple(beside),
        partial(_packed, packing=packing, names=("_packed", "_scale", "_zero_point", "_g_idx")),
        (1, math.lcm(in_word, group or 1)),
    )


def gptq(bits: int, group: int | None, *, above: int) -> Scheme:
    """GPTQ: [K, N] with consecutive codes along K in a word, their zero points along N.

    above: what the stored zero points lack, one in files of its first version.
    """
    in_word = 32 // bits
    packing = Packing(bits, 0, 1, tuple(range(in_word)), transposed=True, above=above)
    return _transposed(
        f"GPTQ int{bits}", packing, group, lambda rows, depth: ((depth // in_word, rows),), indexed=True
    )


def awq(group: int | None) -> Scheme:
    """AWQ (gemm): [K, N] with eight codes along N in a word, in an order of their own."""
    packing = Packing(4, 1, 1, (0, 4, 1, 5, 2, 6, 3, 7), transposed=True)
    return _transposed("AWQ int4", packing, group, lambda rows, depth: ((depth, rows // 8),), indexed=False)


def _transposed(
    name: str,
    packing: Packing,
    group: int | None,
    words: Callable[[int, int], tuple[Shape, ...]],
    *,
    indexed: bool,
) -> Scheme:
    def groups(rows: int, depth: int) -> tuple[Shape, ...]:
        return ((depth // (group or depth), rows),)

    def zero_words(rows: int, depth: int) -> tuple[Shape, ...]:
        return ((depth // (group or depth), rows // packing.in_word),)

    indices = (Part(".g_idx", (torch.int32, torch.int64), _features, optional=True),) if indexed else ()
    return Scheme(
        f"{name} in groups of {group or 'whole rows'}",
        Part(".qweight", (torch.int32,), words),
        (Part(".scales", _SCALES, groups), Part(".qzeros", (torch.int32,), zero_words), *indices),
        partial(_packed, packing=packing, names=(".qweight", ".scales", ".qzeros", ".g_idx")),
        (packing.in_word, math.lcm(packing.in_word, group or 1)),
    )


def _features(rows: int, depth: int) -> tuple[Shape, ...]:
    return ((depth,),)


def _packed(
    parts: Mapping[str, Tensor],
    bias: nn.Parameter | None,
    *,
    packing: Packing,
    names: tuple[str, str, str, str],
) -> PackedLinear:
    words, scale, zeros, index = names
    group_of = parts.get(index)
    if group_of is not None:
        groups = parts[scale].shape[0 if packing.transposed else 1]
        each = torch.arange(len(group_of)) // max(1, len(group_of) // groups)
        group_of = None if torch.equal(group_of.long(), each) else group_of
    return PackedLinear(packing, parts[words], parts[scale], parts.get(zeros), group_of, bias)


def exact(scale: Tensor) -> Tensor:
    """The values of ``scale`` in float32, which has all those of the narrower types."""
    return scale.detach().to(torch.float32)
