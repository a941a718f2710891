"""Define the quantized layers: codes and scales of a weight, and the product with a quantized activation.

Activations are quantized at every call, by ``torch.ops.lowering.group_quant``, which is what the compiler
fuses with the norm before it.  No compiler is imported here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops as _ops  # noqa: F401  registers torch.ops.lowering.*

WEIGHT_DTYPE = torch.float8_e4m3fn
_QMAX = torch.finfo(WEIGHT_DTYPE).max
_AMAX_FLOOR = 1e-10
_WHOLE_ROW = 0  # as a size of groups


class BlockScaledLinear(nn.Module):
    """y = x . weight^T + bias with fp8 weights and activations (W8A8, 1xG by GxG scales).

    x: [..., in_features] float32, bfloat16 or float16; y: [..., out_features] in x's dtype.  The
    activation is quantized in groups of ``group_size`` (``group_quant``), the product is
    ``block_scaled_matmul``, rounded to x's dtype before the bias is added.

    weight: float8_e4m3fn [out_features, K], K being in_features rounded up to whole groups, then zeros;
    weight_scale: float32 [ceil(out_features / G), K / G]; both are buffers, and keep their dtype when the
    model is cast.  bias: [out_features] or None.  The last group of a row may be short: the activation is
    padded with zeros, which changes nothing that is computed.  scale: how the activation's scales are
    encoded, ``float32`` or ``ue8m0`` (powers of two, as a checkpoint of that scale_fmt was made for).
    Raises ValueError for a G below 1.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        bias: bool = True,
        *,
        scale: str = "float32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_group(group_size)
        self.scale = scale
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.padding = -in_features % group_size
        depth = in_features + self.padding
        blocks = (-(-out_features // group_size), depth // group_size)
        weight = torch.zeros(out_features, depth, dtype=WEIGHT_DTYPE, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.ones(blocks, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 128, quantized: tuple[Tensor, Tensor] | None = None
    ) -> BlockScaledLinear:
        """The layer that stands for ``linear``; it shares the bias and quantizes the weight.

        quantized: what ``quantize_weight`` returned for this weight, when it is known already.
        """
        return cls.from_weight(linear.weight, linear.bias, group_size, quantized).train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None,
        group_size: int = 128,
        quantized: tuple[Tensor, Tensor] | None = None,
    ) -> BlockScaledLinear:
        """The layer x . weight^T + bias of a ``weight`` [N, K]; ``quantized`` as in ``from_linear``."""
        rows, depth = weight.shape
        layer = cls(depth, rows, group_size, bias=False, device="meta")
        layer.weight, layer.weight_scale = quantized or quantize_weight(weight, group_size)
        layer.bias = bias
        return layer

    @classmethod
    def from_codes(
        cls,
        weight: Tensor,
        weight_scale: Tensor,
        group_size: int,
        bias: nn.Parameter | None = None,
        *,
        scale: str = "float32",
    ) -> BlockScaledLinear:
        """The layer of a weight that is quantized already: its codes and scales as they are, not copied.

        weight: float8_e4m3fn [N, K]; weight_scale: float32 [ceil(N/G), ceil(K/G)].  Only a weight whose last
        group is short becomes a copy, with zeros behind K.
        """
        rows, depth = weight.shape
        layer = cls(depth, rows, group_size, bias=False, scale=scale, device="meta")
        if layer.padding:
            weight = nn.functional.pad(weight.view(torch.uint8), (0, layer.padding)).view(WEIGHT_DTYPE)
        layer.weight, layer.weight_scale, layer.bias = weight, weight_scale, bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.padding:
            x = nn.functional.pad(x, (0, self.padding))
        q, scale = torch.ops.lowering.group_quant(x, self.group_size, scale=self.scale)
        y = torch.ops.lowering.block_scaled_matmul(q, self.weight, scale, self.weight_scale, x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
            + (f", scale={self.scale}" if self.scale != "float32" else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockScaledLinear:
        """Move with the model, but stay fp8: ``model.to(torch.bfloat16)`` is about the other weights."""
        weight, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        if self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class ScaledLinear(nn.Module):
    """y = x . weight^T + bias with 8-bit weights and activations that have one scale for a row, or for all.

    x: [..., in_features] float32, bfloat16 or float16; y: [..., out_features] in x's dtype.  The activation
    is quantized in whole rows by ``group_quant`` (scale = amax / qmax), or, where there is an
    ``input_scale``, with that, by ``static_quant``.  The product is ``block_scaled_matmul``,
    rounded to x's dtype before the bias is added.

    weight: float8_e4m3fn or int8 [out_features, in_features]; weight_scale: float32 [out_features, 1] or
    [1, 1]; input_scale: float32 [1] or None; all are buffers, and keep their dtype when the model is cast.
    bias: [out_features] or None.  Raises ValueError, when called, for tensors that do not fit each other.
    Source: compressed-tensors' and ModelOpt's FP8 and W8A8 layers, as vLLM computes them.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        bias: nn.Parameter | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)
        self.bias = bias

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize the activation ``x``: its codes, in the weight's dtype, and their scales."""
        dtype, scale = self.weight.dtype, self.input_scale
        if scale is None:
            return torch.ops.lowering.group_quant(x, _WHOLE_ROW, dtype=dtype)
        lowest = -128.0 if dtype == torch.int8 else None
        return torch.ops.lowering.static_quant(x, scale, dtype=dtype, lowest=lowest), scale

    def forward(self, x: Tensor) -> Tensor:
        q, scale = self.codes(x)
        y = torch.ops.lowering.block_scaled_matmul(q, self.weight, scale, self.weight_scale, x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight={str(self.weight.dtype).removeprefix('torch.')}, "
            f"scale={list(self.weight_scale.shape)}, "
            f"activations={'per token' if self.input_scale is None else 'static'}, "
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledLinear:
        """Move with the model, but keep codes and scales: a cast is about the other weights."""
        held = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in held.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def quantize_weight(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantize [N, K] in blocks of G x G: q float8_e4m3fn [N, Kp], scale float32 [ceil(N/G), Kp/G].

    Kp is K rounded up to whole groups; what is behind K is zero.
    Per block: scale = max(max|w|, 1e-10) / 448, q = round(clamp(w / scale)).
    """
    rows, depth = weight.shape
    w32 = weight.detach().to(torch.float32)
    padded = nn.functional.pad(w32, (0, -depth % group_size, 0, -rows % group_size))
    blocks = padded.unflatten(1, (-1, group_size)).unflatten(0, (-1, group_size))
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=_AMAX_FLOOR) / torch.full((), _QMAX, device=weight.device)
    q = (blocks / scale[:, None, :, None]).clamp(-_QMAX, _QMAX).to(WEIGHT_DTYPE)
    return q.flatten(2, 3).flatten(0, 1)[:rows].clone(), scale


def check_group(group_size: int) -> None:
    """Raise ValueError for a size that no group has."""
    if group_size < 1:
        raise ValueError(f"group_size is the length of a group, and {group_size} is none")
