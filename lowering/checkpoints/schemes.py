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

from ..nn import BlockScaledLinear

Shape = tuple[int, ...]
E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Companion:
    """A tensor beside the codes; ``suffix`` stands behind the weight's name, as in ``weight_scale_inv``.

    shape: of it, by that of the weight [N, K].
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    shape: Callable[[int, int], Shape]


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored: ``layer`` makes it of the tensors, by suffix (that of codes is "").

    layer: also takes the bias, or None.
    """

    format: str
    codes: torch.dtype
    companions: tuple[Companion, ...]
    layer: Callable[[Mapping[str, Tensor], nn.Parameter | None], nn.Module]

    def expected(self, rows: int, depth: int) -> dict[str, tuple[tuple[torch.dtype, ...], Shape]]:
        """The dtypes and the shape of each tensor of a layer [rows, depth], by suffix."""
        found = {item.suffix: (item.dtypes, item.shape(rows, depth)) for item in self.companions}
        return {"": ((self.codes,), (rows, depth)), **found}


def block_fp8(group: int, suffix: str, *, powers_of_two: bool = False) -> Scheme:
    """Blocks of ``group`` x ``group`` e4m3 codes that a scale multiplies; activations in groups of a row.

    powers_of_two: those scales of the activations are rounded up to powers of two, as DeepGEMM does for
    weights of scale_fmt "ue8m0".
    """

    def blocks(rows: int, depth: int) -> Shape:
        return -(-rows // group), -(-depth // group)

    return Scheme(
        f"FP8 in blocks of {group} x {group}",
        torch.float8_e4m3fn,
        (Companion(suffix, (torch.float32, torch.bfloat16, torch.float16, E8M0), blocks),),
        partial(_block_scaled, group=group, suffix=suffix, scale="ue8m0" if powers_of_two else "float32"),
    )


def _block_scaled(
    tensors: Mapping[str, Tensor], bias: nn.Parameter | None, *, group: int, suffix: str, scale: str
) -> BlockScaledLinear:
    return BlockScaledLinear.from_codes(tensors[""], exact(tensors[suffix]), group, bias, scale=scale)


def exact(scale: Tensor) -> Tensor:
    """The values of ``scale`` in float32, which has all those of the narrower types."""
    return scale.detach().to(torch.float32)
