"""Make the tensors of transformers' caches that a model holds its buffers, as long as it is exported.

A cache is no module, so torch.export takes its tensors for constants, and what is written to them is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Held:
    """A tensor of a cache, where the cache has it, and the buffer that it is."""

    tensor: Tensor
    attributes: dict[Any, Any]
    key: Any
    part: torch.nn.Module
    buffer: str


def caches(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, Any]]:
    """The caches that parts of ``module`` hold: the part, by name, and the cache, by the attribute's name."""
    modeling = sys.modules.get("transformers.cache_utils")
    if modeling is None:
        return
    for where, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, modeling.Cache):
                yield where, part, name, value


@contextmanager
def as_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Have the caches in ``module`` read and write buffers of it while it is called."""
    own: dict[int, tuple[torch.nn.Module, str]] = {}
    for part in module.modules():
        own |= {id(tensor): (part, name) for name, tensor in part.named_buffers(recurse=False)}
    held, added = [], []
    for _, part, name, cache in list(caches(module)):
        for tensor, attributes, key, path in _tensors(cache):
            if id(tensor) not in own:
                own[id(tensor)] = part, f"{name}_{path}"
                part.register_buffer(f"{name}_{path}", tensor, persistent=False)
                added.append(own[id(tensor)])
            held.append(_Held(tensor, attributes, key, *own[id(tensor)]))

    def bind(*_: Any) -> None:
        # torch.export puts others in the places of buffers while it calls the module.
        for each in held:
            each.attributes[each.key] = each.part._buffers[each.buffer]

    hook = module.register_forward_pre_hook(bind)
    try:
        yield
    finally:
        hook.remove()
        for each in held:
            each.attributes[each.key] = each.tensor
        for part, name in added:
            del part._buffers[name]


def _tensors(cache: Any) -> Iterator[tuple[Tensor, dict[Any, Any], Any, str]]:
    """The tensors of a cache's layers, each with the dictionary that has it, its key there and a name."""
    for number, layer in enumerate(cache.layers):
        for name, value in list(vars(layer).items()):
            if isinstance(value, Tensor):
                yield value, vars(layer), name, f"{number}_{name}"
            elif isinstance(value, dict):
                for key, inner in list(value.items()):
                    if isinstance(inner, Tensor):
                        yield inner, value, key, f"{number}_{name}_{key}"
