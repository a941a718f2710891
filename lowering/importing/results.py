"""Give an exported program other arguments and results: some alone, all without containers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from .. import containers


def chosen(tree: pytree.TreeSpec, output: containers.Names | None) -> tuple[list[int], pytree.TreeSpec]:
    """The numbers of the results that ``output`` names, and the tree that they make; None: all of them.

    Raises UsageError for a name that no result has.
    """
    if output is None:
        return list(range(tree.num_leaves)), tree
    return pytree.tree_flatten(containers.select(containers.plain(tree, range(tree.num_leaves)), output))


def returning(exported: ExportedProgram, numbers: Sequence[int]) -> ExportedProgram:
    """Return these of the results alone, and drop what is computed for the others, in place."""
    signature = exported.graph_signature
    specs = [spec for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    others = [spec for spec in signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
    module = exported.graph_module
    returned = module.graph.output_node()
    results: Any = returned.args[0]
    first = len(others)
    returned.args = ((*results[:first], *(results[first + number] for number in numbers)),)
    module.graph.eliminate_dead_code()
    module.recompile()
    kept = [*others, *(specs[number] for number in numbers)]
    return exported._update(module, replace(signature, output_specs=kept))


def row_major(exported: ExportedProgram) -> frozenset[int]:
    """The numbers of the results that the model returns row after row, whatever layout they come of."""
    returned: Any = exported.graph.output_node().args[0]
    specs = zip(returned, exported.graph_signature.output_specs, strict=True)
    nodes = [node for node, spec in specs if spec.kind == OutputKind.USER_OUTPUT]
    values = [node.meta.get("val") if isinstance(node, Node) else None for node in nodes]
    return frozenset(
        number for number, value in enumerate(values) if isinstance(value, Tensor) and _is_row_major(value)
    )


def _is_row_major(value: Tensor) -> bool:
    """Tell whether the strides are those of rows behind each other, also where an axis has one element."""
    if value.layout is not torch.strided:
        return False  # it has none, and is refused by name
    step: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(stride == step):
            return False
        step = step * size
    return True


def without_containers(exported: ExportedProgram) -> ExportedProgram:
    """Take and return the same tensors, each by itself.

    torch's decompositions build the containers in the program that they trace, and to build a cache is to
    compute.
    """
    entry, *others = exported.module_call_graph
    assert entry.signature is not None  # of the first entry, the program itself
    before = exported.graph_signature
    taken = [spec for spec in before.input_specs if spec.kind == InputKind.USER_INPUT]
    returned = [spec for spec in before.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    signature = replace(
        entry.signature,
        in_spec=pytree.tree_structure(((0,) * len(taken), {})),
        out_spec=pytree.tree_structure((0,) * len(returned)),
        forward_arg_names=[spec.arg.name for spec in taken],
    )
    flat = exported._update(exported.graph_module, before)
    flat._module_call_graph = [replace(entry, signature=signature), *others]
    if exported.example_inputs is not None:
        flat.example_inputs = tuple(pytree.tree_leaves(exported.example_inputs)), {}
    flat._guards_code = []  # they name what is inside the containers
    return flat
