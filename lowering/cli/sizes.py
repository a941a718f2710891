"""Find other sizes to call a model with, where its exported form leaves sizes open."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

Sizes = dict[int, tuple[Any, int]]
"""Of one tensor: the dimension, what says which sizes are equal to it, and how many units of that it is."""


class Call(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def other_arguments(
    args: Sequence[Any], dynamic_shapes: Any, kwargs: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Call]] | None:
    """Make arguments with other sizes, and words for those; None where every size is fixed.

    The tensors hold the values they have, repeated or cut.  Sizes are within the range that their Dim has,
    and multiples of what it says; whether a model takes them only it can tell.
    """
    call = Call(tuple(args), dict(kwargs or {}))
    open_sizes = _open_sizes(call, dynamic_shapes)
    symbols = {symbol for sizes in open_sizes.values() for symbol, _ in sizes.values()}
    return _candidates(call, open_sizes) if symbols else None


@dataclass(frozen=True)
class _Symbol:
    """A size that is open, with its range."""

    name: str
    min: int
    max: int | None


@dataclass(frozen=True)
class _Multiple:
    root: _Symbol
    fn: Any


def exported_shapes(program: torch.export.ExportedProgram) -> list[Any] | None:
    """List what an exported program leaves open of its arguments, keywords last, as ``dynamic_shapes`` does.

    None if there is a size that is more than a multiple of another.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs: list[Any] = []
    for name in program.graph_signature.user_inputs:
        sizes = getattr(values.get(str(name)), "shape", ())
        open_sizes = {dim: size for dim, size in enumerate(sizes) if not isinstance(size, int)}
        spec = {dim: _exported(size, program) for dim, size in open_sizes.items()}
        if None in spec.values():
            return None
        specs.append(spec)
    args, kwargs = program.example_inputs or ((), {})
    arguments = [*args, *kwargs.values()]
    return list(pytree.tree_unflatten(specs, pytree.tree_structure(arguments))) if arguments else None


def _exported(size: Any, program: torch.export.ExportedProgram) -> Any:
    factor, symbol = size.node.expr.as_coeff_Mul()
    if not symbol.is_Symbol or not factor.is_Integer:
        return None
    bounds = program.range_constraints.get(symbol)
    lower, upper = (_bound(getattr(bounds, name, None)) for name in ("lower", "upper"))
    root = _Symbol(str(symbol), lower or 0, upper)
    return root if factor == 1 else _Multiple(root, lambda units: units * int(factor))


def _open_sizes(call: Call, dynamic_shapes: Any) -> dict[int, Sizes]:
    """Find the sizes that are open, by the number of the tensor among the leaves of the arguments."""
    if dynamic_shapes is None:
        return {}
    leaves = pytree.tree_leaves(call)
    specs = _per_leaf(call, dynamic_shapes)
    found: dict[int, Sizes] = {}
    for number, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        if isinstance(leaf, torch.Tensor) and spec:
            items = spec.items() if isinstance(spec, dict) else enumerate(spec)
            found[number] = {
                int(dim): (_symbol(size, leaf.shape[int(dim)]), _factor(size))
                for dim, size in items
                if _is_open(size)
            }
    return found


def _per_leaf(call: Call, shapes: Any) -> list[Any]:
    """List what ``shapes`` says of each leaf; it is built like the arguments, or names their parameters."""
    args = [*call.args, *call.kwargs.values()]
    if isinstance(shapes, dict):
        given = [spec for name, spec in shapes.items() if name not in call.kwargs]
        top = [*given[: len(call.args)], *[None] * (len(call.args) - len(given))]
        top += [shapes.get(name) for name in call.kwargs]
    else:
        top = list(shapes)
    if len(top) == 1 and len(args) != 1 and isinstance(top[0], (tuple, list)):
        top = list(top[0])  # of *args
    specs: list[Any] = []
    for arg, spec in itertools.zip_longest(args, top[: len(args)]):
        specs += _spread(arg, spec)
    return specs


def _spread(arg: Any, spec: Any) -> list[Any]:
    if isinstance(arg, torch.Tensor) or spec is None:
        return [spec] * len(pytree.tree_leaves(arg))
    if isinstance(arg, dict) and isinstance(spec, dict):
        return [leaf for key, value in arg.items() for leaf in _spread(value, spec.get(key))]
    if isinstance(arg, (tuple, list)) and isinstance(spec, (tuple, list)):
        return [leaf for one, more in itertools.zip_longest(arg, spec) for leaf in _spread(one, more)]
    return [None] * len(pytree.tree_leaves(arg))


def _is_open(size: Any) -> bool:
    hint = getattr(size, "type", None)  # of a hint such as Dim.AUTO; a Dim has none
    return size is not None and not isinstance(size, int) and getattr(hint, "name", "") != "STATIC"


def _symbol(size: Any, now: int) -> Any:
    """The Dim by name, the same for all that are equal or derived from it.

    Where export finds out by itself what is equal, what is equal ``now`` is taken to be.
    """
    root = getattr(size, "root", size)
    if isinstance(root, _Symbol):
        return root
    if hasattr(root, "__name__"):
        return _Symbol(root.__name__, getattr(root, "min", 0), getattr(root, "max", None))
    return _Symbol(f"equal to {now}", getattr(size, "min", None) or 0, getattr(size, "max", None))


def _factor(size: Any) -> int:
    """Count the units of its root that a derived Dim is (4 for ``4 * Dim("q")``); 1 for every other."""
    fn = getattr(size, "fn", None)
    return int(fn(1)) if fn else 1


def _candidates(call: Call, open_sizes: dict[int, Sizes]) -> Iterator[tuple[str, Call]]:
    leaves, tree = pytree.tree_flatten(call)
    now: dict[Any, int] = {}
    for number, sizes in open_sizes.items():
        for dim, (symbol, factor) in sizes.items():
            now.setdefault(symbol, max(leaves[number].shape[dim] // factor, 1))
    for change in (lambda n: n + 3, lambda n: 2 * n, lambda n: n - 1, lambda n: n + 1, lambda n: 4 * n):
        then = {
            symbol: _within(symbol, change(size + order)) for order, (symbol, size) in enumerate(now.items())
        }
        if then == now or min(then.values()) < 1:
            continue
        changed = list(leaves)
        for number, sizes in open_sizes.items():
            for dim, (symbol, factor) in sizes.items():
                changed[number] = _resized(changed[number], dim, then[symbol] * factor)
        shapes = [tuple(changed[number].shape) for number, sizes in open_sizes.items() if sizes]
        words = ", ".join("x".join(map(str, shape)) for shape in shapes[:4])
        yield words, pytree.tree_unflatten(changed, tree)


def _within(symbol: Any, size: int) -> int:
    least, most = (_bound(getattr(symbol, name, None)) for name in ("min", "max"))
    size = size if most is None else min(size, most)
    return size if least is None else max(size, least)


def _bound(value: Any) -> int | None:
    """A bound as a number; torch has an infinity of its own for none."""
    return None if value is None or value in (int_oo, -int_oo) else int(value)


def _resized(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    old = max(tensor.shape[dim], 1)
    index = torch.arange(size, device=tensor.device) % old
    bits = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return bits.index_select(dim, index).view(tensor.dtype)
