"""Compute before a scatter into a constant what is computed of it, element by element.

``sigmoid(full(-inf).scatter(1, ids, values))`` is ``full(0).scatter(1, ids, sigmoid(values))``: where weights
are laid out for all experts (Llama 4), the second is a routing and a scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from iree.compiler import ir

from patterns import torch_ir

_SCATTER = "torch.aten.scatter.src"
_FULL = ("torch.aten.full_like", "torch.aten.full")
# What each makes of a constant; of any other it would have to round as the model's machine does.
_OF_CONSTANT: dict[str, Callable[[float], float | None]] = {
    "torch.aten.sigmoid": {-math.inf: 0.0, 0.0: 0.5, math.inf: 1.0}.get,
    "torch.prims.convert_element_type": lambda value: value if value in (-math.inf, 0.0, math.inf) else None,
}
_FLOATS = ("float32", "bfloat16", "float16")


def compute_before_scatters(block: ir.Block) -> None:
    """Move what is computed of a scatter before it, in place, wherever nothing else reads the scatter."""
    for op in [op.operation for op in block.operations]:
        scatter = torch_ir.producer(op.operands[0]) if op.name in _OF_CONSTANT else None
        if scatter is not None and scatter.name == _SCATTER and len(torch_ir.users(scatter.result)) == 1:
            _move(op, scatter)


def _move(op: ir.Operation, scatter: ir.Operation) -> None:
    into, axis, places, source = scatter.operands
    filled, made, given = (
        torch_ir.producer(into),
        torch_ir.tensor_type(op.result),
        torch_ir.tensor_type(source),
    )
    if filled is None or filled.name not in _FULL or made is None or given is None:
        return
    value = torch_ir.constant(filled.operands[1])
    constant = _OF_CONSTANT[op.name](value) if isinstance(value, int | float) else None
    if constant is None or not {made.dtype, given.dtype} <= set(_FLOATS):
        return
    with ir.InsertionPoint(op), op.location:
        sizes, _, _, *rest = filled.operands
        number, dtype = torch_ir.make_float(constant), torch_ir.make_dtype(made.dtype)
        base = torch_ir.make(filled.name, made, [sizes, number, dtype, *rest])
        moved = torch_ir.make(
            op.name, torch_ir.TensorType(given.shape, made.dtype), [source, *list(op.operands)[1:]]
        )
        result = torch_ir.make(_SCATTER, made, [base, axis, places, moved])
    whole, part = torch_ir.example_shape(op.result), torch_ir.example_shape(source)
    for value, shape in ((base, whole), (moved, part), (result, whole)):
        torch_ir.set_example(value.owner.operation, [shape])
    op.result.replace_all_uses_with(result)
