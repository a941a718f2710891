"""Step 5, fold: compute once, when compiling, what depends on parameters and constants alone.

A cast of a bias, a transposed or concatenated weight, a rescaled table: every maximal subgraph without an
input of the program becomes one parameter in its final form and dtype, and a parameter that nothing else
reads is dropped.  This is the step before dispatch, so that the recognisers have seen the program as it was
written (a kernel adds Gemma's 1 to a 16-bit weight itself, and reads half the bytes of a folded sum), and
so that whatever an earlier step computes from a weight, such as another layout of it, is folded as well.

What is folded must not cost: see ``_choose``.  The values themselves are made by ``lowering.parameters``
as it writes them, one at a time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from iree.compiler import ir

from patterns import torch_ir, weight_layouts

from ..importing import parameters
from ..importing.importer import Program
from ..report.sites import Change, Folded
from ..weights.recipes import WORKING, Call, Recipe, Source, traced

SMALL = 1 << 20
"""Bytes of a value that is folded although it takes more room than what it replaces."""

_LOAD = "util.global.load"
_LIST = "torch.prim.ListConstruct"
_LITERAL = "torch.vtensor.literal"
_NAMESPACES = ("aten", "prims", "lowering")
_CODES = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.int8,
    torch.uint8,
)
# Schema types that say where and how a result is stored, which is no part of its value.
_PLACEMENT = ("Device", "Layout", "MemoryFormat", "Generator")


@dataclass
class Folding:
    """What was folded before, in other functions of a program: the same value is the same parameter."""

    names: dict[Recipe, str] = field(default_factory=dict)
    sources: dict[Any, Recipe] = field(default_factory=dict)
    calls: dict[Any, Call] = field(default_factory=dict)


def fold(program: Program, folding: Folding | None = None) -> None:
    """Fold, in place, what depends on parameters alone; ``program.folded`` says what that was.

    A folded value is a ``Recipe`` among ``program.parameters``.  folding: shared by the functions of a
    program.
    """
    folding = folding or Folding()
    block = torch_ir.block_of(program.main())
    trace = _Trace(program, folding)
    for op in [op.operation for op in block.operations]:
        trace.follow(op)
    chosen = _choose(trace.read)
    names = _names(chosen, program, folding)
    _substitute(program, block, trace, names)
    dropped = _drop_unread(program)
    program.folded = tuple(_described(names, dropped))


# --- what depends on parameters alone --------------------------------------------------------------


class _Unknown(Exception):
    """An operand is not known when compiling."""


@dataclass
class _Trace:
    """The recipes of a function's values, and which of them are read by what has none."""

    program: Program
    folding: Folding
    recipes: dict[ir.Value, Recipe] = field(default_factory=dict)
    read: dict[Recipe, None] = field(default_factory=dict)

    def follow(self, op: ir.Operation) -> None:
        """Take the next operation of the block into account."""
        if op.name == _LIST:
            return  # what reads the list reads its items
        results = self._results(op)
        if results is None:
            known = [self.recipes[value] for value in _flat(op.operands) if value in self.recipes]
            self.read.update(dict.fromkeys(known))
        else:
            self.recipes.update(zip(op.results, results, strict=True))

    def _results(self, op: ir.Operation) -> list[Recipe] | None:
        if op.name == _LOAD:
            return self._parameter(op)
        if op.name == "torch_c.from_builtin_tensor":
            recipe = self.recipes.get(op.operands[0])
            return [recipe] if recipe is not None else None
        call = self._call(op)
        return [Recipe(call, number) for number in range(len(op.results))] if call is not None else None

    def _parameter(self, op: ir.Operation) -> list[Recipe] | None:
        name = ir.FlatSymbolRefAttr(op.attributes["global"]).value
        tensor = self.program.parameters.get(name)
        if not isinstance(tensor, torch.Tensor):
            return None
        if name not in self.folding.sources:
            # A bool parameter is stored and read as bytes, and cast where it is read.
            stored = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            self.folding.sources[name] = Recipe(Source(name, stored))
        return [self.folding.sources[name]]

    def _call(self, op: ir.Operation) -> Call | None:
        """The call that ``op`` is, the same for the same operation on the same operands."""
        overload = _overload(torch_ir.op_name(op))
        types = [torch_ir.tensor_type(result) for result in op.results]
        if overload is None or None in types:
            return None
        try:
            args = self._arguments(op, overload)
        except _Unknown:
            return None
        key = (overload, _key(args))
        if key not in self.folding.calls:
            call = traced(overload, args, torch_ir.location(op))
            if call is None or [_type(meta) for meta in call.metas] != types:
                return None
            self.folding.calls[key] = call
        return self.folding.calls[key]

    def _arguments(self, op: ir.Operation, overload: torch._ops.OpOverload) -> tuple[Any, ...]:
        schema = overload._schema.arguments
        if len(schema) != len(op.operands):
            raise _Unknown
        kinds = [str(argument.real_type) for argument in schema]
        return tuple(self._argument(v, kind) for v, kind in zip(op.operands, kinds, strict=True))

    def _argument(self, value: ir.Value, kind: str) -> Any:
        if any(word in kind for word in _PLACEMENT):
            return None
        if value in self.recipes:
            return self.recipes[value]
        op = torch_ir.producer(value)
        if op is not None and op.name == _LIST:
            return [self._argument(item, kind) for item in op.operands]
        constant = torch_ir.constant(value)
        if constant is torch_ir.NOT_CONSTANT:
            raise _Unknown
        if op is not None and op.name == _LITERAL:
            return self._literal(value, constant)
        if "ScalarType" in kind and constant is not None:
            return getattr(torch, torch_ir.dtype_constant(value) or "", None)
        return constant

    def _literal(self, value: ir.Value, constant: Any) -> Recipe:
        type_ = torch_ir.tensor_type(value)
        if type_ is None:
            raise _Unknown
        key = (type_, repr(constant))
        if key not in self.folding.sources:
            tensor = torch.full([1] * len(type_.shape), constant, dtype=getattr(torch, type_.dtype))
            self.folding.sources[key] = Recipe(Source(None, tensor))
        return self.folding.sources[key]


def _flat(operands: Any) -> Iterator[ir.Value]:
    """The operands, and in place of a list its items."""
    for value in operands:
        op = torch_ir.producer(value)
        if op is not None and op.name == _LIST:
            yield from _flat(op.operands)
        else:
            yield value


def _overload(name: str) -> torch._ops.OpOverload | None:
    """PyTorch's operation of a torch-dialect name, if its results follow from its operands."""
    dialect, _, rest = name.partition(".")
    namespace, _, rest = rest.partition(".")
    if dialect != "torch" or namespace not in _NAMESPACES:
        return None
    # Clones are gone from the program, and what one made contiguous is so no more: a view may have to copy.
    packet, _, overload = ("reshape" if rest == "view" else rest).partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
    if found is None or found._schema.is_mutable or torch.Tag.nondeterministic_seeded in found.tags:
        return None
    return None if "empty" in packet else found


def _key(item: Any) -> Any:
    """``item`` as a key under which 1, 1.0 and True, and 0.0 and -0.0, differ."""
    if isinstance(item, (tuple, list)):
        return tuple(map(_key, item))
    return item if isinstance(item, Recipe) else (type(item), repr(item))


def _type(meta: torch.Tensor) -> torch_ir.TensorType:
    return torch_ir.TensorType(tuple(meta.shape), str(meta.dtype).removeprefix("torch."))


# --- what is worth it ------------------------------------------------------------------------------


def _choose(read: Iterable[Recipe]) -> list[Recipe]:
    """Choose the values to be stored, of what the program reads and what that is made from.

    Values of common parameters stand together: they are stored if they take no more room than the parameters
    that are dropped for it, so neither the archive nor what a call reads grows.  ``SMALL`` values are
    stored in any case, and so are weights that are shuffled for a kernel.  What is refused is left to the
    program, from the largest on, and its operands are then looked at the same way.  A broadcast or a
    dequantized weight thus stays as it was written, and a transposed scale below it is stored.
    """
    refused: set[Recipe] = set()
    while True:
        candidates, kept = _frontier(read, refused)
        excess = [_excess(group, kept) for group in _groups(candidates, kept)]
        if not any(excess):
            return candidates
        refused.update(recipe for recipe in excess if recipe is not None)


def _frontier(read: Iterable[Recipe], refused: Collection[Recipe]) -> tuple[list[Recipe], set[Source]]:
    """Choose what may be stored for the program to read, and the parameters it reads as they are."""
    candidates: dict[Recipe, None] = {}
    kept: set[Source] = set()
    pending, seen = list(read)[::-1], set()
    while pending:
        recipe = pending.pop()
        if recipe in seen:
            continue
        seen.add(recipe)
        if isinstance(recipe.origin, Source):
            kept.add(recipe.origin)
        elif recipe in refused or not _can_be_stored(recipe):
            pending += recipe.origin.operands
        else:
            candidates[recipe] = None
    return list(candidates), kept


def _groups(candidates: Iterable[Recipe], kept: Collection[Source]) -> list[list[Recipe]]:
    """The candidates, those together that are made from a common parameter which could be dropped."""
    leaders: dict[Source, Source] = {}

    def leader(source: Source) -> Source:
        while leaders.setdefault(source, source) is not source:
            leaders[source] = source = leaders[leaders[source]]
        return source

    groups: dict[Source | Recipe, list[Recipe]] = defaultdict(list)
    droppable = {recipe: [s for s in recipe.sources() if s not in kept] for recipe in candidates}
    for sources in droppable.values():
        for source in sources:
            leaders[leader(source)] = leader(sources[0])
    for recipe, sources in droppable.items():
        groups[leader(sources[0]) if sources else recipe].append(recipe)
    return list(groups.values())


def _excess(group: Iterable[Recipe], kept: Collection[Source]) -> Recipe | None:
    """The largest of the values that together take more room than the parameters dropped for them."""
    large = [recipe for recipe in group if not _is_small(recipe) and not _is_for_kernel(recipe)]
    dropped = {source for recipe in large for source in recipe.sources()}.difference(kept)
    if sum(recipe.nbytes for recipe in large) <= sum(source.tensor.nbytes for source in dropped):
        return None
    return max(large, key=lambda recipe: recipe.nbytes)


def _is_small(recipe: Recipe) -> bool:
    """Tell whether the value may take more room than before; a quantized weight never does."""
    given = recipe.sources()
    widened = recipe.nbytes > sum(source.tensor.nbytes for source in given)
    is_quantized = any(source.tensor.dtype in _CODES for source in given)
    return recipe.nbytes <= SMALL and not (is_quantized and widened)


def _layout(recipe: Recipe) -> str:
    """The layout of a value's bytes."""
    call = recipe.origin
    shuffled = isinstance(call, Call) and call.op == torch.ops.lowering.shuffle_weight.default
    return call.args[1] if shuffled else "row"  # pyright: ignore[reportAttributeAccessIssue]


def _is_for_kernel(recipe: Recipe) -> bool:
    """Tell whether the value is what a kernel reads: shuffled, or packed integers as products take them."""
    call = recipe.origin
    if isinstance(call, Call) and call.op == torch.ops.aten.transpose.int:
        return _is_for_kernel(call.operands[0])
    repacked = isinstance(call, Call) and call.op == torch.ops.lowering.repack.default
    return repacked or _layout(recipe) != "row"


def _can_be_stored(recipe: Recipe) -> bool:
    """Tell whether the value is worth a parameter of its own, and can be one."""
    call = recipe.origin
    assert isinstance(call, Call)
    sources = recipe.sources()
    if not parameters.is_storable(recipe.dtype) or _is_free(call, recipe.meta):
        return False
    if _is_for_kernel(recipe):
        return True
    if recipe.meta.numel() <= 1 and not any(source.name for source in sources):
        return False  # IREE folds scalars itself, and embeds them in the code
    largest = max(recipe.nbytes, *(source.tensor.nbytes for source in sources), 0)
    return recipe.memory <= max(WORKING, 2 * largest)


def _is_free(call: Call, meta: torch.Tensor) -> bool:
    """Tell whether nothing is computed or moved: a constant fill or count, another shape, a broadcast."""
    if not call.operands:
        return True
    operand = call.operands[0].meta
    if call.op == torch.ops.prims.convert_element_type.default and meta.dtype == torch.bool:
        return operand.dtype == torch.uint8  # how a bool parameter is read
    if call.fresh:
        return False
    axes = zip(meta.stride(), meta.shape, strict=True)
    is_broadcast = any(stride == 0 and size > 1 for stride, size in axes)
    same = meta.numel() == operand.numel() and meta.is_contiguous() and operand.is_contiguous()
    return is_broadcast or same


# --- changing the program --------------------------------------------------------------------------


def _names(chosen: Iterable[Recipe], program: Program, folding: Folding) -> dict[Recipe, str]:
    """A name for each value, after the first parameter it is made from, unless it has one already."""
    taken, names = {*program.parameters, *folding.names.values()}, {}
    for recipe in chosen:
        if recipe in folding.names:
            names[recipe] = folding.names[recipe]
            continue
        first = next((source.name for source in recipe.sources() if source.name), "constant")
        candidates = itertools.chain([f"{first}.folded"], (f"{first}.folded.{n}" for n in itertools.count(2)))
        names[recipe] = folding.names[recipe] = next(name for name in candidates if name not in taken)
        taken.add(names[recipe])
    return names


def _substitute(program: Program, block: ir.Block, trace: _Trace, names: Mapping[Recipe, str]) -> None:
    """Read the values where they were computed, and erase what computed them."""
    loads: dict[Recipe, ir.Value] = {}
    for recipe, name in names.items():
        program.parameters[name] = recipe
        parameters.declare(program.module.operation, name, recipe.meta)
        with ir.InsertionPoint.at_block_begin(block), ir.Location.unknown():
            loads[recipe] = parameters.read(name, recipe.meta)
        load = weight_layouts.parameter(loads[recipe])
        if load is not None:
            weight_layouts.note(load, _layout(recipe))
    for value, recipe in trace.recipes.items():
        if recipe in loads:
            value.replace_all_uses_with(loads[recipe])
    torch_ir.erase_dead(block)


def _drop_unread(program: Program) -> dict[str, int]:
    """Forget the parameters that nothing reads any more; their bytes, by name."""
    functions = [op.operation for op in program.module.body if op.operation.name == "func.func"]
    operations = [op.operation for function in functions for op in torch_ir.block_of(function).operations]
    read = {ir.FlatSymbolRefAttr(op.attributes["global"]).value for op in operations if op.name == _LOAD}
    dropped = {}
    for op in [op.operation for op in program.module.body if op.operation.name == "util.global"]:
        name = ir.StringAttr(op.attributes["sym_name"]).value
        if name in program.parameters and name not in read:
            dropped[name] = program.parameters.pop(name).nbytes
            op.erase()
    return dropped


# --- the report ------------------------------------------------------------------------------------


def _described(names: Mapping[Recipe, str], dropped: Mapping[str, int]) -> Iterator[Folded]:
    """Say what each value is made of; what several share, leaf or operation, counts with the first."""
    left, counted = dict(dropped), set()
    for recipe, name in names.items():
        calls = recipe.calls()
        sources = [source.name for source in recipe.sources() if source.name is not None]
        moved = 0 if recipe.meta.is_contiguous() else 2 * recipe.nbytes
        yield Folded(
            name,
            _location(calls),
            tuple(map(_spelled, calls)),
            tuple(sources),
            Change(sum(left.pop(source, 0) for source in sources), recipe.nbytes),
            moved + sum(call.traffic for call in calls if call not in counted),
        )
        counted.update(calls)


def _location(calls: Sequence[Call]) -> str:
    """Locate the last operation that is in a file: a traced submodule, like a no_grad block, is in none."""
    in_files = [call.location for call in calls if not call.location.startswith("<")]
    return in_files[-1] if in_files else calls[-1].location


def _spelled(call: Call) -> str:
    if call.op == torch.ops.prims.convert_element_type.default:
        return f"to({str(call.metas[0].dtype).removeprefix('torch.')})"
    return call.op._schema.name.rpartition("::")[2]
