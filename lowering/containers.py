"""Know the containers of arguments and results: trees of them, as text, and the names of what is inside.

Trees are PyTorch's (``torch.utils._pytree``).  Dataclasses and transformers' DynamicCache join them when they
are first seen; a tree that names a type unknown to this process has dictionaries in its place.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import UsageError

_CACHE = "transformers.cache_utils.DynamicCache"

Names = str | Sequence[str]
"""What is kept of a result: one name, or several; ``cache.value.0`` is inside ``cache``."""


def register(value: Any) -> Any:
    """Have PyTorch's trees know the dataclasses and caches inside ``value``, which is returned."""
    for leaf in pytree.tree_leaves(value):
        if not isinstance(leaf, type) and _registered(type(leaf)):
            register(leaf)
    return value


def _registered(type_: type) -> bool:
    """Register a type of containers that PyTorch does not know; False if it is none."""
    if f"{type_.__module__}.{type_.__qualname__}" == _CACHE:
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()
    elif dataclasses.is_dataclass(type_):
        name = f"{type_.__module__}.{type_.__qualname__}"
        torch.export.register_dataclass(type_, serialized_type_name=name)
    else:
        return False
    return True


# --- names ----------------------------------------------------------------------------------------


def select(value: Any, names: Names) -> Any:
    """What ``names`` says of a result: that part itself for one name, a dictionary of them for several.

    A name is a key, an attribute or a position, or several of these with dots between them.  Raises
    UsageError for a name that the result does not have, which lists those it has.
    """
    if isinstance(names, str):
        return _part(value, names)
    if not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"output is the name of a result or several, and {names!r} is none")
    return {name: _part(value, name) for name in names}


def _part(value: Any, name: str) -> Any:
    part, rest = value, name
    while rest:
        inside = _children(part)
        words = rest.split(".")
        heads = (".".join(words[:count]) for count in range(len(words), 0, -1))
        head = next((head for head in heads if head in inside), None)
        if head is None:
            has = ", ".join(inside) or f"a {type(part).__name__}, which has no parts"
            raise UsageError(f"output {name!r} names no result of the model; there is {has}")
        part, rest = inside[head], rest[len(head) + 1 :]
    return part


def _children(value: Any) -> dict[str, Any]:
    """What is directly inside a container, by name; nothing for what is none."""
    kind = pytree._get_node_type(value)
    if kind not in pytree.SUPPORTED_NODES and not _registered(type(value)):
        return {}
    inside, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
    inside = list(inside)
    return dict(zip(_names(context, len(inside)), inside, strict=True))


def _names(context: Any, count: int) -> list[str]:
    """The names of ``count`` things inside a container, from what its tree says of it; else their numbers."""
    found = getattr(context, "_fields", context)
    for names in (found, *(found if isinstance(found, (list, tuple)) else ())):
        if (
            isinstance(names, (list, tuple))
            and len(names) == count
            and all(isinstance(name, (str, int)) for name in names)
        ):
            return [str(name) for name in names]
    return [str(number) for number in range(count)]


def plain(tree: pytree.TreeSpec, leaves: Sequence[Any]) -> Any:
    """The ``leaves`` in dictionaries by name, whatever containers ``tree`` has."""
    remaining = iter(leaves)

    def built(spec: pytree.TreeSpec) -> Any:
        if spec.is_leaf():
            return next(remaining)
        inside = spec.children()
        return {
            name: built(each) for name, each in zip(_names(spec.context, len(inside)), inside, strict=True)
        }

    return built(tree)


def leaf_names(tree: pytree.TreeSpec) -> list[str]:
    """The names of the leaves, of those inside others with dots; ``output`` for the one that is all."""
    paths, _ = pytree.tree_flatten_with_path(plain(tree, range(tree.num_leaves)))
    return [".".join(str(getattr(key, "key", key)) for key in path) or "output" for path, _ in paths]


# --- text -----------------------------------------------------------------------------------------


def dump(tree: pytree.TreeSpec) -> str | None:
    """Write a tree as JSON; None when it holds a container that has no name to be written by."""
    try:
        return pytree.treespec_dumps(_with_named_tuples(tree))
    except NotImplementedError:
        return None


def _with_named_tuples(tree: pytree.TreeSpec) -> pytree.TreeSpec:
    """Give the classes of named tuples a name to be written by."""
    if hasattr(tree.context, "_fields") and tree.context not in pytree.SUPPORTED_SERIALIZED_TYPES:
        name = f"{tree.context.__module__}.{tree.context.__qualname__}"
        pytree._register_namedtuple(tree.context, serialized_type_name=name)
    for inside in tree.children():
        _with_named_tuples(inside)
    return tree


def load(text: str | None) -> pytree.TreeSpec | None:
    """Read a tree; None where there is none, or one with containers that are unknown here and have no names.

    What is unknown and has names becomes a dictionary.
    """
    if text is None:
        return None
    try:
        version, tree = json.loads(text)
        return pytree.treespec_loads(json.dumps([version, _known(tree)]))
    except (NotImplementedError, ValueError, KeyError, AttributeError, ImportError):
        return None


def _known(tree: dict[str, Any]) -> dict[str, Any]:
    """The same tree with dictionaries in the place of containers that this process does not know."""
    inside = [_known(each) for each in tree["children_spec"]]
    type_, context = tree["type"], tree["context"]
    if type_ is not None and not _is_known(type_):
        names = _names(json.loads(context), len(inside)) if isinstance(context, str) else []
        if names and names != [str(number) for number in range(len(inside))]:
            type_, context = "builtins.dict", json.dumps(names)
    return {"type": type_, "context": context, "children_spec": inside}


def _is_known(name: str) -> bool:
    """Tell whether PyTorch reads this type; of a loaded module, it is taught to."""
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return True
    module, _, attribute = name.rpartition(".")
    type_ = getattr(sys.modules.get(module), attribute, None)
    return isinstance(type_, type) and _registered(type_)
