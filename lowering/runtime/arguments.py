"""Hold a call's arguments against the signature: which tensors they are, of which sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..containers import load
from ..errors import ArgumentError
from ..signature import (
    Constant,
    Integer,
    Leaf,
    Symbols,
    TensorSpec,
    names_in,
    resolve,
    sizes_of,
    solve,
)
from .session import dtype_name

_INT64 = 1 << 63

Argument = TensorSpec | Integer
"""What is passed to a program."""


def passed(leaves: tuple[Leaf, ...] | None) -> tuple[Argument, ...] | None:
    """Keep the leaves that a program is passed; None where it says nothing of them."""
    return None if leaves is None else tuple(leaf for leaf in leaves if not isinstance(leaf, Constant))


def tensor_specs(leaves: tuple[Leaf, ...] | None) -> tuple[TensorSpec, ...] | None:
    """Keep the leaves that are tensors; None where the program says nothing of them."""
    return None if leaves is None else tuple(leaf for leaf in leaves if isinstance(leaf, TensorSpec))


def without_constants(specs: tuple[Leaf, ...], leaves: Sequence[Any]) -> list[Any]:
    """The leaves that are passed; the others must have the value that was compiled."""
    kept = []
    for position, (spec, leaf) in enumerate(zip(specs, leaves, strict=True)):
        if not isinstance(spec, Constant):
            kept.append(leaf)
        elif isinstance(leaf, Tensor) or type(leaf) is not type(spec.value) or leaf != spec.value:
            got = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
            raise ArgumentError(f"argument {position} was compiled as the constant {spec.value!r}, got {got}")
    return kept


def check_kinds(specs: Sequence[Argument] | None, values: Sequence[Any], device: Any) -> None:
    """Check that each argument is a tensor on ``device``, or an int where the program takes one."""
    for position, value in enumerate(values):
        spec = specs[position] if specs and position < len(specs) else None
        name = str(position) if spec is None else spec.name
        if isinstance(spec, Integer):
            if type(value) is not int:
                raise ArgumentError(f"argument {name}: expected an int, got {type(value).__name__}")
            if not -_INT64 <= value < _INT64:
                raise ArgumentError(f"argument {name}: {value} has more than 64 bits")
        elif not isinstance(value, Tensor):
            raise ArgumentError(f"argument {name}: expected a tensor, got {type(value).__name__}")
        elif value.device != device:
            raise ArgumentError(f"argument {name} is on {value.device}, the program runs on {device}")


def bind(specs: Sequence[Argument], values: Sequence[Any]) -> Symbols:
    """Check dtypes, shapes and ints; the value of every symbol."""
    for spec, value in zip(specs, values, strict=True):
        if isinstance(spec, TensorSpec) and (
            dtype_name(value.dtype) != spec.dtype
            or (spec.shape is not None and value.dim() != len(spec.shape))
        ):
            raise _mismatch(spec, value)
    sizes = [
        (spec, value, dim, size)
        for spec, value in zip(specs, values, strict=True)
        for dim, size in zip(sizes_of(spec), _sizes(spec, value), strict=True)
    ]
    symbols: Symbols = {}
    for _, _, dim, size in sizes:
        if isinstance(dim, str) and dim.isidentifier():
            symbols.setdefault(dim, size)
    # A size such as 2*s0 may come before the argument that gives s0 its value, or be all that does.
    for _, _, dim, size in sizes:
        symbols.update(solve(dim, size, symbols))
    for spec, value, dim, size in sizes:
        expected = resolve(dim, symbols)
        if expected is not None and expected != size:
            raise _mismatch(spec, value, f" where {dim} = {expected}" if isinstance(dim, str) else "")
    return symbols


def _sizes(spec: Argument, value: Any) -> tuple[int, ...]:
    """What a call's argument has for ``sizes_of(spec)``."""
    if isinstance(spec, Integer):
        return (value,)
    return () if spec.shape is None else tuple(value.shape)


def _mismatch(spec: Argument, value: Any, why: str = "") -> ArgumentError:
    got = repr(value)
    if isinstance(value, Tensor):
        got = f"{dtype_name(value.dtype)}[{', '.join(str(size) for size in value.shape)}]"
    return ArgumentError(f"argument {spec.name}: expected {spec}, got {got}{why}")


def not_exported_for(condition: str, specs: Sequence[Argument], values: Sequence[Any]) -> ArgumentError:
    """The condition in terms of the arguments, with the size that each of its symbols is seen by."""
    seen: list[str] = []
    for name in sorted(names_in(condition)):
        places = [
            (spec, axis, dim, size)
            for spec, value in zip(specs, values, strict=True)
            for axis, (dim, size) in enumerate(zip(sizes_of(spec), _sizes(spec, value), strict=True))
            if name in names_in(dim)
        ]
        # The plain symbol before a multiple of it.
        spec, axis, dim, size = min(places, key=lambda place: place[2] != name)
        of_int = isinstance(spec, Integer)
        seen.append(f"argument {spec.name}: " + (f"{size}" if of_int else f"size {size} of axis {axis}"))
        if dim != name:
            seen[-1] += f" ({dim})"
        known_as = spec.name if of_int else f"{spec.name}.shape[{axis}]"
        condition = re.sub(rf"\b{name}\b", known_as if dim == name else name, condition)
    return ArgumentError(f"{'; '.join(seen)}: the model was exported for sizes with {condition}")


def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """'3 and keywords mask', or that only the nesting differs."""
    keywords = f" and keywords {', '.join(kwargs)}" if kwargs else ""
    return f"{len(args)} positional{keywords}, or other containers inside them"


def result_tree(text: str | None) -> pytree.TreeSpec | None:
    """The tree of a result, or None where that is what there is without one: the one leaf, or a tuple."""
    tree = load(text)
    if tree is None:
        return None
    count = tree.num_leaves
    return None if tree == pytree.tree_structure(0 if count == 1 else (0,) * count) else tree


def positional_count(tree: pytree.TreeSpec | None, inputs: tuple[Leaf, ...] | None) -> int | None:
    """Count a call's arguments, if all are tensors, none in a container and none a keyword; else None."""
    if tree is None or not all(isinstance(leaf, TensorSpec) for leaf in inputs or ()):
        return None
    count = tree.num_leaves
    return count if tree == pytree.tree_structure(((0,) * count, {})) else None


def keywords_of(text: str | None) -> tuple[str, ...]:
    """The keyword arguments of an input tree ``(args, kwargs)``, in order."""
    if text is None:
        return ()
    children = json.loads(text)[1]["children_spec"]
    return tuple(json.loads(children[1]["context"])) if len(children) == 2 else ()
