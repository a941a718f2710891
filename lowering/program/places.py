"""Keep an update apart from the search for the places that it updates.

Where nothing else reads the places of the largest elements, IREE computes them and the update in one piece,
and asks for as much memory on the stack as there are places: without bound where their number is unknown.
"""

from __future__ import annotations

from iree.compiler import ir

from patterns import torch_ir

from ..passes import tensors

_UPDATE, _SEARCH = "iree_linalg_ext.scatter", "iree_linalg_ext.arg_compare"
_BARRIER = "iree_tensor_ext.compute_barrier.start"
_SAME_ELEMENTS = ("linalg.generic", "tensor.expand_shape", "tensor.collapse_shape", "tensor.cast")


def part_searches(module: ir.Module) -> None:
    """Put what IREE fuses nothing across in front of each update whose indices were searched for."""
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        for op in [op.operation for block in function.regions[0].blocks for op in block.operations]:
            if op.name == _UPDATE and _is_searched(op.operands[1]):
                op.operands[1] = barred(op.operands[1], op)


def _is_searched(value: ir.Value) -> bool:
    """Tell whether ``value`` is, element for element, made of places that a search has found."""
    op = torch_ir.producer(value)
    while op is not None and op.name in _SAME_ELEMENTS:
        op = torch_ir.producer(op.operands[0])
    return op is not None and op.name == _SEARCH


def barred(value: ir.Value, op: ir.Operation) -> ir.Value:
    """``value`` for ``op``, behind what IREE fuses nothing across."""
    with ir.InsertionPoint(op), op.location:
        dims = [size for size in tensors.sizes(value) if not isinstance(size, int)]
        return ir.Operation.create(_BARRIER, results=[value.type], operands=[value, *dims]).result
