"""Refuse a model that keeps numbers in Python from call to call: a program would have those of its export.

torch.export runs the model once, and what it counts in an attribute is a constant of the graph.  Numbers that
the graph does not have, such as how often a model was called, do no harm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import CompileError
from .held_caches import caches

Exporting = Callable[[], tuple[ExportedProgram, tuple[str, ...]]]
_Numbers = dict[tuple[str, str], Any]
"""By module and attribute."""


def checked(module: torch.nn.Module, export: Exporting) -> tuple[ExportedProgram, tuple[str, ...]]:
    """What ``export`` gives.  Raises CompileError where it depends on a number that a call changes.

    Where a call of the model changes one, the model is exported again: the graph has the number if it is
    another.  One in a cache of transformers' chooses between graphs at lengths that are not tried here.
    """
    before, after = dict(_numbers(module)), {}
    # torch.export puts attributes back when it is done.
    hook = module.register_forward_hook(lambda *_: after.update(_numbers(module)))
    try:
        found = export()
    finally:
        hook.remove()
    changed = {place: after[place] for place, value in before.items() if after.get(place, value) != value}
    in_caches = [place for place in changed if "." in place[1]]
    if in_caches or (changed and not _is_same(found[0], _exported_with(module, before, changed, export))):
        where, name = place = (in_caches or list(changed))[0]
        raise _refused(module.get_submodule(where), where, name, before[place], changed[place])
    return found


def _is_same(one: ExportedProgram, other: ExportedProgram) -> bool:
    return str(one.graph) == str(other.graph)


def _exported_with(
    module: torch.nn.Module, before: _Numbers, changed: _Numbers, export: Exporting
) -> ExportedProgram:
    """The model exported once more, as it would be called the second time."""
    try:
        for (where, name), value in changed.items():
            vars(module.get_submodule(where))[name] = value
        return export()[0]
    finally:
        for where, name in changed:
            vars(module.get_submodule(where))[name] = before[where, name]


def _numbers(module: torch.nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """The numbers that the parts of a model have, those of caches by more than one name."""
    for where, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, int | float) and name != "training":
                yield (where, name), value
    for where, _, name, cache in caches(module):
        for number, layer in enumerate(cache.layers):
            for inner, found in _of_layer(vars(layer)):
                yield (where, f"{name}.layers[{number}].{inner}"), found


def _of_layer(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}[{key}]", inner) for key, inner in value.items() if isinstance(inner, int))


def _refused(part: torch.nn.Module, where: str, name: str, before: Any, after: Any) -> CompileError:
    of = f"{where}.{name}" if where else name
    said = (
        f"{of} went from {before} to {after} while {type(part).__name__} was exported ({_line(part)}): a "
        "program keeps tensors from call to call, not numbers of Python, and would have the first in each"
    )
    if "." not in name:
        return CompileError(f"{said}; make it a buffer, a tensor of int64 that the model adds to")
    attribute, _, layer = name.partition(".layers[")
    layers = getattr(part, attribute).layers
    kind = type(layers[int(layer.partition("]")[0])]).__name__
    return CompileError(
        f"{said}. It is of a {kind} of transformers; lowering.export_decoder(model, capacity=...) makes "
        "functions with a cache that has none"
    )


def _line(part: torch.nn.Module) -> str:
    """Where the part's code is."""
    try:
        return f"{inspect.getsourcefile(type(part))}:{inspect.getsourcelines(type(part).forward)[1]}"
    except (OSError, TypeError):  # made in memory
        return type(part).__module__
