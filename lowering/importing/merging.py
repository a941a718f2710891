"""Make one program of several functions, each of which was imported and worked on by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from iree.compiler import ir

from ..weights.recipes import Recipe
from . import parameters
from .importer import Program


@dataclass(frozen=True)
class Merged:
    """The functions of a program in one module, by name, and all tensors that its globals name.

    stored: the names of the state that begins as other than zeros.
    """

    module: ir.Module
    parameters: dict[str, torch.Tensor | Recipe]
    functions: dict[str, Program]
    stored: tuple[str, ...]


def merge(functions: Sequence[Program]) -> Merged:
    """Put all functions into the module of the first, the others' modules are empty then.

    What has the same symbol in two of them is the same: a parameter, a kernel.
    """
    first, *others = functions
    named = {ir.StringAttr(each.main().attributes["sym_name"]).value: each for each in functions}
    symbols = {symbol for symbol, _ in _symbols(first.module)}
    for program in others:
        for symbol, op in _symbols(program.module):
            op.detach_from_parent()
            if symbol not in symbols:
                first.module.body.append(op)
                symbols.add(symbol)
    tensors = {name: tensor for program in functions for name, tensor in program.parameters.items()}
    state = {name: tensor for program in functions for name, tensor in program.mutations.state.items()}
    with first.context, ir.Location.unknown():
        initial = parameters.declare_initial(first.module.operation, state)
    return Merged(first.module, {**tensors, **initial}, named, tuple(initial))


def _symbols(module: ir.Module) -> Iterable[tuple[str, ir.Operation]]:
    operations = [op.operation for op in module.body.operations]
    return [(ir.StringAttr(op.attributes["sym_name"]).value, op) for op in operations]
