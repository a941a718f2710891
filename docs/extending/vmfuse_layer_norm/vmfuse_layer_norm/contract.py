"""What is computed, bit for bit: operations carry these values, kernels are made by them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from patterns.contracts import Quantization


@dataclass(frozen=True)
class LayerNorm:
    """``y = (x32 - mean) * rstd * weight + bias`` over the last axis, of H elements.

    mean = round(sum(x) * (1/H)) and var = round(sum((x - mean)^2) * (1/H)): differences, squares, sums and
    1/H are float64, the sums in an order of the kernel's own, and ``round`` is to float32, once.
    rstd = 1 / sqrt(var + eps), eps as float32, and all of y: each operation is rounded to float32, none is
    fused with another, and y is rounded to x's dtype at the end.

    The order of a sum could only show where a float64 sum lies within its own error of the middle between
    two float32: for about one row in 10^6.

    PyTorch rounds otherwise: its sums are float32, and the last product and the bias are rounded as one.  A
    LayerNorm that gets no kernel is PyTorch's, in float32, rounded to x's dtype at the end.
    Source: torch.nn.LayerNorm.
    """

    eps: float


@dataclass(frozen=True)
class LayerNormSpec:
    """One fused site: what a kernel reads, computes and writes for each row of [T, hidden].

    Reads x in ``dtype``, then weight and bias [hidden] as far as their dtypes are not None.  Writes y
    (``writes_y``), q and scale: those of ``quantization``, of y as it is after it was rounded to ``dtype``.
    """

    hidden: int
    dtype: str
    norm: LayerNorm
    quantization: Quantization
    weight_dtype: str | None = None
    bias_dtype: str | None = None
    writes_y: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
