"""Quantize layers, by the one call that puts quantized ones into a loaded model.

Weights are quantized once, here; activations at every call, by ``torch.ops.lowering.group_quant``,
which is what the compiler fuses with the norm before it.  No compiler is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from . import ops as _ops  # noqa: F401  registers torch.ops.lowering.*
from .weight_reads import weights_read

WEIGHT_DTYPE = torch.float8_e4m3fn
_QMAX = torch.finfo(WEIGHT_DTYPE).max
_AMAX_FLOOR = 1e-10
_WHOLE_ROW = 0  # as a size of groups

LM_HEAD = ("lm_head",)
"""Left alone by ``quantize`` unless it is told otherwise: the projection to a model's vocabulary."""


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
        _check_group(group_size)
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
        layer = cls(linear.in_features, linear.out_features, group_size, bias=False, device="meta")
        layer.weight, layer.weight_scale = quantized or quantize_weight(linear.weight, group_size)
        layer.bias = linear.bias
        return layer.train(linear.training)

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


def quantize(model: nn.Module, *, group_size: int = 128, exclude: str | Iterable[str] = LM_HEAD) -> nn.Module:
    """Replace the nn.Linear layers of ``model``, in place and one by one, by BlockScaledLinear.

    A layer is left alone when ``exclude``, one pattern (fnmatch) or several, names it or a module around it,
    in full or by the last part of the name; so are subclasses of nn.Linear, which may mean something
    else.  A layer or a weight that is used in several places is quantized once and stays shared.  Returns
    ``model`` (the new layer when ``model`` is an nn.Linear itself).

    Raises TypeError when ``exclude`` is no name, and ValueError when it names nothing in this model (but for
    an lm_head, which not every model has): a mistyped name would be quantized in silence.

    Two kinds of layers stay as they are, with a warning: those of fewer in_features than one group, which are
    not worth it, and those whose weight other code of the model reads, which means its values.  Layers whose
    last group is short are warned of: what they read is padded at each call, which no kernel does.  Raises
    ValueError where the model has no nn.Linear, or none but its lm_head; it is then unchanged.
    """
    patterns = _patterns(exclude)
    _check_group(group_size)
    _check_patterns(patterns, model)
    _check_any(model, patterns)
    sites = [site for site in _linear_layers(model) if not _excluded(site[0], patterns)]
    sites = _without_read(sites, weights_read(model))
    sites = _without_small(sites, group_size)
    _warn_of_short(sites, group_size)
    layers: dict[int, BlockScaledLinear] = {}
    weights: dict[int, tuple[Tensor, Tensor]] = {}
    sites.reverse()
    while sites:
        # Popped, so that a weight is freed before the next one is quantized.
        name, parent, linear = sites.pop()
        if id(linear) not in layers:
            key = id(linear.weight)
            if key not in weights:
                weights[key] = quantize_weight(linear.weight, group_size)
            layers[id(linear)] = BlockScaledLinear.from_linear(linear, group_size, weights[key])
        if parent is None:
            return layers[id(linear)]
        setattr(parent, name.rpartition(".")[2], layers[id(linear)])
    return model


_Site = tuple[str, "nn.Module | None", nn.Linear]


def _check_any(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Raise ValueError where the model has no nn.Linear, or none but the head."""
    names = [name for name, _, _ in _linear_layers(model)]
    default = tuple(pattern for pattern in patterns if pattern in LM_HEAD)
    if not all(_excluded(name, default) for name in names):
        return
    others = {type(module).__name__ for module in model.modules() if _is_like_linear(module)}
    but = [f"{', '.join(names)}, which is excluded"] if names else []
    but += [f"{', '.join(sorted(others))}, which may mean something else"] if others else []
    raise ValueError(
        "nothing to quantize: the model has no nn.Linear" + (f" but {', and '.join(but)}" if but else "")
    )


def _is_like_linear(module: nn.Module) -> bool:
    """Tell whether a module looks like a linear layer, and is of a class of its own."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
    return type(module) is not nn.Linear and (is_matrix or "Linear" in type(module).__name__)


def _without_read(sites: list[_Site], read: dict[str, str]) -> list[_Site]:
    """Keep the layers whose weight nothing but their own call reads."""
    found = {f"{name.rpartition('.')[2]} ({read[name]})" for name, _, _ in sites if name in read}
    if found:
        warnings.warn(
            "not quantized, since other code of the model reads their weight and means its values: "
            + ", ".join(sorted(found)),
            stacklevel=3,
        )
    return [site for site in sites if site[0] not in read]


def _without_small(sites: list[_Site], group_size: int) -> list[_Site]:
    """Keep the layers with a whole group in a row; all of them, with short groups, if none has one."""
    small = [name for name, _, linear in sites if linear.in_features < group_size]
    if len(small) in (0, len(sites)):
        return sites
    warnings.warn(
        f"not quantized, since a row is shorter than one group of {group_size}: {', '.join(small)}",
        stacklevel=3,
    )
    return [site for site in sites if site[0] not in small]


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, nn.Linear]]:
    """(qualified name, parent, layer) of every use of an nn.Linear, shared layers at each use."""
    if type(model) is nn.Linear:
        yield "", None, model
    for prefix, parent in model.named_modules():
        for child, module in parent._modules.items():
            if type(module) is nn.Linear:
                yield f"{prefix}.{child}".lstrip("."), parent, module


def _patterns(exclude: str | Iterable[str]) -> tuple[str, ...]:
    """``exclude`` as several patterns: a string is one, not the letters of it."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        exclude = (exclude,)
    patterns = tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude is the name of a layer or several, and {pattern!r} is no name")
    return patterns


def _check_patterns(patterns: tuple[str, ...], model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if pattern in LM_HEAD or any(_excluded(name, (pattern,)) for name in names):
            continue
        linear = [name for name, _, _ in _linear_layers(model) if name]
        candidates = list(dict.fromkeys([*(name.rpartition(".")[2] for name in linear), *linear]))
        near = get_close_matches(pattern, candidates, n=6) or candidates[:6]
        raise ValueError(
            f"exclude {pattern!r} names no layer of the model; it has {', '.join(near) or 'none'}"
        )


def _excluded(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a pattern names the layer or a module around it, in full or by the end of the name."""
    parts = name.split(".")
    names = (*parts, *(".".join(parts[:count]) for count in range(2, len(parts) + 1)))
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_group(group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"group_size is the length of a group, and {group_size} is none")


def _warn_of_short(sites: list[_Site], group_size: int) -> None:
    """Name the layers whose last group is short, and a group size that divides all of them."""
    depths = {linear.in_features for _, _, linear in sites}
    short = sorted(depth for depth in depths if depth % group_size)
    if short:
        fitting = next((size for size in (128, 64, 32) if not any(depth % size for depth in depths)), None)
        warnings.warn(
            f"rows of {', '.join(map(str, short))} are no whole groups of {group_size}: what these layers "
            "read is padded at each call, and their quantization is no part of the kernel before it"
            + (f"; group_size {fitting} divides all" if fitting else ""),
            stacklevel=3,
        )
