"""Make what a model does beside computing explicit: what it writes to, and what it asserts of values.

torch.export says of a model that writes which buffers and arguments have new values when it is done.  Here a
buffer that is written becomes an argument behind the others, which the runtime keeps (the program's *state*),
and every new value a result behind the others; so the program that is imported only computes.  Which of the
new values take the memory of the old is decided in ``lowering.program.in_place``.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument

from ..errors import CompileError
from ..signature import TensorSpec, Written
from .naming import Names, identity

_ATEN = torch.ops.aten
_KEPT = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
_MUTATIONS = (*_KEPT, OutputKind.USER_INPUT_MUTATION)


@dataclass(frozen=True)
class Mutations:
    """Hold what a model writes.

    state: the initial value of each buffer that is written, by name, in the order of the arguments that they
    became.  written: the tensors that are passed and have new values, and the results that these are.
    checks: the results behind them, each named by what is said where it is false.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)
    written: tuple[Written, ...] = ()
    checks: tuple[TensorSpec, ...] = ()


def kept(exported: ExportedProgram) -> set[Hashable]:
    """What tells the tensors apart that the program keeps: the buffers that it writes to."""
    signature = exported.graph_signature
    targets = {spec.target for spec in signature.output_specs if spec.kind in _KEPT}
    values = {spec.target: _value(exported, spec) for spec in signature.input_specs if spec.target in targets}
    return {identity(value, str(target)) for target, value in values.items()}


def explicit(
    exported: ExportedProgram, function: str, names: Names, state: Collection[Hashable]
) -> tuple[ExportedProgram, Mutations]:
    """The same program without side effects: state as arguments, new values as results.

    state: what tells the tensors apart that are kept, by this function of a program or by another.
    """
    before = exported.graph_signature
    changes = [spec for spec in before.output_specs if spec.kind in _MUTATIONS]
    tensors = {
        spec.target: _value(exported, spec)
        for spec in before.input_specs
        if spec.kind in (InputKind.BUFFER, InputKind.PARAMETER)
    }
    found = {target for target, value in tensors.items() if identity(value, str(target)) in state}
    graph = exported.graph_module.graph
    asserted = list(_taken_assertions(graph))
    if not changes and not found and not asserted:
        return exported, Mutations()
    buffers = [spec for spec in before.input_specs if spec.target in found and spec.target in tensors]
    others = [spec for spec in before.input_specs if spec not in buffers]
    named = {
        names.of(function, tensors[spec.target], str(spec.target)): tensors[spec.target] for spec in buffers
    }
    _check_sizes(named)
    inputs = [*others, *(replace(spec, kind=InputKind.USER_INPUT, target=None) for spec in buffers)]
    _pass_last(graph, [spec.arg.name for spec in buffers])
    returned = [spec for spec in before.output_specs if spec.kind not in _MUTATIONS]
    new = _return_last(graph, before.output_specs, [node for node, _ in asserted])
    exported.graph_module.recompile()
    outputs = [
        *returned,
        *(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in new),
    ]
    placed = _numbers(inputs, {str(spec.target): spec.arg.name for spec in buffers})
    written = tuple(
        Written(placed[str(spec.target)], len(returned) + number) for number, spec in enumerate(changes)
    )
    signature = replace(before, input_specs=inputs, output_specs=outputs)
    return exported._update(exported.graph_module, signature), Mutations(
        named, written, tuple(_spec(said, node.meta["val"]) for node, said in asserted)
    )


def _check_sizes(state: Mapping[str, Tensor]) -> None:
    """Refuse what has no room for anything."""
    for name, tensor in state.items():
        if not tensor.numel():
            raise CompileError(
                f"the model writes to {name}, which has no elements, {list(tensor.shape)}: nothing can be "
                "kept there; give the cache a capacity of 1 or more"
            )


def _value(exported: ExportedProgram, spec: InputSpec) -> Tensor:
    found = exported.state_dict.get(str(spec.target), exported.constants.get(str(spec.target)))
    assert isinstance(found, Tensor), spec.target
    return found.detach()


def _numbers(inputs: list[InputSpec], buffers: Mapping[str, str]) -> dict[str, int]:
    """The numbers, among what is passed to a program, of its arguments by name and its state by target."""
    passed = [
        spec.arg.name
        for spec in inputs
        if spec.kind == InputKind.USER_INPUT and not hasattr(spec.arg, "value")
    ]
    numbers = {name: number for number, name in enumerate(passed)}
    return numbers | {target: numbers[name] for target, name in buffers.items()}


def _pass_last(graph: fx.Graph, names: list[str]) -> None:
    """Have the placeholders of these ``names`` behind all others, in order."""
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for name in names:
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        if last is not placeholders[name]:
            last.append(placeholders[name])


def _taken_assertions(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Take the assertions of values out of the graph: what each is of, and what it says."""
    for node in list(graph.nodes):
        condition = node.args[0] if node.target is _ATEN._assert_async.msg else None
        if isinstance(condition, fx.Node) and condition.meta["val"].dtype == torch.bool:
            yield condition, str(node.args[1])
            graph.erase_node(node)


def _return_last(graph: fx.Graph, specs: list[OutputSpec], checks: list[fx.Node]) -> list[fx.Node]:
    """Return the new values and then the checks behind the results; both are returned here as well."""
    node = graph.output_node()
    results: Any = node.args[0]
    pairs = list(zip(results, specs, strict=True))
    new = [_updated_whole(graph, value) for value, spec in pairs if spec.kind in _MUTATIONS]
    results = node.args[0]  # as it is now
    pairs = list(zip(results, specs, strict=True))
    new += checks
    node.args = ((*(value for value, spec in pairs if spec.kind not in _MUTATIONS), *new),)
    return new


def _updated_whole(graph: fx.Graph, new: fx.Node) -> fx.Node:
    """Put elements into what is written itself, on the way to its ``new`` value, where it was permuted first.

    Axes of indices that others are between come to the front in other programs (``indexed``).  Gives the new
    value.
    """
    value: Any = new
    while isinstance(value, fx.Node) and value.op == "call_function" and value.args:
        whole = _put_whole(graph, value)
        if whole is not None:
            new = whole if value is new else new
            value = whole
        value = value.args[0]
    return new


def _put_whole(graph: fx.Graph, value: fx.Node) -> fx.Node | None:
    """Put elements into a tensor itself, where ``value`` is that, permuted, put into, and permuted back.

    Gives what stands for ``value``; None where it is something else.
    """
    put = _read_once(value.args[0], _ATEN.index_put.default)
    permuted = _read_once(put.args[0], _ATEN.permute.default) if put is not None else None
    if value.target is not _ATEN.permute.default or put is None or permuted is None:
        return None
    given: Any = (*permuted.args, put.args[1])
    source, axes, chosen = given[0], list(given[1]), given[2]
    back: Any = value.args[1]
    if list(back) != [axes.index(axis) for axis in range(len(axes))]:
        return None
    indices: list[Any] = [None] * len(axes)
    for axis, index in zip(axes, chosen, strict=False):
        indices[axis] = index
    with graph.inserting_before(value):
        whole = graph.create_node("call_function", put.target, (source, indices, *put.args[2:]), put.kwargs)
    whole.meta = {**value.meta, "stack_trace": put.meta.get("stack_trace")}
    value.replace_all_uses_with(whole)
    for node in (value, put, permuted):
        graph.erase_node(node)
    return whole


def _read_once(node: Any, target: Any) -> fx.Node | None:
    """``node``, if it is a call of ``target`` whose result is read once."""
    is_it = isinstance(node, fx.Node) and node.target is target and len(node.users) == 1
    return node if is_it else None


def state_specs(state: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The state as a signature has it."""
    return tuple(_spec(name, tensor) for name, tensor in state.items())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
