"""Recognise quantized layers of other libraries, and make this project's layers of their codes and scales.

Nothing is quantized or dequantized here, and no tensor of codes is copied.  A layer that is known and has no
counterpart is refused by name.  The libraries are not imported: a layer of theirs is only there if they are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import BlockScaledLinear, QuantizedExperts, ScaledLinear
from . import formats
from .experts import check_experts
from .schemes import E8M0, exact


def counterpart(name: str, module: nn.Module) -> nn.Module | None:
    """The layer that stands for ``module``, called ``name`` in its model; None for what is no foreign layer.

    Raises CheckpointError where there is no layer for its format.
    """
    name = name or "the model"
    fp8: Any = sys.modules.get("transformers.integrations.finegrained_fp8")
    if fp8 is not None and isinstance(module, (fp8.FP8Linear, fp8.FP8Experts)):
        return _finegrained(name, module, fp8)
    if not isinstance(module, nn.Linear):
        return None
    if getattr(module, "quantization_scheme", None) is not None:
        return _compressed(name, module)
    if type(module.weight.data).__module__.startswith("torchao.") or _is_torchao(module.weight):
        return _torchao(name, module)
    return None


def is_foreign_hook(hook: Any) -> bool:
    """Tell whether a hook decompresses the whole model before its first call, as compressed-tensors' does."""
    return getattr(hook, "__module__", "").startswith("compressed_tensors.")


# transformers' finegrained_fp8 ------------------------------------------------------------------


def _finegrained(name: str, layer: Any, fp8: Any) -> nn.Module | None:
    if isinstance(layer, getattr(fp8, "FP8GroupedLinear", ())):
        raise CheckpointError(
            f"{name} is a {type(layer).__name__}: there is no layer for grouped FP8 products yet"
        )
    if isinstance(layer, fp8.FP8Experts):
        return _fp8_experts(name, layer)
    if layer.weight.element_size() > 1:  # dequantized when it was loaded: computes as nn.Linear does
        return None
    return _fp8_linear(name, layer).train(layer.training)


def _fp8_linear(name: str, layer: Any) -> nn.Module:
    if layer.block_size is not None:
        group = _block(name, layer)
        return _block_scaled(name, layer.weight, layer.weight_scale_inv, group, layer.bias)
    given = layer.activation_scale
    return _scaled(name, layer.weight, layer.weight_scale_inv, given, layer.bias)


def _fp8_experts(name: str, layer: Any) -> nn.Module | None:
    up = "gate_up_proj" if layer.has_gate else "up_proj"
    if getattr(layer, up).element_size() > 1 and getattr(layer, up).is_floating_point():
        return None
    check_experts(name, layer)
    group = _block(name, layer)

    def linear(which: str, number: int) -> nn.Module:
        scale = getattr(layer, f"{which}_scale_inv")[number]
        return _block_scaled(f"{name}.{which}", getattr(layer, which)[number], scale, group, None)

    numbers = range(layer.num_experts)
    return QuantizedExperts(
        layer, [[linear(up, number)] for number in numbers], [linear("down_proj", n) for n in numbers]
    )


def _block(name: str, layer: Any) -> int:
    """The size of the layer's square blocks."""
    described = f"{name} is a {type(layer).__name__}"
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


# compressed-tensors -----------------------------------------------------------------------------


def _compressed(name: str, layer: Any) -> nn.Module | None:
    status = getattr(layer.quantization_status, "value", layer.quantization_status)
    scheme = formats.compressed_group(f"{name} (a Linear)", layer.quantization_scheme.model_dump())
    if status != "compressed":
        raise CheckpointError(
            f"{name} is quantized by compressed-tensors and was decompressed ({status}), as its first call "
            "does; adopt or compile the model before it is called"
        )
    tensors: Any = {part.name: getattr(layer, part.of(".weight").lstrip("."), None) for part in scheme.parts}
    size = (layer.out_features, layer.in_features)
    for part in scheme.parts:
        tensor = tensors[part.name]
        if tensor is None and part.optional:
            del tensors[part.name]
        elif tensor is None or tensor.dtype not in part.dtypes or tensor.shape not in part.shapes(*size):
            found = "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{name}: {part.of('.weight').lstrip('.')} of {scheme.format} is {found}")
    return scheme.layer({key: tensor.detach() for key, tensor in tensors.items()}, layer.bias)


# torchao ----------------------------------------------------------------------------------------


def _is_torchao(weight: Tensor) -> bool:
    base: Any = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", ())
    return isinstance(weight, base)


def _torchao(name: str, layer: nn.Linear) -> nn.Module:
    weight: Any = layer.weight
    kind, inputs = type(weight).__name__, getattr(weight, "act_quant_kwargs", None)
    granularity = type(getattr(inputs, "granularity", None)).__name__
    plain = not any(
        getattr(weight, what, None) is not None for what in ("act_pre_scale", "act_quant_zero_point")
    )
    bounds = (getattr(inputs, "hp_value_lb", None), getattr(inputs, "hp_value_ub", None))
    symmetric = getattr(getattr(inputs, "mapping_type", None), "name", "SYMMETRIC") == "SYMMETRIC"
    whole = not getattr(weight, "reduce_range", False) and bounds == (None, None)
    zero = getattr(weight, "zero_point", None)
    known = kind in ("Float8Tensor", "Int8Tensor") and plain and symmetric and whole
    if not known or granularity != "PerRow" or (zero is not None and bool(zero.any())):
        raise CheckpointError(
            f"{name} is a Linear of torchao's {kind} (activations: {inputs}): there is a layer for FP8 and "
            "INT8 with symmetric dynamic activations per row only"
        )
    return _scaled(name, weight.qdata, weight.scale, getattr(weight, "act_quant_scale", None), layer.bias)


# What they share --------------------------------------------------------------------------------


def _scaled(
    name: str, weight: Tensor, scale: Tensor, given: Tensor | None, bias: nn.Parameter | None
) -> ScaledLinear:
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8) or scale.numel() not in (1, len(weight)):
        raise _misfit(name, weight, scale, "one for each row, or for all")
    if given is not None and given.numel() != 1:
        raise CheckpointError(f"{name}: activations have {given.numel()} given scales; expected one")
    given = None if given is None else exact(given).reshape(1)
    return ScaledLinear(weight.detach(), exact(scale).reshape(-1, 1), given, bias)


def _block_scaled(
    name: str, weight: Tensor, scale: Tensor, group: int, bias: nn.Parameter | None
) -> BlockScaledLinear:
    rows, depth = weight.shape
    blocks = (-(-rows // group), -(-depth // group))
    if weight.dtype != torch.float8_e4m3fn or tuple(scale.shape) != blocks:
        raise _misfit(name, weight, scale, f"{list(blocks)} for blocks of {group}")
    encoding = "ue8m0" if scale.dtype == E8M0 else "float32"
    return BlockScaledLinear.from_codes(weight.detach(), exact(scale), group, bias, scale=encoding)


def _misfit(name: str, weight: Tensor, scale: Tensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: weight {weight.dtype} {list(weight.shape)} with scales {list(scale.shape)}; "
        f"expected scales {expected}"
    )
