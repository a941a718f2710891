"""Put quantized layers into a loaded model: linear layers, and the experts of mixtures.

Weights are quantized once, here.  No compiler is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..weight_reads import weights_read
from .experts import QuantizedExperts
from .layers import BlockScaledLinear, check_group, quantize_weight
from .linears import Site, is_like_linear, linear_sites

LM_HEAD = ("lm_head",)
"""Left alone by ``quantize`` unless it is told otherwise: the projection to a model's vocabulary."""

_RESULT = "_quantization"


@dataclass(frozen=True)
class Quantization:
    """Tell what ``quantize`` did: what each layer became, by name, and why others were left."""

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.changed.items()]
        return "\n".join([*lines, *(f"{name}: left, {why}" for name, why in self.left.items())])


def quantization(model: nn.Module) -> Quantization:
    """What the last ``quantize`` did to ``model``; empty if there was none."""
    return vars(model).get(_RESULT, Quantization())


def quantize(model: nn.Module, *, group_size: int = 128, exclude: str | Iterable[str] = LM_HEAD) -> nn.Module:
    """Replace the linear layers of ``model``, in place and one by one, by BlockScaledLinear.

    Linear is what computes x . weight^T + bias: nn.Linear, transformers' Conv1D, and any other module of one
    matrix that gives that for random inputs (``linears``).  Mixtures of experts whose parameters are
    three-dimensional, as transformers has them, become QuantizedExperts, with a layer for each expert.

    A layer is left alone when ``exclude``, one pattern (fnmatch) or several, names it or a module around it,
    in full or by the last part of the name.  A layer or a weight that is used in several places is quantized
    once and stays shared.  Returns ``model`` (the new layer when ``model`` is linear itself);
    ``quantization`` of it says what was changed, and what was left and why.

    Raises TypeError when ``exclude`` is no name, and ValueError when it names nothing in this model (but for
    an lm_head, which not every model has): a mistyped name would be quantized in silence.

    Two kinds of layers stay as they are, with a warning: those of fewer in_features than one group, which are
    not worth it, and those whose weight other code of the model reads, which means its values.  Layers whose
    last group is short are warned of: what they read is padded at each call, which no kernel does.  Raises
    ValueError where the model has no linear layer, or none but its lm_head; it is then unchanged.
    """
    patterns = _patterns(exclude)
    check_group(group_size)
    sites, experts = list(linear_sites(model)), dict(_experts(model))
    _check_patterns(patterns, model, sites)
    done = Quantization(left=_other_left(model, sites, experts))
    _check_any(model, sites, experts, patterns)
    left = {site.name: "excluded" for site in sites if _excluded(site.name, patterns)}
    left |= {name: "excluded" for name in experts if _excluded(name, patterns)}
    left |= _read(sites, left, weights_read(model, {site.name for site in sites}))
    left |= _small(sites, experts, left, group_size)
    done.left.update(left)
    kept = [site for site in sites if site.name not in left]
    _warn_of_short(kept, group_size)
    for name, module in experts.items():
        if name not in left:
            _put(model, name, _quantized_experts(module, group_size))
            done.changed[name] = f"{type(module).__name__}, a layer for each of its experts"
    return _replaced(model, kept, group_size, done)


def _replaced(model: nn.Module, sites: list[Site], group_size: int, done: Quantization) -> nn.Module:
    layers: dict[int, BlockScaledLinear] = {}
    weights: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    result = model
    sites.reverse()
    while sites:
        # Popped, so that a weight is freed before the next one is quantized.
        site = sites.pop()
        if id(site.module) not in layers:
            # A transposed weight is another tensor of the same memory each time it is looked at.
            key = (site.weight.data_ptr(), *site.weight.shape, *site.weight.stride())
            if key not in weights:
                weights[key] = quantize_weight(site.weight, group_size)
            layer = BlockScaledLinear.from_weight(site.weight, site.bias, group_size, weights[key])
            layers[id(site.module)] = layer.train(site.module.training)
        done.changed[site.name] = f"{type(site.module).__name__}, groups of {group_size}"
        if site.parent is None:
            result = layers[id(site.module)]
        else:
            setattr(site.parent, site.name.rpartition(".")[2], layers[id(site.module)])
    vars(result)[_RESULT] = done
    return result


# --- what is left --------------------------------------------------------------------------------------


def _check_any(
    model: nn.Module, sites: list[Site], experts: dict[str, nn.Module], patterns: tuple[str, ...]
) -> None:
    """Raise ValueError where the model has nothing to quantize, or nothing but the head."""
    default = tuple(pattern for pattern in patterns if pattern in LM_HEAD)
    names = [site.name for site in sites]
    if experts or not all(_excluded(name, default) for name in names):
        return
    linear = {id(site.module) for site in sites}
    others = {type(m).__name__ for m in model.modules() if is_like_linear(m) and id(m) not in linear}
    but = [f"{', '.join(names)}, which is excluded"] if names else []
    but += [f"{', '.join(sorted(others))}, which may mean something else"] if others else []
    raise ValueError(
        "nothing to quantize: the model has no nn.Linear" + (f" but {', and '.join(but)}" if but else "")
    )


def _other_left(model: nn.Module, sites: list[Site], experts: dict[str, nn.Module]) -> dict[str, str]:
    """The modules with a matrix, or several in one parameter, that are of no known kind."""
    known = {id(site.module) for site in sites} | {id(module) for module in experts.values()}
    left = {}
    for name, module in model.named_modules():
        many = any(p is not None and p.dim() == 3 for p in module._parameters.values())
        matrix = is_like_linear(module) and not module._modules
        if id(module) not in known and (matrix or (many and not isinstance(module, nn.modules.conv._ConvNd))):
            left[name] = f"a {type(module).__name__} computes something else than a product with its weight"
    return left


def _read(sites: list[Site], left: dict[str, str], read: dict[str, str]) -> dict[str, str]:
    """The layers whose weight other code than their own call reads."""
    found = {site.name: read[site.name] for site in sites if site.name in read and site.name not in left}
    if found:
        told = sorted({f"{name.rpartition('.')[2]} ({where})" for name, where in found.items()})
        warnings.warn(
            "not quantized, since other code of the model reads their weight and means its values: "
            + ", ".join(told),
            stacklevel=3,
        )
    return {name: f"its weight is read at {where}" for name, where in found.items()}


def _small(
    sites: list[Site], experts: dict[str, nn.Module], left: dict[str, str], group_size: int
) -> dict[str, str]:
    """The layers without a whole group in a row; none, which get short groups, if that is all of them."""
    kept = [site for site in sites if site.name not in left]
    small = [site.name for site in kept if site.weight.shape[1] < group_size]
    if len(small) == len(kept) and not experts:
        return {}
    mixtures: dict[str, Any] = {name: module for name, module in experts.items() if name not in left}
    small += [name for name, module in mixtures.items() if min(_depths(module)) < group_size]
    if small:
        warnings.warn(
            f"not quantized, since a row is shorter than one group of {group_size}: {', '.join(small)}",
            stacklevel=3,
        )
    return dict.fromkeys(small, f"a row is shorter than one group of {group_size}")


def _warn_of_short(sites: list[Site], group_size: int) -> None:
    """Name the layers whose last group is short, and a group size that divides all of them."""
    depths = {site.weight.shape[1] for site in sites}
    short = sorted(depth for depth in depths if depth % group_size)
    if short:
        fitting = next((size for size in (128, 64, 32) if not any(depth % size for depth in depths)), None)
        warnings.warn(
            f"rows of {', '.join(map(str, short))} are no whole groups of {group_size}: what these layers "
            "read is padded at each call, and their quantization is no part of the kernel before it"
            + (f"; group_size {fitting} divides all" if fitting else ""),
            stacklevel=3,
        )


# --- experts -------------------------------------------------------------------------------------------


def _experts(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The mixtures of experts of transformers 5, which hold each weight of all experts in one parameter."""
    for name, module in model.named_modules():
        gated = getattr(module, "has_gate", True)
        known = hasattr(module, "_apply_gate") and (gated or hasattr(module, "act_fn"))
        if known and not getattr(module, "has_post_expert_norm", False) and _weights(module):
            yield name, module


def _weights(experts: Any) -> list[Tensor]:
    """The parameters [E, N, K], or [E, K, N] where they are transposed: up, and down behind it."""
    names = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    found = [experts._parameters.get(name) for name in names]
    floats = all(w is not None and w.dim() == 3 and w.element_size() > 1 for w in found)
    return found if floats else []  # pyright: ignore[reportReturnType]


def _depths(experts: Any) -> list[int]:
    transposed = getattr(experts, "is_transposed", False)
    return [weight.shape[1 if transposed else 2] for weight in _weights(experts)]


def _quantized_experts(experts: Any, group_size: int) -> QuantizedExperts:
    up, down = _weights(experts)
    up_name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"

    def layer(weights: Tensor, name: str, number: int) -> nn.Module:
        weight = weights[number].T if getattr(experts, "is_transposed", False) else weights[number]
        biases = getattr(experts, f"{name}_bias", None) if getattr(experts, "has_bias", False) else None
        bias = None if biases is None else nn.Parameter(biases[number].detach(), requires_grad=False)
        return BlockScaledLinear.from_weight(weight, bias, group_size)

    numbers = range(len(up))
    return QuantizedExperts(
        experts,
        [[layer(up, up_name, number)] for number in numbers],
        [layer(down, "down_proj", number) for number in numbers],
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# --- names ---------------------------------------------------------------------------------------------


def _patterns(exclude: str | Iterable[str]) -> tuple[str, ...]:
    """``exclude`` as several patterns: a string is one, not the letters of it."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        exclude = (exclude,)
    patterns = tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude is the name of a layer or several, and {pattern!r} is no name")
    return patterns


def _check_patterns(patterns: tuple[str, ...], model: nn.Module, sites: list[Site]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if pattern in LM_HEAD or any(_excluded(name, (pattern,)) for name in names):
            continue
        linear = [site.name for site in sites if site.name]
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
