"""Say how a quantized weight is stored, and make the layer of ``lowering.nn`` that computes with it.

A scheme is one declaration: the codes, the tensors beside them with their shapes, and the layer.  What is
checked and what an error says follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..nn import BlockScaledLinear, ScaledLinear

Shape = tuple[int, ...]
E8M0 = torch.float8_e8m0fnu
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized layer.

    name: what stands behind the weight's, as in ``weight_scale``; ".input_scale" stands for the weight's own.
    shapes: those it may have, by the weight's [N, K].
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]

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
    """How one linear layer is stored: ``layer`` makes it of its parts, by name, and of the bias, or None."""

    format: str
    codes: Part
    beside: tuple[Part, ...]
    layer: Callable[[Mapping[str, Tensor], nn.Parameter | None], nn.Module]

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
    inputs = () if input_scale is None else (Part(input_scale, _SCALES, _one),)
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


def exact(scale: Tensor) -> Tensor:
    """The values of ``scale`` in float32, which has all those of the narrower types."""
    return scale.detach().to(torch.float32)
