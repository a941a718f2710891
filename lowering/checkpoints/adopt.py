"""Put this project's layers in the place of other libraries' quantized ones, in a model that is in memory.

The codes and scales are the very tensors of the layer; nothing is quantized or dequantized.  A layer that
is known and has no counterpart is refused by name.  The libraries are not imported: a layer of
theirs can only be there if they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..nn import BlockScaledLinear
from .experts import QuantizedExperts, check_experts
from .schemes import E8M0, exact


def adopt(model: nn.Module) -> nn.Module:
    """Replace the quantized layers of other libraries in ``model``, in place, by layers of ``lowering.nn``.

    Known are transformers' FP8Linear and FP8Experts with square blocks and dynamic activations.  Returns
    ``model`` (the new layer when it is one itself); without such layers it is unchanged.  Raises
    CheckpointError naming the layer and its format where there is none for it; the model is then unchanged.
    """
    for parent, child, layer in _replacements(model):
        if parent is None:
            return layer
        parent._modules[child] = layer
    return model


@contextmanager
def adopted(model: nn.Module) -> Iterator[nn.Module]:
    """``adopt(model)`` for as long as the context lasts; the caller's model is as before afterwards."""
    replaced = _replacements(model)
    before = [(parent, child, parent._modules[child]) for parent, child, _ in replaced if parent is not None]
    try:
        for parent, child, layer in replaced:
            if parent is None:
                model = layer
            else:
                parent._modules[child] = layer
        yield model
    finally:
        for parent, child, module in before:
            parent._modules[child] = module


_Replacement = tuple["nn.Module | None", str, nn.Module]


def _replacements(model: nn.Module) -> list[_Replacement]:
    """Each use of a foreign layer with the layer that stands for it; a shared layer stays shared."""
    kinds = tuple(_kinds())
    made: dict[int, nn.Module] = {}

    def counterpart(name: str, module: nn.Module) -> nn.Module | None:
        for kind, make in kinds:
            if isinstance(module, kind):
                if id(module) not in made:
                    made[id(module)] = make(name, module)
                return made[id(module)] if made[id(module)] is not module else None
        return None

    layer = counterpart("", model)
    if layer is not None:
        return [(None, "", layer)]
    found = []
    for prefix, parent in model.named_modules():
        for child, module in parent._modules.items():
            layer = None if module is None else counterpart(f"{prefix}.{child}".lstrip("."), module)
            if layer is not None:
                found.append((parent, child, layer))
    return found


def _kinds() -> Iterator[tuple[type, Callable[[str, Any], nn.Module]]]:
    """The classes that are loaded, the narrower ones first, with what makes a counterpart of a layer."""
    fp8 = sys.modules.get("transformers.integrations.finegrained_fp8")
    for name, make in _FINEGRAINED_FP8.items() if fp8 is not None else ():
        if hasattr(fp8, name):
            yield getattr(fp8, name), make


# transformers' finegrained_fp8 ------------------------------------------------------------------


def _fp8_linear(name: str, layer: Any) -> nn.Module:
    if layer.weight.element_size() > 1:  # dequantized when it was loaded: computes as nn.Linear does
        return layer
    group = _block(name, layer)
    return _block_scaled(name, layer.weight, layer.weight_scale_inv, group, layer.bias).train(layer.training)


def _fp8_experts(name: str, layer: Any) -> nn.Module:
    ups = "gate_up_proj" if layer.has_gate else "up_proj"
    if getattr(layer, ups).element_size() > 1:
        return layer
    check_experts(name, layer)
    group = _block(name, layer)
    numbers = range(layer.num_experts)

    def linear(which: str, number: int) -> nn.Module:
        scale = getattr(layer, f"{which}_scale_inv")[number]
        return _block_scaled(f"{name}.{which}", getattr(layer, which)[number], scale, group, None)

    return QuantizedExperts(
        layer, [[linear(ups, number)] for number in numbers], [linear("down_proj", n) for n in numbers]
    )


def _grouped(name: str, layer: Any) -> nn.Module:
    raise CheckpointError(
        f"{name} is a {type(layer).__name__}: there is no layer for grouped FP8 products yet"
    )


_FINEGRAINED_FP8 = {
    "FP8GroupedLinear": _grouped,
    "FP8Linear": _fp8_linear,
    "FP8Experts": _fp8_experts,
}


def _block(name: str, layer: Any) -> int:
    """The size of the layer's square blocks."""
    described = f"{name or 'the model'} is a {type(layer).__name__}"
    if layer.activation_scheme != "dynamic" or layer.block_size is None:
        raise CheckpointError(
            f"{described} with {layer.activation_scheme} activations and block_size {layer.block_size}: "
            "there is a layer for blocks with dynamic activations only"
        )
    rows, columns = layer.block_size
    if rows != columns:
        raise CheckpointError(
            f"{described} in blocks of {rows} x {columns}: there is a layer for square ones"
        )
    return rows


def _block_scaled(
    name: str, weight: torch.Tensor, scale: torch.Tensor, group: int, bias: nn.Parameter | None
) -> BlockScaledLinear:
    rows, depth = weight.shape
    blocks = (-(-rows // group), -(-depth // group))
    if weight.dtype != torch.float8_e4m3fn or tuple(scale.shape) != blocks:
        raise CheckpointError(
            f"{name or 'the model'}: weight {weight.dtype} {list(weight.shape)} with scales "
            f"{list(scale.shape)}; expected float8_e4m3fn with {list(blocks)} for blocks of {group}"
        )
    encoding = "ue8m0" if scale.dtype == E8M0 else "float32"
    return BlockScaledLinear.from_codes(weight.detach(), exact(scale), group, bias, scale=encoding)
