"""Collect which sizes of its arguments a model was exported for, for the runtime to check at each call.

torch.export keeps that in three places: the range of each symbol, the guards that the model's own branches
and views gave rise to, and assertions in the graph (``torch._check``).  Each becomes a condition on the
symbols of the arguments' shapes, in the words that ``lowering.signature`` evaluates.  What depends on the
values of a tensor is no condition: it is not known before the call.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..signature import Constant, Integer, Leaf, holds, names_in, sizes_of

# Of a tensor an axis, of an int itself.
_SOURCE = re.compile(r"L((?:\['[^']*'\]|\[\d+\])+)(?:\.size\(\)\[(\d+)\])?")
# Whether a size is a multiple of that to which a scale's columns are padded: torch asks that when it looks
# at strides, and a program returns them as they are asked for either way.
_PADDED = re.compile(r"(\d+)\*\d+\+(.+)//\1!=\2")
_KEY = re.compile(r"\['([^']*)'\]|\[(\d+)\]")


def conditions(exported: torch.export.ExportedProgram, inputs: Sequence[Leaf]) -> tuple[str, ...]:
    """The conditions on the sizes of ``inputs``, each once and none that always holds."""
    specs = {leaf.name: leaf for leaf in inputs if not isinstance(leaf, Constant)}
    symbols = {name for spec in specs.values() for dim in sizes_of(spec) for name in names_in(dim)}
    sizes = {str(dim) for spec in specs.values() for dim in sizes_of(spec)}
    ints = {leaf.size for leaf in inputs if isinstance(leaf, Integer)}
    found = [*_ranges(exported, sizes, ints), *_guards(exported, specs), *_assertions(exported)]
    told = dict.fromkeys(_plain(text) for text in found if _is_about(text, symbols))
    return tuple(text for text in told if not _PADDED.fullmatch(re.sub(r"[ ()]", "", text)))


def forget_multiples(exported: torch.export.ExportedProgram) -> None:
    """Take ranges of multiples of a symbol (``8*s0``) out of the environment of the traced tensors.

    torch 2.13 loads them into it from a file, and its decompositions then fail; ``exported`` still has them.
    """
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            ranges = mode.shape_env.var_to_range
            for size in [size for size in ranges if not size.is_Symbol]:
                del ranges[size]


def _ranges(exported: torch.export.ExportedProgram, sizes: set[str], ints: set[str]) -> Iterator[str]:
    """Bound the sizes that arguments have; what ``s0`` may be beside ``2*s0`` is torch's own affair.

    That a size is not negative is no condition; of ``ints``, which are arguments themselves, it is one.
    """
    for size, allowed in exported.range_constraints.items():
        bounds = allowed.lower, allowed.upper
        lower, upper = (int(bound) if bound.is_Integer else None for bound in bounds)
        lower = lower if str(size) in ints else lower or None
        if str(size) in sizes and (lower, upper) != (None, None):
            yield (
                ("" if lower is None else f"{lower} <= ")
                + str(size)
                + ("" if upper is None else f" <= {upper}")
            )


def _guards(exported: torch.export.ExportedProgram, specs: Mapping[str, Leaf]) -> Iterator[str]:
    """Collect the conditions in the code with which torch checks the arguments of an exported module."""

    def symbol(source: re.Match[str]) -> str:
        keys = [word or number for word, number in _KEY.findall(source[1])]
        # torch names a leaf of the arguments by the way to it.
        spec = specs.get(re.sub(r"\W+", "_", "_".join(keys)).lower()) or specs.get("_".join(keys))
        sizes, axis = sizes_of(spec) if spec else (), int(source[2] or 0)
        return source[0] if axis >= len(sizes) else f"({sizes[axis]})"

    for guard in getattr(exported, "_guards_code", ()):
        yield _SOURCE.sub(symbol, guard)


def _assertions(exported: torch.export.ExportedProgram) -> Iterator[str]:
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten._assert_scalar.default:
            asserted = node.args[0]
            value: Any = asserted.meta.get("val") if isinstance(asserted, torch.fx.Node) else asserted
            if isinstance(value, torch.SymBool):
                yield str(value.node.expr)


def _is_about(text: str, symbols: set[str]) -> bool:
    """Tell whether ``text`` can be evaluated, and names sizes of the arguments alone."""
    names = names_in(text)
    return bool(names) and names <= symbols and holds(text, dict.fromkeys(names, 64)) is not None


def _plain(text: str) -> str:
    """Write a condition without needless parentheses."""
    return ast.unparse(ast.parse(text, mode="eval"))
