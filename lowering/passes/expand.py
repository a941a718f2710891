"""Step 6, expand: make plain torch ops of canonical ops that got no kernel, for IREE to compile.

Their lowering is the eager reference itself, exported and imported for the types at hand, so what
an op means is written once, in ``lowering.ops``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from iree.compiler import ir

from patterns import attention, canonical, torch_ir, weight_layouts

from .. import ops
from ..errors import CompileError
from ..families import registry
from ..importing.importer import Program, import_module, parse_module
from ..ops.shuffle_weight import shuffle_weight_reference, unshuffle_weight_reference
from . import attention as spelling
from .normalize import normalize


class _Reference(torch.nn.Module):
    """A reference function as a module, so that it can be exported."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


@dataclass(frozen=True)
class _Meaning:
    """A function that an op stands for: on which of its operands, and what distinguishes it from others.

    ``axes`` names the axes of each operand: what has one name has one size.
    """

    function: Callable[..., Any]
    key: Any
    operands: list[ir.Value]
    axes: list[list[str]]


@dataclass
class Expander:
    """Expands the ops of one module; equal ops are traced once.

    Canonical ones, and attention: the whole of it where ``spell_attention``, else what a mask needs.
    """

    spell_attention: bool = False
    _traced: dict[Any, Program] = field(default_factory=dict)

    def expand(self, function: ir.Operation) -> int:
        """Replace what is left of the canonical ops by their references; returns how many there were."""
        block = torch_ir.block_of(function)
        count = 0
        for op in [op.operation for op in block.operations]:
            meaning = self._meaning(op)
            if meaning is not None:
                _inline(self._trace(op, meaning), op, meaning.operands)
                count += 1
        torch_ir.erase_dead(block)
        return count

    def _meaning(self, op: ir.Operation) -> _Meaning | None:
        found = attention.attention(op)
        if found is not None and (self.spell_attention or found.masked):
            operands, spelled = attention.tensors(op), spelling.guarded
            if self.spell_attention:
                (found, operands), spelled = attention.shared(op, found), spelling.reference
            axes = found.axes([len(type_.shape) for type_ in _types(operands)])
            return _Meaning(spelled(found), (spelled, found), operands, axes)
        reference = _reference(op)
        if reference is None:
            return None
        key, function = reference
        operands = [operand for operand in op.operands if torch_ir.tensor_type(operand) is not None]
        # The leading axes of all row operands are the same axes.
        axes = [[f"axis{axis}" for axis, _ in enumerate(type_.shape)] for type_ in _types(operands)]
        return _Meaning(function, key, operands, axes)

    def _trace(self, op: ir.Operation, meaning: _Meaning) -> ir.Operation:
        types = _types(meaning.operands)
        key = (torch_ir.op_name(op), meaning.key, tuple(types))
        if key not in self._traced:
            self._traced[key] = _traced(key, meaning, types, op.context)
        return self._traced[key].main()


# Tracing a reference takes up to seconds, and the next program often has it again; this many are kept.
_REMEMBERED_REFERENCES = 256
_REFERENCES: dict[Any, bytes] = {}


def _traced(
    key: Any, meaning: _Meaning, types: Sequence[torch_ir.TensorType], context: ir.Context
) -> Program:
    """Import the function of ``meaning`` for operands of these types; ``key`` tells it from any other."""
    if (known := _REFERENCES.get(key)) is not None:
        return parse_module(known, context)
    args, shapes = _examples(types, meaning.axes)
    program = import_module(
        _Reference(meaning.function), tuple(args), context, dynamic_shapes=(tuple(shapes),)
    )
    normalize(program.main())
    bytecode = io.BytesIO()
    program.module.operation.write_bytecode(bytecode)
    if len(_REFERENCES) >= _REMEMBERED_REFERENCES:
        _REFERENCES.clear()
    _REFERENCES[key] = bytecode.getvalue()
    return program


def _reference(op: ir.Operation) -> tuple[Any, Callable[..., Any]] | None:
    """Find this op's reference, a function of its tensor operands, and what distinguishes it from others."""
    name = torch_ir.op_name(op)
    if (family_reference := registry.reference_of(op)) is not None:
        key, function = family_reference(op)
        return (family_reference, key), function
    if name == canonical.PHYSICAL_SCALE:
        layout = torch_ir.constant(op.operands[1])
        return layout, lambda scale: ops.to_physical(scale, layout)
    if name in _MOVES:
        to, move = torch_ir.constant(op.operands[1]), _MOVES[name]
        return to, lambda weight: move(weight, to)
    if name.startswith("torch.lowering."):
        raise _not_raised(op, name)
    if not name.startswith("torch.aten.") and (why := registry.why_not_named(op)) is not None:
        raise CompileError(f"{torch_ir.location(op)}: {why}")
    return None


def _not_raised(op: ir.Operation, name: str) -> CompileError:
    """Say why an operation of this package was left as the model spells it."""
    type_ = torch_ir.tensor_type(op.operands[0])
    unknown = type_ is not None and type_.shape[-1:] == (None,)
    why = (
        "its last axis has a size unknown until run time; export the model with a constant one"
        if unknown
        else "its arguments are not constants of the model"
    )
    return CompileError(f"{torch_ir.location(op)}: {name.removeprefix('torch.')} cannot be compiled: {why}")


# Of a weight that is no parameter; one that is has been shuffled when compiling.
_MOVES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    weight_layouts.SHUFFLE: shuffle_weight_reference,
    weight_layouts.UNSHUFFLE: unshuffle_weight_reference,
}


def _types(values: Sequence[ir.Value]) -> list[torch_ir.TensorType]:
    types = [torch_ir.tensor_type(value) for value in values]
    return [type_ for type_ in types if type_ is not None]


def _examples(
    types: Sequence[torch_ir.TensorType], axes: Sequence[Sequence[str]]
) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
    """Example tensors, and which of their axes are dynamic."""
    names = dict.fromkeys(name for row in axes for name in row)
    sizes = {name: 7 + 2 * number for number, name in enumerate(names)}
    args, shapes = [], []
    for type_, row in zip(types, axes, strict=True):
        size = [sizes[name] if dim is None else dim for name, dim in zip(row, type_.shape, strict=True)]
        args.append(torch.zeros(size, dtype=getattr(torch, type_.dtype)))
        dynamic = {axis: name for axis, name in enumerate(row) if type_.shape[axis] is None}
        shapes.append({axis: torch.export.Dim(name) for axis, name in dynamic.items()})
    return args, shapes


def _inline(function: ir.Operation, op: ir.Operation, operands: Sequence[ir.Value]) -> None:
    """Copy the body of ``function``, applied to ``operands``, in place of ``op``."""
    block = torch_ir.block_of(function)
    values: dict[ir.Value, ir.Value] = dict(zip(block.arguments, operands, strict=True))
    for inner in [inner.operation for inner in block.operations]:
        if inner.name == "func.return":
            for old, new in zip(op.results, inner.operands, strict=True):
                old.replace_all_uses_with(_matching(values[new], old, op))
            break
        copy = inner.clone(ir.InsertionPoint(op))
        copy.location = op.location  # an error then names the line of the model, not of the reference
        for index, operand in enumerate(inner.operands):
            copy.operands[index] = values[operand]
        values.update(zip(inner.results, copy.results, strict=True))
    op.erase()


def _matching(value: ir.Value, old: ir.Value, op: ir.Operation) -> ir.Value:
    """``value`` as the type of ``old``: a size that one of them knows the other may not."""
    if value.type == old.type:
        return value
    with ir.InsertionPoint(op), op.location:
        return ir.Operation.create(
            "torch.tensor_static_info_cast", results=[old.type], operands=[value]
        ).result
