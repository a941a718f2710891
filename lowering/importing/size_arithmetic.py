"""Spell arithmetic of sizes as torch-mlir's importer reads it."""

from __future__ import annotations

import operator
from functools import partial, reduce
from typing import Any

import torch
from torch import fx

# Functions of sizes, which the importer knows as operations only.
_OPERATIONS = {torch.sym_min: torch.ops.prim.min.int, torch.sym_max: torch.ops.prim.max.int}


def spell_sizes(graph: fx.Graph) -> None:
    """Have functions of sizes be operations, and sums of many of them sums of two."""
    for node in list(graph.nodes):
        node.target = _OPERATIONS.get(node.target, node.target)
        if node.target is torch.sym_sum:
            with graph.inserting_before(node):
                node.replace_all_uses_with(reduce(partial(_sum, graph), node.args[0]))
            graph.erase_node(node)


def _sum(graph: fx.Graph, a: Any, b: Any) -> fx.Node:
    node = graph.call_function(operator.add, (a, b))
    node.meta["val"] = _value(a) + _value(b)
    return node


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size
