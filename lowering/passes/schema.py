"""Look up PyTorch's own description of an operation of the torch dialect."""

from __future__ import annotations

import torch

_NAMESPACES = ("aten", "prims", "lowering")


def overload(name: str) -> torch._ops.OpOverload | None:
    """The operation that has ``name`` in the torch dialect; None if PyTorch has none."""
    dialect, _, rest = name.partition(".")
    namespace, _, rest = rest.partition(".")
    if dialect != "torch" or namespace not in _NAMESPACES:
        return None
    packet, _, kind = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), kind or "default", None)
