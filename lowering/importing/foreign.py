"""Declare operations of other libraries, and make them functional in a traced program.

The tables of ``patterns.named_ops`` and its neighbours say which they are.  ``declare_ops`` lets
torch.export trace them without their library; ``functionalize`` replaces those that write into their
arguments by twins that return what would have been written, since a compiled program is functional.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from patterns.block_scaled_matmul import NamedProduct
from patterns.named_call import FUNCTIONAL, LAYOUT, NamedOp

from ..errors import CompileError
from ..families.registry import families

# Keep the declarations alive: a Library takes its operations with it.
_libraries: list[torch.library.Library] = []
# What quantizations that do not say it return, in the declarations made here.
_fp8 = torch.float8_e4m3fn


# --- declaring -------------------------------------------------------------------------------------


def declare_ops(fp8: torch.dtype = torch.float8_e4m3fn, names: Collection[str] = ()) -> None:
    """Declare to PyTorch the operations of the table that no imported library has registered.

    Models that call them can then be exported and compiled, though not run eagerly.  ``fp8``: the element
    type of quantizations that leave it to their platform.  A library that registers the same names has to
    be imported before this is called.  Calling again declares nothing twice.

    Those that models tend to register themselves, vLLM's fused quantizations among them, are recognised but
    not declared, unless ``names`` has them (``_C::rms_norm_static_fp8_quant``).
    """
    global _fp8
    _fp8 = fp8
    for row, *_ in _rows().values():
        if not _is_registered(row.name) and (row.is_declared or row.name in names):
            _define(row.name, row.schema, _fake(row))


def _is_registered(name: str) -> bool:
    namespace, _, op = name.partition("::")
    return hasattr(getattr(torch.ops, namespace), op)


def _define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    namespace, _, op = name.partition("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(op + schema)
    torch.library.register_fake(name, fake, lib=library)
    _libraries.append(library)


def _fake(row: NamedOp) -> Callable[..., Any]:
    """Shapes, dtypes and strides of what ``row`` returns."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        if row.mutated:
            return None
        given = {**dict(zip(row.arguments, args, strict=False)), **kwargs}
        made = _shapes(row, given)
        results = [given[row.x].new_empty(made[role][0], dtype=made[role][1]) for role in row.results]
        return results if row.schema.endswith("Tensor[]") else _returned(results)

    return fake


def _shapes(row: NamedOp, given: Mapping[str, Any]) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    """Shape and dtype of each result; rows know the dtypes of PyTorch by name."""
    made = row.shapes(given, str(_fp8).removeprefix("torch."))
    return {
        role: (shape, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for role, (shape, dtype) in made.items()
    }


@cache
def _rows() -> dict[str, list[NamedOp]]:
    """The rows of every family by the name of their operation, whose schema they share."""
    rows: dict[str, list[NamedOp]] = {}
    for family in families():
        for row in family.patterns.named:
            rows.setdefault(row.name, []).append(row)
    return rows


def _returned(results: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return results[0] if len(results) == 1 else tuple(results)


# --- making functional -----------------------------------------------------------------------------


def functionalize(
    exported: ExportedProgram, decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> ExportedProgram:
    """Decompose ``exported``, with every operation of the table that writes into its arguments replaced.

    Each becomes its functional twin; what it would have written is what is read afterwards, through any
    alias.  ``decompositions`` are those of ``ExportedProgram.run_decompositions``.  Raises CompileError,
    naming the operation and its line, for any other operation that writes into its arguments.
    """
    table = None if decompositions is None else dict(decompositions)
    if any(_written_by(node) for node in exported.graph.nodes):
        # PyTorch itself knows what a copy into a tensor means for its aliases: let it do that part.
        rewritten = _copy_of(exported)
        for change in (_expand_functionalized, _replace_by_twin):
            for node in list(rewritten.graph.nodes):
                row = _written_by(node)
                if row is not None:
                    change(node, row)
        rewritten.graph_module.recompile()
        functional = rewritten.run_decompositions(table)
        _fold_copies(functional)
    else:
        functional = exported.run_decompositions(table)
    _spell_bytes(functional)
    _refuse_rest(functional)
    return functional


def _spell_bytes(exported: ExportedProgram) -> None:
    """Say what a product reads that takes scales by their bytes: columns, whose shape is that of rows."""
    graph = exported.graph
    for node in list(graph.nodes):
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        row = next(iter(_rows().get(name, ())), None)
        if not (isinstance(row, NamedProduct) and row.by_bytes):
            continue
        number = row.arguments.index(row.a_scale)
        scale = node.kwargs.get(row.a_scale) or node.args[number]
        value = scale.meta["val"]
        one = any(isinstance(size, int) and size == 1 for size in value.shape)
        if value.dim() != 2 or one or not value.is_contiguous():
            continue
        with graph.inserting_before(node):
            columns = _noted(graph, torch.ops.aten.view.default, scale, [value.shape[1], -1])
            rows = _noted(graph, torch.ops.aten.permute.default, columns, [1, 0])
        node.replace_input_with(scale, rows)
    graph.lint()
    exported.graph_module.recompile()


def _noted(graph: fx.Graph, op: Any, source: fx.Node, argument: Any) -> fx.Node:
    """A call of ``op``, and what it returns noted on it."""
    node = graph.call_function(op, (source, argument))
    node.meta = {"val": op(source.meta["val"], argument), "stack_trace": source.meta.get("stack_trace")}
    return node


def _written_by(node: fx.Node) -> NamedOp | None:
    """The row of the table by which ``node`` writes into its arguments, itself or in PyTorch's wrapper."""
    target = node.args[0] if _is_wrapper(node) else node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    rows = [row for row in _rows().get(target._schema.name, ()) if row.mutated]
    given = _given(node, target)
    return next((row for row in rows if row.is_called(given)), next(iter(rows), None))


def _given(node: fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """The arguments of a call by name; in PyTorch's wrapper those written are numbers of tensors."""
    if not _is_wrapper(node):
        return _bound(target, node)
    names = [argument.name for argument in target._schema.arguments]
    return {name: node.kwargs.get(name, node.kwargs.get(f"_{name}_base_index")) for name in names}


def _refuse_rest(exported: ExportedProgram) -> None:
    """Raise CompileError if an operation that is not PyTorch's own still writes into its arguments."""
    for node in exported.graph.nodes:
        if _is_wrapper(node):
            raise CompileError(
                f"{node.args[0]} writes into its arguments and is no operation this compiler knows; a "
                "compiled program is a function of its inputs: use a form of it that returns its "
                f"results{_line(node)}"
            )


def _copy_of(exported: ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own, so that the caller's stays as it is."""
    module = fx.GraphModule(exported.graph_module, copy.deepcopy(exported.graph))
    module.meta.update(exported.graph_module.meta)
    return exported._update(module, exported.graph_signature)


def _line(node: fx.Node) -> str:
    """The line of the model that ``node`` comes from."""
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or ""
    )
    return "\n  {}:{}: {}".format(*frames[-1]) if frames else ""


def _replace_by_twin(node: fx.Node, row: NamedOp) -> None:
    """``op(out, x)`` becomes ``copy_(out, twin(out, x))``."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = _bound(node.target, node)
    unknown = [name for name in given if name not in row.arguments]
    if unknown:
        raise CompileError(
            f"{row.name} has arguments this compiler does not know, {', '.join(unknown)}: "
            f"another version of its library is needed{_line(node)}"
        )
    written = [given[name] for name in row.mutated]
    keywords = {name: value for name, value in given.items() if name in row.arguments}
    if "scale" in row.results:
        scale = written[row.results.index("scale")]
        keywords[LAYOUT] = _layout(scale.meta.get("val"))
    graph = node.graph
    with graph.inserting_before(node):
        call = graph.call_function(_twin(row), (), keywords)
        call.meta = copy.copy(node.meta)
        for number, out in enumerate(written):
            result = call if len(written) == 1 else graph.call_function(operator.getitem, (call, number))
            graph.call_function(torch.ops.aten.copy_.default, (out, result))
    graph.erase_node(node)


def _bound(target: torch._ops.OpOverload, node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, without those at the values its schema gives them."""
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _twin(row: NamedOp) -> torch._ops.OpOverload:
    """The functional form of ``row``, defined at its first use."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(row.arguments, args, strict=False)), **kwargs}
        outs: list[Tensor] = [given[name] for name in row.mutated]
        return _returned([out.new_empty_strided(out.shape, out.stride()) for out in outs])

    if not _is_registered(row.functional):
        _define(row.functional, row.functional_schema, fake)
    return getattr(getattr(torch.ops, FUNCTIONAL), row.functional.partition("::")[2]).default


def _layout(scale: Any) -> str:
    """Name the layout that the caller gave the tensor for the scales: its strides, which no program has."""
    if not isinstance(scale, Tensor) or scale.dim() != 2 or scale.dtype != torch.float32:
        return "row"
    (rows, groups), (down, across) = scale.shape, scale.stride()
    if groups == 1 or not _same(down, 1) or _same(across, 1):
        return "row"
    return "column" if _same(across, rows) else "column_tma"


def _same(a: Any, b: Any) -> bool:
    """Tell whether two sizes are one; sizes only known at run time, whether they are one expression."""
    return str(a) == str(b)


# --- programs that PyTorch has made functional already ---------------------------------------------

_WRAPPERS = (
    torch.ops.higher_order.auto_functionalized,
    torch.ops.higher_order.auto_functionalized_v2,
)


def _is_wrapper(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _WRAPPERS


def _expand_functionalized(node: fx.Node, row: NamedOp) -> None:
    """PyTorch's wrapper of an operation that writes becomes that operation again, on clones."""
    if not _is_wrapper(node):
        return
    target = node.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    with node.graph.inserting_before(node):
        clones = _unwrapped(node, target, row)
    for user in list(node.users):
        # What the operation returns comes first: one None, as those of the table return nothing.
        number = user.args[1]
        assert isinstance(number, int)
        user.replace_all_uses_with(clones[number - 1])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _unwrapped(node: fx.Node, target: torch._ops.OpOverload, row: NamedOp) -> list[fx.Node]:
    """The call that ``node`` wraps, on clones of what it writes; these clones."""
    names = [argument.name for argument in target._schema.arguments]
    given = {name: node.kwargs[name] for name in names if name in node.kwargs}
    if "_all_bases" in node.kwargs:
        bases: Any = node.kwargs["_all_bases"]
        clones = [_clone(node.graph, base) for base in bases]
        given.update(dict.fromkeys(row.unwritten))
        for name in row.mutated:
            given[name] = _view_of(node, name, clones)
    else:
        clones = [_clone(node.graph, given[name]) for name in row.mutated]
        given.update(zip(row.mutated, clones, strict=True))
    call = node.graph.call_function(target, (), given)
    call.meta = copy.copy(node.meta)
    return clones


def _clone(graph: fx.Graph, base: Any) -> fx.Node:
    # Strides kept: they say how the caller wants the scales laid out.
    clone = graph.call_function(torch.ops.aten.clone.default, (base,))
    clone.meta = copy.copy(base.meta)
    return clone


def _view_of(node: fx.Node, name: str, clones: list[fx.Node]) -> fx.Node:
    """Find what the argument ``name`` is: a clone, or a clone with its axes in another order."""
    index = node.kwargs[f"_{name}_base_index"]
    assert isinstance(index, int)
    clone, strides = clones[index], node.kwargs.get(f"_{name}_stride")
    if strides is None and f"_{name}_slice_dim" not in node.kwargs:
        return clone
    base = clone.meta["val"]
    order = _axes(base, strides) if isinstance(strides, (list, tuple)) else None
    if order is None:
        raise CompileError(
            f"{node.args[0]} writes into part of a tensor: let it write all of it{_line(node)}"
        )
    view = node.graph.call_function(torch.ops.aten.permute.default, (clone, order))
    view.meta = {**clone.meta, "val": base.permute(order)}
    return view


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _axes(base: Tensor, strides: Iterable[Any]) -> list[int] | None:
    """The axes of ``base``, each once, that have these strides."""
    left, axes = list(range(base.dim())), []
    for stride in strides:
        axis = next((axis for axis in left if _same(base.stride(axis), _value(stride))), None)
        if axis is None:
            return None
        left.remove(axis)
        axes.append(axis)
    return None if left else axes


# --- afterwards ------------------------------------------------------------------------------------


def _fold_copies(exported: ExportedProgram) -> None:
    """Remove the copies into fresh tensors, and the reorderings of axes around them, that are left."""
    for node in list(exported.graph.nodes):
        source = _same_value(node)
        if source is not None:
            node.replace_all_uses_with(source)
            exported.graph_signature.replace_all_uses(node.name, source.name)
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _same_value(node: fx.Node) -> fx.Node | None:
    """The node whose value ``node`` repeats."""
    if node.target == torch.ops.aten.copy.default:
        source = node.args[1]
        same = isinstance(source, fx.Node) and _same_type(node, source)
        return source if same else None  # pyright: ignore[reportReturnType]
    if node.target == torch.ops.aten.permute.default:
        inner = node.args[0]
        if isinstance(inner, fx.Node) and inner.target == torch.ops.aten.permute.default:
            first, second = _order(inner), _order(node)
            if [first[axis] for axis in second] == list(range(len(first))):
                return inner.args[0]  # pyright: ignore[reportReturnType]
    return None


def _order(permute: fx.Node) -> list[int]:
    axes: Iterable[Any] = permute.args[1]  # pyright: ignore[reportAssignmentType]
    axes = list(axes)
    return [axis % len(axes) for axis in axes]


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    first, second = a.meta["val"], b.meta["val"]
    return first.dtype == second.dtype and [*map(str, first.shape)] == [*map(str, second.shape)]
