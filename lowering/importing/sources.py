"""Read what a caller gives to be compiled: one model, or several as functions of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..signature import RESERVED

Functions = Mapping[str, Sequence[Any]]
"""Models by the names of their functions: ``(module, args)``, ``(module, args, dynamic_shapes)`` or
``(module, args, kwargs, dynamic_shapes)``."""


@dataclass(frozen=True)
class Source:
    """A model to import, as torch.export takes it; of an ExportedProgram the module alone counts."""

    module: torch.nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None


def sources_of(module: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> dict[str, Source]:
    """The models to import, by function.  Raises UsageError for what is no dictionary of functions."""
    if not isinstance(module, Mapping):
        return {"main": Source(module, args, kwargs, dynamic_shapes)}
    if args or kwargs or dynamic_shapes is not None:
        raise UsageError("of several functions each has its own arguments: {name: (module, args, shapes)}")
    if not module:
        raise UsageError("a program has at least one function")
    return {name: _source(name, given) for name, given in module.items()}


def _source(name: Any, given: Any) -> Source:
    if not (isinstance(name, str) and name.isidentifier()) or name.startswith("_") or name in RESERVED:
        raise UsageError(
            f"{name!r} cannot be the name of a function: it has to be a Python name, and none that programs "
            f"have themselves ({', '.join(RESERVED)})"
        )
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3, 4):
        raise UsageError(
            f"the function {name} is (module, args), (module, args, dynamic_shapes) or "
            f"(module, args, kwargs, dynamic_shapes), not {type(given).__name__}"
        )
    module, args, *between, shapes = given if len(given) > 2 else (*given, None)
    return Source(module, tuple(args), between[0] if between else None, shapes)
