"""Find the modules of a model that compute x . weight^T + bias, whatever their class is called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Times an ulp of float32, of the sum of magnitudes: what another order of a sum comes to.
_ROUNDINGS = 64


@dataclass(frozen=True)
class Site:
    """One use of a module that is linear: weight [N, K], bias [N] or None."""

    name: str
    parent: nn.Module | None
    module: nn.Module
    weight: Tensor
    bias: nn.Parameter | None


def linear_sites(model: nn.Module) -> Iterator[Site]:
    """Every use of a linear module, shared ones at each use.

    nn.Linear is one.  Another class is one if it has a matrix ``weight`` and a ``bias`` at most, and gives
    for random inputs what one of the two products with that matrix gives: transformers' Conv1D, whose weight
    is [K, N], and the subclasses of nn.Linear that spell the product out.
    """
    known: dict[int, tuple[Tensor, nn.Parameter | None] | None] = {}
    places: list[tuple[str, nn.Module | None, nn.Module | None]] = [("", None, model)]
    for prefix, parent in model.named_modules():
        names = [(f"{prefix}.{child}".lstrip("."), module) for child, module in parent._modules.items()]
        places += [(name, parent, module) for name, module in names]
    for name, parent, module in places:
        if module is None:
            continue
        if id(module) not in known:
            known[id(module)] = _linear(module)
        found = known[id(module)]
        if found is not None:
            yield Site(name, parent, module, *found)


def is_like_linear(module: nn.Module) -> bool:
    """Tell whether a module looks as if it were linear, by its weight or its name."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
    return is_matrix or "Linear" in type(module).__name__


def _linear(module: nn.Module) -> tuple[Tensor, nn.Parameter | None] | None:
    """The weight [N, K] and the bias of a module that is linear."""
    held: dict[str, Any] = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    weight, bias = held.get("weight"), held.get("bias")
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if not set(held) <= {"weight", "bias"} or module._buffers or module._modules:
        return None
    if weight is None or weight.dim() != 2 or weight.dtype not in _FLOATS or weight.is_meta:
        return None
    if bias is not None and bias.dim() != 1:
        return None
    return next(((w, bias) for w in (weight, weight.T) if _computes(module, w, bias)), None)


def _computes(module: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether ``module`` gives x . weight^T + bias for random x."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, weight.shape[1], generator=generator) * 4).to(weight.device)
    bias = None if bias is None else bias.float()
    if bias is not None and len(bias) != len(weight):
        return False
    with torch.no_grad():
        try:
            y = copy.deepcopy(module).float()(x.clone())
        except Exception:  # whatever a module says to arguments that it does not take
            return False
        weight = weight.float()
        expected = nn.functional.linear(x, weight, bias)
        magnitude = nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    allowed = _ROUNDINGS * torch.finfo(torch.float32).eps * magnitude
    return bool(((y - expected).abs() <= allowed).all()) and bool(expected.any())
