"""Make of a graph that Dynamo traced a module for torch.export, open in the sizes that Dynamo left open.

Dynamo passes an open size beside the tensors that have it, and returns views of arguments as it finds them.
In a program a size is its tensor's, and a result has memory of its own; so such ints are not passed, and such
views are made by PyTorch when the program has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.traceback import preserve_node_meta

from ..errors import CompileError
from .refusals import model_line

# Functions of Python's operator module; what else writes has a name that ends with _.
_IN_PLACE = {"setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
_IN_PLACE |= {"iand", "ior", "ixor", "ilshift", "irshift"}


@dataclass(frozen=True)
class Parts:
    """What of a graph is compiled, and what is not.

    module: computes ``results``, by number, from ``arguments``, by number.  views: computes all results that
    are views of arguments, from all arguments; None: there are none.  open: of each of ``arguments`` its open
    sizes by axis, each an expression; None: it is an int, and open.  homes: the device of each of ``results``
    that is a tensor.
    """

    module: torch.nn.Module
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    views: fx.GraphModule | None
    open: tuple[dict[int, str] | None, ...]
    homes: tuple[torch.device | None, ...]

    @staticmethod
    def of(graph: fx.GraphModule) -> Parts:
        """Those of ``graph``.  Raises CompileError where it returns a view of what it writes."""
        returned = _outputs(graph)
        arguments = {_storage(node) for node in graph.graph.nodes if node.op == "placeholder"} - {None}
        of_arguments = [i for i, node in enumerate(returned) if _storage(node) in arguments]
        computed = [i for i in range(len(returned)) if i not in of_arguments]
        views = _views(graph, of_arguments, arguments) if of_arguments else None
        computes = _only(graph, computed)
        passed = _sizes_of_tensors(computes)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        values = [placeholders[number] for number in passed]
        opened = tuple(None if isinstance(_value(node), SymInt) else _open_sizes(node) for node in values)
        homes = tuple(getattr(_value(node), "device", None) for node in _outputs(computes))
        return Parts(_Traced(computes), tuple(passed), tuple(computed), views, opened, homes)

    def passed(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the module, of all that the graph is called with."""
        return tuple(inputs[number] for number in self.arguments)

    def shapes(self, *, named: bool) -> Any:
        """The module's dynamic shapes; sizes that Dynamo has one name for are one, where they are ``named``.

        Else torch.export finds out which are equal, and which are numbers.
        """
        auto = torch.export.Dim.AUTO
        dims = {name: torch.export.Dim(f"d{i}") for i, name in enumerate(self._names())} if named else {}
        specs = [
            auto if sizes is None else {axis: dims.get(name, auto) for axis, name in sizes.items()} or None
            for sizes in self.open
        ]
        return (tuple(specs),)

    def _names(self) -> list[str]:
        """The open sizes that are no expressions of others."""
        names = [name for sizes in self.open for name in (sizes or {}).values()]
        return [name for name in dict.fromkeys(names) if name.isidentifier()]

    def called_with(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """The graph, called as Dynamo calls it, for a ``program`` of the module."""

        def call(*inputs: Any) -> Any:
            computed = program(*self.passed(inputs))
            if self.views is None:
                return computed
            made = dict(zip(self.results, computed, strict=True))
            views = iter(self.views(*inputs))
            return tuple(made[i] if i in made else next(views) for i in range(self._count))

        return call

    @property
    def _count(self) -> int:
        return len(self.results) + (len(_outputs(self.views)) if self.views is not None else 0)


class _Traced(torch.nn.Module):
    """A graph that is traced with the lines of the model that it has, not with its own."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(self.graph).run(*args)


def _outputs(graph: fx.GraphModule) -> list[Any]:
    return list(graph.graph.output_node().args[0])  # pyright: ignore[reportArgumentType]


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _storage(node: Any) -> Any:
    """What tells the memory that a node's tensor is in from others; None: it is no tensor."""
    value = _value(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _only(graph: fx.GraphModule, numbers: Sequence[int]) -> fx.GraphModule:
    """``graph`` with these of its results, and all arguments."""
    copied: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    new.graph_copy(graph.graph, copied)
    results = [_outputs(graph)[number] for number in numbers]
    new.output(tuple(copied[node] if isinstance(node, fx.Node) else node for node in results))
    only = fx.GraphModule(graph, new)
    _drop_dead(only)
    return only


def _drop_dead(graph: fx.GraphModule) -> None:
    kept = ("placeholder", "output")
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in kept or _writes(node))
    graph.recompile()


def _writes(node: fx.Node) -> bool:
    """Tell whether an operation writes into what it is given."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    schema = getattr(target, "_schema", None)
    return node.op.startswith("call") and (
        (name.endswith("_") and not name.endswith("__"))
        or name in _IN_PLACE
        or "out" in node.kwargs
        or (schema is not None and schema.is_mutable)
        or (node.op == "call_function" and node.is_impure())
    )


def _views(graph: fx.GraphModule, numbers: Sequence[int], arguments: set[Any]) -> fx.GraphModule:
    """Those results of ``graph`` that are views of arguments, from arguments that have been written already.

    Raises CompileError where more would have to be computed a second time.
    """
    views = _only(graph, numbers)
    for node in list(views.graph.nodes):
        if _writes(node):
            if _value(node) is not None and isinstance(node.args[0], fx.Node):
                if _layout(node) != _layout(node.args[0]):
                    raise _refused(node)
                node.replace_all_uses_with(node.args[0])
            if not node.users:
                views.graph.erase_node(node)
    _drop_dead(views)
    for node in views.graph.nodes:
        if node.op not in ("placeholder", "output") and _storage(node) not in {None, *arguments}:
            raise _refused(node)
    return views


def _refused(node: fx.Node) -> CompileError:
    return CompileError(
        f"{model_line(node)}{node.name}: the graph returns a view of an argument and computes on the way to "
        "it; return a clone"
    )


def _layout(node: fx.Node) -> Any:
    value = _value(node)
    return isinstance(value, Tensor) and (value.shape, value.stride(), value.storage_offset(), _storage(node))


def _sizes_of_tensors(graph: fx.GraphModule) -> list[int]:
    """Have the sizes that are passed be those of the tensors that have them; the numbers of what is left."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in placeholders if isinstance(_value(node), Tensor)]
    left = []
    with graph.graph.inserting_after(placeholders[-1] if placeholders else None):
        for number, node in enumerate(placeholders):
            if not isinstance(_value(node), SymInt):
                left.append(number)
                continue
            place = _place(tensors, _name(_value(node)))
            if place is not None:
                node.replace_all_uses_with(graph.graph.call_function(torch.ops.aten.sym_size.int, place))
            if place is not None or not node.users:
                graph.graph.erase_node(node)
            else:
                left.append(number)
    graph.recompile()
    return left


def _place(tensors: Sequence[fx.Node], size: str) -> tuple[fx.Node, int] | None:
    """A tensor and an axis of that ``size``."""
    places = (
        (tensor, axis) for tensor in tensors for axis, name in _open_sizes(tensor).items() if name == size
    )
    return next(places, None)


def _open_sizes(placeholder: fx.Node) -> dict[int, str]:
    value = _value(placeholder)
    sizes = value.shape if isinstance(value, Tensor) else ()
    return {axis: _name(size) for axis, size in enumerate(sizes) if isinstance(size, SymInt)}


def _name(size: SymInt) -> str:
    return str(size.node.expr)
