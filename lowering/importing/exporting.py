"""Run torch.export, and where it says that open sizes are fixed by the model, find out whether they are.

torch.export decides by the example's sizes wherever it has to know one: how many chunks a sequence is padded
to, whether one of them is contiguous, which of two equal results is computed.  Each decision fixes sizes that
were to stay open, and it then refuses.  Here such a model is exported again, with larger example sizes and
every decision kept as an assertion.  The exported program is evaluated at sizes that violate the assertions:
where it agrees with the model, an assertion was needless and is dropped, and where it does not, the model is
refused.  Assertions that no evaluated size violates remain conditions of a call, and so do those that only
sizes violate which the model itself refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..signature import evaluate
from .refusals import open_topk
from .sizes import Call, Resizing

_ASSERTION = torch.ops.aten._assert_scalar.default
# Of an element, relative to the largest: the model and its graph are the same operations.
_ROUNDINGS = 16


def export(
    module: torch.nn.Module, call: Call, dynamic_shapes: Any
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export ``module`` for the arguments of ``call``: the program, and conditions beside its own.

    Raises whatever torch.export raises, and CompileError where no size is to blame.
    """
    try:
        return _exported(module, call, dynamic_shapes), ()
    except UserError as error:
        divisors, resizing = _divisors(error), Resizing.of(call, dynamic_shapes)
        if divisors is None or resizing is None or not _on_host(call):
            raise
        general = _general(module, resizing, dynamic_shapes, max(divisors, default=1))
        if general is None:
            raise
        return general


def _on_host(call: Call) -> bool:
    """Tell whether the model may be tried at sizes it refuses: an index too large is an error on the CPU, and
    the end of every CUDA call of the process on a GPU."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return all(leaf.device.type == "cpu" for leaf in leaves if isinstance(leaf, Tensor))


def _exported(
    module: torch.nn.Module, call: Call, dynamic_shapes: Any, *, deferred: bool = False
) -> ExportedProgram:
    with _AttentionSizes():
        return torch.export.export(
            module,
            call.args,
            call.kwargs,
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )


class _AttentionSizes(TorchFunctionMode):
    """Compares the sizes that an attention needs to be equal, since PyTorch's own shape function does not.

    So torch.export knows that they are, as it does of the operands of a product.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, key, value = _attended(*args, **kwargs or {})
            torch._check(key.shape[-2] == value.shape[-2])
            torch._check(key.shape[-1] == query.shape[-1])
        return func(*args, **kwargs or {})


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    """The operands of an attention that have to be of equal sizes, however they are passed."""
    return query, key, value


def _divisors(error: UserError) -> list[int] | None:
    """By what the sizes are divided that ``error`` is about; None if a loop or an index fixes one.

    Such a size has one value, whatever is done about assertions.
    """
    environment = _environment(error)
    if environment is None:
        return None
    expressions = [guard.expr for guard in environment.guards]
    if any(isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol for expression in expressions):
        return None
    numbers = {
        int(str(number))
        for expression in expressions
        for part in sympy.preorder_traversal(expression)
        if type(part).__name__ in ("Mod", "PythonMod", "FloorDiv")
        for number in part.args[1:]
        if isinstance(number, sympy.Integer)
    }
    return sorted(numbers)


def _environment(error: UserError) -> ShapeEnv | None:
    """The sizes of the traced program, where the error about them was raised."""
    context: BaseException | None = error
    while context is not None:
        trace = context.__traceback__
        while trace is not None:
            found = trace.tb_frame.f_locals.get("self")
            if isinstance(found, ShapeEnv):
                return found
            trace = trace.tb_next
        context = context.__context__
    return None


def _general(
    module: torch.nn.Module, resizing: Resizing, dynamic_shapes: Any, largest: int
) -> tuple[ExportedProgram, tuple[str, ...]] | None:
    """The model exported without fixing a size, or None if it is not the model at every size tried.

    largest: by what the model divides its sizes.  Raises CompileError for a top-k along an open axis.
    """
    example = resizing.call(resizing.then(lambda size, order: 3 * max(size, largest) + 7 + order))
    try:
        with _config.patch(backed_size_oblivious=True):  # pyright: ignore[reportAttributeAccessIssue]
            exported = _exported(module, example, dynamic_shapes, deferred=True)
    except Exception:
        return None
    if exported.graph_signature.buffers_to_mutate:
        return None  # to evaluate the model would change it
    asserted, fixed = set(assertions(exported)), dict(_fixed_by_assertions(exported))
    drop_assertions(exported)
    tried = [resizing.then(lambda _, order, size=size: size) for size in (1, 2, largest, largest + 1)]
    choosing = next(filter(_chooses_of_any_number, _nodes(exported)), None)
    if choosing is not None:
        if all(_given_by(module, resizing.call(sizes)) is not None for sizes in tried):
            raise open_topk(choosing)
        return None  # the model takes fewer sizes: the error says so
    for sizes in (resizing.now, *tried):
        other = resizing.call(sizes)
        wanted = _given_by(module, other)
        if wanted is None:
            continue  # nothing is known of an assertion where the model refuses the size as well
        if not _agree(exported, other, wanted):
            return None
        values = _symbols(exported, other)
        if any(evaluate(text, values) is None for text in asserted):
            return None
        asserted = {text for text in asserted if evaluate(text, values)}
    _fix_sizes(exported, {size: value for text, (size, value) in fixed.items() if text in asserted})
    return exported, tuple(sorted(asserted))


def _nodes(exported: ExportedProgram) -> Iterator[torch.fx.Node]:
    """The nodes of the graph, and of those inside it, such as a region without gradients."""
    for part in exported.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from part.graph.nodes


def _chooses_of_any_number(node: torch.fx.Node) -> bool:
    """Tell whether a node is a top-k along an open axis: compiled, it chooses others of equal elements.

    So the compiled program would not be what the evaluations below have compared.
    """
    if node.target is not torch.ops.aten.topk.default:
        return False
    source, axis = node.args[0], node.args[2] if len(node.args) > 2 else -1
    assert isinstance(source, torch.fx.Node) and isinstance(axis, int)
    return not isinstance(source.meta["val"].shape[axis], int)


def assertions(exported: ExportedProgram) -> Iterator[str]:
    """What the program asserts of the sizes of its arguments, as text."""
    yield from map(str, _asserted(exported))


def _asserted(exported: ExportedProgram) -> Iterator[Any]:
    for node in _nodes(exported):
        if node.target is _ASSERTION:
            asserted = node.args[0]
            value: Any = asserted.meta.get("val") if isinstance(asserted, torch.fx.Node) else asserted
            if isinstance(value, torch.SymBool):
                yield value.node.expr


def _fixed_by_assertions(exported: ExportedProgram) -> Iterator[tuple[str, tuple[sympy.Basic, int]]]:
    """Of each assertion that a size that is computed is some number, its text, that size and the number."""
    for expression in _asserted(exported):
        if isinstance(expression, sympy.Eq) and isinstance(expression.rhs, sympy.Integer):
            yield str(expression), (expression.lhs, int(expression.rhs))


def _fix_sizes(exported: ExportedProgram, known: Mapping[sympy.Basic, int]) -> None:
    """Replace sizes by the numbers that they are in every call that the conditions allow, in place.

    So the last axis of a tensor is known that was viewed with -1 behind a size that is found by division.
    """
    for node in _nodes(exported):
        value = node.meta.get("val")
        number = known.get(value.node.expr) if isinstance(value, torch.SymInt) else None
        if number is not None:
            node.replace_all_uses_with(number)  # pyright: ignore[reportArgumentType]
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()


def drop_assertions(exported: ExportedProgram) -> None:
    """Remove all assertions, in place: what they say of sizes is checked before a call."""
    for node in [node for node in exported.graph.nodes if node.target is _ASSERTION]:
        exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _symbols(exported: ExportedProgram, call: Call) -> dict[str, int]:
    """The sizes that the arguments of ``call`` have, by the symbols of the exported program."""
    nodes = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    found: dict[str, int] = {}
    for name, leaf in zip(exported.graph_signature.user_inputs, pytree.tree_leaves(call), strict=True):
        traced = nodes.get(str(name))
        if isinstance(traced, Tensor) and isinstance(leaf, Tensor):
            sizes = {str(dim): size for dim, size in zip(traced.shape, leaf.shape, strict=True)}
            found |= {name: size for name, size in sizes.items() if name.isidentifier()}
    return found


def _given_by(module: torch.nn.Module, call: Call) -> list[Any] | None:
    """What the model gives for ``call``; None where it raises, as for sizes it was not written for."""
    copies = _copies(call)
    with torch.no_grad():
        try:
            return pytree.tree_leaves(module(*copies.args, **copies.kwargs))
        except Exception:  # whatever the model says to such arguments
            return None


def _agree(exported: ExportedProgram, call: Call, wanted: list[Any]) -> bool:
    """Tell whether the exported program gives what the model gives, which is ``wanted``."""
    copies = _copies(call)
    with torch.no_grad():
        try:
            found = pytree.tree_leaves(exported.module(check_guards=False)(*copies.args, **copies.kwargs))
        except Exception:  # the graph fits other sizes only
            return False
    return len(found) == len(wanted) and all(map(_same, found, wanted))


def _same(found: Any, wanted: Any) -> bool:
    if not isinstance(wanted, Tensor):
        return type(found) is type(wanted) and found == wanted
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(found, wanted)
    a, b = found.double(), wanted.double()
    largest = b.abs().nan_to_num(0.0, 0.0, 0.0).max()
    tolerance = float(_ROUNDINGS * torch.finfo(wanted.dtype).eps * largest)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _copies(call: Call) -> Call:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
