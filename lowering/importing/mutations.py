"""Make what a model writes to explicit: buffers and arguments that it changes come in, and go out, as values.

torch.export says of a model that writes which buffers and arguments have new values when it is done.  Here a
buffer that is written becomes an argument behind the others, which the runtime keeps (the program's *state*),
and every new value a result behind the others; so the program that is imported only computes.  Which of the
new values take the memory of the old is decided in ``lowering.program.in_place``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument

from ..errors import CompileError
from ..signature import TensorSpec, Written

_ATEN = torch.ops.aten
_KEPT = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
_MUTATIONS = (*_KEPT, OutputKind.USER_INPUT_MUTATION)


@dataclass(frozen=True)
class Mutations:
    """Hold what a model writes.

    state: the initial value of each buffer that is written, by name, in the order of the arguments that they
    became.  written: the tensors that are passed and have new values, and the results that these are.
    """

    state: Mapping[str, Tensor]
    written: tuple[Written, ...] = ()


def explicit(exported: ExportedProgram) -> tuple[ExportedProgram, Mutations]:
    """The same program without side effects: state as arguments, new values as results."""
    before = exported.graph_signature
    changes = [spec for spec in before.output_specs if spec.kind in _MUTATIONS]
    if not changes:
        return exported, Mutations({})
    kept = {spec.target: spec for spec in changes if spec.kind in _KEPT}
    buffers = [spec for spec in before.input_specs if _is_of(spec, kept)]
    others = [spec for spec in before.input_specs if not _is_of(spec, kept)]
    state = {str(spec.target): _value(exported, spec) for spec in buffers}
    _check_apart(state)
    inputs = [*others, *(replace(spec, kind=InputKind.USER_INPUT, target=None) for spec in buffers)]
    graph = exported.graph_module.graph
    _pass_last(graph, [spec.arg.name for spec in buffers])
    returned = [spec for spec in before.output_specs if spec.kind not in _MUTATIONS]
    new = _return_last(graph, before.output_specs)
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
    return exported._update(exported.graph_module, signature), Mutations(state, written)


def _is_of(spec: InputSpec, kept: Mapping[str | None, OutputSpec]) -> bool:
    return spec.kind in (InputKind.BUFFER, InputKind.PARAMETER) and spec.target in kept


def _value(exported: ExportedProgram, spec: InputSpec) -> Tensor:
    found = exported.state_dict.get(str(spec.target), exported.constants.get(str(spec.target)))
    assert isinstance(found, Tensor), spec.target
    return found.detach()


def _check_apart(state: Mapping[str, Tensor]) -> None:
    """Refuse buffers that share memory: each would be kept by itself."""
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.numel() and (other := seen.setdefault(tensor.untyped_storage().data_ptr(), name)) != name:
            raise CompileError(
                f"the model writes to {other} and {name}, which share their memory: a program keeps each by "
                "itself; write to one buffer, and view it where the other is read"
            )


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


def _return_last(graph: fx.Graph, specs: list[OutputSpec]) -> list[fx.Node]:
    """Return the new values behind the results; they are returned here as well."""
    node = graph.output_node()
    results: Any = node.args[0]
    pairs = list(zip(results, specs, strict=True))
    new = [_updated_whole(graph, value) for value, spec in pairs if spec.kind in _MUTATIONS]
    pairs = list(zip(node.args[0], specs, strict=True))  # type: ignore
    node.args = ((*(value for value, spec in pairs if spec.kind not in _MUTATIONS), *new),)
    return new


def _updated_whole(graph: fx.Graph, new: fx.Node) -> fx.Node:
    """Put elements into what is written itself, on the way to its ``new`` value, where that was permuted first.

    Axes of indices that others are between come to the front in other programs (``indexed``).  Gives the new
    value.
    """
    value = new
    while value.op == "call_function" and value.args and isinstance(value.args[0], fx.Node):
        put = value.args[0]
        if value.target is _ATEN.permute.default and put.target is _ATEN.index_put.default:
            permuted: Any = put.args[0]
            if permuted.target is _ATEN.permute.default and len(put.users) == len(permuted.users) == 1:
                whole = _put_whole(graph, value, put, permuted)
                new = whole if new is value else new
                value = whole
        value = value.args[0]  # pyright: ignore[reportAssignmentType]
    return new


def _put_whole(graph: fx.Graph, value: fx.Node, put: fx.Node, permuted: fx.Node) -> fx.Node:
    """Replace ``value``, a permutation of ``put``, which is of a permutation; what it is replaced by."""
    source, order = permuted.args
    chosen: Any = put.args[1]
    indices: list[Any] = [None] * len(order)  # pyright: ignore[reportArgumentType]
    for axis, index in zip(order, chosen, strict=False):  # pyright: ignore[reportArgumentType]
        indices[axis] = index
    if list(value.args[1]) != [list(order).index(axis) for axis in range(len(order))]:  # type: ignore
        return value
    with graph.inserting_before(value):
        whole = graph.call_function(put.target, (source, indices, *put.args[2:]), dict(put.kwargs))  # type: ignore
    whole.meta = {**value.meta, "stack_trace": put.meta.get("stack_trace")}
    value.replace_all_uses_with(whole)
    for node in (value, put, permuted):
        graph.erase_node(node)
    return whole


def state_specs(state: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The state as a signature has it."""
    return tuple(
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in state.items()
    )
