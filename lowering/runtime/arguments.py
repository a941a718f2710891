"""Hold a call's arguments against the signature: which tensors they are, of which sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import RunError
from ..signature import (
    Constant,
    Leaf,
    Symbols,
    TensorSpec,
    names_in,
    resolve,
    solve,
)
from .session import dtype_name


def tensor_specs(leaves: tuple[Leaf, ...] | None) -> tuple[TensorSpec, ...] | None:
    """Keep the leaves that are tensors; None where the program says nothing of them."""
    return None if leaves is None else tuple(leaf for leaf in leaves if isinstance(leaf, TensorSpec))


def without_constants(specs: tuple[Leaf, ...], leaves: Sequence[Any]) -> list[Any]:
    """The leaves that are tensors; the others must have the value that was compiled."""
    tensors = []
    for position, (spec, leaf) in enumerate(zip(specs, leaves, strict=True)):
        if isinstance(spec, TensorSpec):
            tensors.append(leaf)
        elif isinstance(leaf, Tensor) or type(leaf) is not type(spec.value) or leaf != spec.value:
            got = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
            raise RunError(f"argument {position} was compiled as the constant {spec.value!r}, got {got}")
    return tensors


def bind(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> Symbols:
    """Check dtypes and shapes; the value of every symbol."""
    symbols: Symbols = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        if dtype_name(tensor.dtype) != spec.dtype:
            raise _mismatch(spec, tensor)
        if spec.shape is None:
            continue
        if tensor.dim() != len(spec.shape):
            raise _mismatch(spec, tensor)
        for dim, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                symbols.setdefault(dim, size)
    # A size such as 2*s0 may come before the argument that gives s0 its value, or be all that does.
    sizes = [
        (spec, tensor, dim, size)
        for spec, tensor in zip(specs, tensors, strict=True)
        for dim, size in zip(spec.shape or (), tensor.shape, strict=spec.shape is not None)
    ]
    for _, _, dim, size in sizes:
        symbols.update(solve(dim, size, symbols))
    for spec, tensor, dim, size in sizes:
        expected = resolve(dim, symbols)
        if expected is not None and expected != size:
            raise _mismatch(spec, tensor, f" where {dim} = {expected}" if isinstance(dim, str) else "")
    return symbols


def _mismatch(spec: TensorSpec, tensor: Tensor, why: str = "") -> RunError:
    got = f"{dtype_name(tensor.dtype)}[{', '.join(str(size) for size in tensor.shape)}]"
    return RunError(f"argument {spec.name}: expected {spec}, got {got}{why}")


def not_exported_for(condition: str, specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> RunError:
    """The condition in terms of the arguments, with the size that each of its symbols is seen by."""
    seen: list[str] = []
    for name in sorted(names_in(condition)):
        places = [
            (spec, tensor, axis)
            for spec, tensor in zip(specs, tensors, strict=True)
            for axis, dim in enumerate(spec.shape or ())
            if name in names_in(dim)
        ]
        # The plain symbol before a multiple of it.
        spec, tensor, axis = min(places, key=lambda place: (place[0].shape or ())[place[2]] != name)
        dim = (spec.shape or ())[axis]
        seen.append(f"argument {spec.name}: size {tensor.shape[axis]} of axis {axis}")
        if dim != name:
            seen[-1] += f" ({dim})"
        condition = re.sub(rf"\b{name}\b", f"{spec.name}.shape[{axis}]" if dim == name else name, condition)
    return RunError(f"{'; '.join(seen)}: the model was exported for sizes with {condition}")


def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """'3 and keywords mask', or that only the nesting differs."""
    keywords = f" and keywords {', '.join(kwargs)}" if kwargs else ""
    return f"{len(args)} positional{keywords}, or other containers inside them"


def input_tree(text: str | None) -> pytree.TreeSpec | None:
    """The tree, or None where it names a container type that this process does not know."""
    if text is None:
        return None
    try:
        return pytree.treespec_loads(text)
    except (NotImplementedError, ValueError, KeyError, AttributeError, ImportError):
        return None


def result_tree(text: str | None) -> pytree.TreeSpec | None:
    """The tree of a result, or None where that is what there is without one: the one leaf, or a tuple."""
    tree = input_tree(text)
    if tree is None:
        return None
    count = tree.num_leaves
    built = pytree.tree_unflatten(list(range(count)), tree)
    plain = 0 if count == 1 else tuple(range(count))
    return None if type(built) is type(plain) and built == plain else tree


def positional_count(tree: pytree.TreeSpec | None, inputs: tuple[Leaf, ...] | None) -> int | None:
    """Count a call's arguments, if all are tensors, none in a container and none a keyword; else None."""
    if tree is None or any(isinstance(leaf, Constant) for leaf in inputs or ()):
        return None
    count = tree.num_leaves
    plain = pytree.tree_unflatten(list(range(count)), tree) == (tuple(range(count)), {})
    return count if plain else None


def keywords_of(text: str | None) -> tuple[str, ...]:
    """The keyword arguments of an input tree ``(args, kwargs)``, in order."""
    if text is None:
        return ()
    children = json.loads(text)[1]["children_spec"]
    return tuple(json.loads(children[1]["context"])) if len(children) == 2 else ()
