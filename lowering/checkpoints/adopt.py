"""Put this project's layers in the place of other libraries' quantized ones, in a model that is in memory."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .foreign_layers import counterpart, is_foreign_hook


def adopt(model: nn.Module) -> nn.Module:
    """Replace the quantized layers of other libraries in ``model``, in place, by layers of ``lowering.nn``.

    Known are transformers' FP8Linear and FP8Experts, and linear layers that compressed-tensors or torchao
    quantized, as far as there is a layer for their format.  Codes and scales are the very tensors of the
    layer.  Returns ``model`` (the new layer when it is one itself), which is unchanged without such layers.
    Raises CheckpointError naming the layer and its format where there is no layer for it, before any change.
    """
    changes = _Changes(model)
    changes.make()
    return changes.root


@contextmanager
def adopted(model: nn.Module) -> Iterator[nn.Module]:
    """``adopt(model)`` for as long as the context lasts; the caller's model is as before afterwards."""
    changes = _Changes(model)
    changes.make()
    try:
        yield changes.root
    finally:
        changes.undo()


_Entry = tuple[MutableMapping[Any, Any], Any]


@dataclass
class _Changes:
    """What becomes of a model: modules by their parents, and hooks that decompress what is replaced."""

    root: nn.Module
    modules: list[tuple[_Entry, nn.Module]] = field(default_factory=list)
    hooks: list[_Entry] = field(default_factory=list)
    before: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = field(default_factory=list)

    def __post_init__(self):
        """Find every use of a foreign layer; a shared layer stays shared."""
        layer = counterpart("", self.root)
        if layer is not None:
            self.root = layer
            return
        made: dict[int, nn.Module | None] = {}
        for prefix, parent in self.root.named_modules():
            for child, module in parent._modules.items():
                if module is None:
                    continue
                if id(module) not in made:
                    made[id(module)] = counterpart(f"{prefix}.{child}".lstrip("."), module)
                layer = made[id(module)]
                if layer is not None:
                    self.modules.append(((parent._modules, child), layer))
            hooks = parent._forward_pre_hooks
            self.hooks += [(hooks, key) for key, hook in hooks.items() if is_foreign_hook(hook)]

    def make(self) -> None:
        """Replace the layers."""
        if not self.modules:
            return
        for held, _ in (*(entry for entry, _ in self.modules), *self.hooks):
            self.before.append((held, dict(held)))
        for (held, key), layer in self.modules:
            held[key] = layer
        for held, key in self.hooks:
            del held[key]

    def undo(self) -> None:
        """Put back what was there, in its order."""
        for held, entries in reversed(self.before):
            held.clear()
            held.update(entries)
