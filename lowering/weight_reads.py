"""Find the linear layers whose weight the model's own code reads beside the layer's call.

``x.to(self.gate.weight.dtype)`` and ``self.dt_proj.weight @ x`` mean the values of a weight; with codes in
its place they fail, or compute with codes.  The sources of the model's classes say where this is done.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torch import nn

_INDEPENDENT = {"device", "shape", "size", "ndim", "numel", "is_cuda", "is_meta", "requires_grad"}
"""Attributes of a weight that are the same for its codes."""


def weights_read(model: nn.Module, names: set[str]) -> dict[str, str]:
    """Return {name: "file:line" of a read of the weight by other code} of the layers of these names.

    Code that runs in training alone or that initialises weights does not count.  A class without source
    (defined in a shell, compiled) is taken to read nothing.
    """
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for path, of_self, where in _reads(type(module)):
            if of_self:
                matching = {f"{prefix}.{path}".lstrip(".")} & names
            else:
                matching = {name for name in names if f".{name}".endswith(f".{path}")}
            found |= dict.fromkeys(matching, where)
    return found


_Read = tuple[str, bool, str]  # path of the layer, whether it begins at self, file:line

_READS: dict[type, list[_Read]] = {}


def _reads(kind: type) -> list[_Read]:
    """The reads in the methods of ``kind`` and of the classes it is made of, torch's own left out."""
    if kind not in _READS:
        classes = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
        _READS[kind] = [read for base in classes for read in _reads_of_class(base)]
    return _READS[kind]


def _reads_of_class(kind: type) -> list[_Read]:
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:  # compiled, or defined in a shell
        return []
    return [] if file is None else _reads_of_file(file).get(kind.__qualname__, [])


@cache
def _reads_of_file(file: str) -> dict[str, list[_Read]]:
    """The reads of each class of a file, which is parsed once: ``inspect`` would do that for every class."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # no file of Python, such as a notebook
        return {}
    return {
        name: [
            (".".join(path), root == "self", f"{Path(file).name}:{line}") for root, path, line in _chains(cls)
        ]
        for name, cls in _classes(tree, "")
    }


def _classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class within ``node`` by its qualified name, the last of a name last."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            inner = f"{prefix}{child.name}."
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{prefix}{child.name}.<locals>."
        yield from _classes(child, inner)


def _chains(node: ast.AST) -> Iterator[tuple[str, list[str], int]]:
    """(root, path, line) of every ``root.path.weight`` that is read when the model is evaluated."""
    if isinstance(node, ast.FunctionDef) and "init" in node.name:
        return
    if isinstance(node, ast.If) and _in_training(node.test):
        for other in node.orelse:
            yield from _chains(other)
        return
    if isinstance(node, ast.Attribute):
        chain = _chain(node)
        if "weight" in chain[2:]:
            at = chain.index("weight", 2)
            if not _INDEPENDENT & set(chain[at + 1 : at + 2]):
                yield chain[0], chain[1:at], node.lineno
            return
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)


def _in_training(test: ast.expr) -> bool:
    """Tell whether a branch is taken in training alone."""
    text = ast.unparse(test)
    return "self.training" in text and "not self.training" not in text


def _chain(node: ast.expr) -> list[str]:
    """``a.b.c`` as its names; empty where it does not begin with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        front = _chain(node.value)
        return [*front, node.attr] if front else []
    return []
