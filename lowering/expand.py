"""Step 6, what is left: canonical ops that got no kernel become plain torch ops for IREE.

Their lowering is the eager reference itself, exported and imported for the types at hand, so what
an op means is written once, in ``lowering.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from iree.compiler import ir

from patterns import canonical, torch_ir, weight_layouts

from . import ops
from .errors import CompileError
from .importer import import_module
from .normalize import normalize
from .routing import why_impossible
from .weight_layouts import shuffle_weight_reference, unshuffle_weight_reference


class _Reference(torch.nn.Module):
    """A reference function as a module, so that it can be exported."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


@dataclass
class Expander:
    """Expands the canonical ops of one module; equal ops are traced once."""

    _traced: dict[Any, ir.Operation] = field(default_factory=dict)
    _modules: list[ir.Module] = field(default_factory=list)

    def expand(self, function: ir.Operation) -> int:
        """Replace what is left of the canonical ops by their references; returns how many there were."""
        block = torch_ir.block_of(function)
        count = 0
        for op in [op.operation for op in block.operations]:
            reference = _reference(op)
            if reference is not None:
                _inline(self._trace(op, *reference), op)
                count += 1
        torch_ir.erase_dead(block)
        return count

    def _trace(self, op: ir.Operation, key: Any, function: Callable[..., Any]) -> ir.Operation:
        types = tuple(torch_ir.tensor_type(operand) for operand in op.operands)
        full_key = (torch_ir.op_name(op), key, types)
        if full_key not in self._traced:
            args, shapes = _examples([t for t in types if t is not None])
            program = import_module(
                _Reference(function), tuple(args), op.context, dynamic_shapes=(tuple(shapes),)
            )
            normalize(program.main())
            self._modules.append(program.module)
            self._traced[full_key] = program.main()
        return self._traced[full_key]


def _reference(op: ir.Operation) -> tuple[Any, Callable[..., Any]] | None:
    """What distinguishes this op's reference, and the reference on its tensor operands."""
    name = torch_ir.op_name(op)
    if name == canonical.RMS_NORM:
        norm = canonical.norm_contract(op)

        def rms_norm(x: torch.Tensor, *rest: torch.Tensor) -> Any:
            residual, weight = (rest[0], rest[1:]) if norm.residual else (None, rest)
            y, total = ops.rms_norm_reference(x, residual, weight[0] if weight else None, norm)
            return (y, total) if norm.residual else y

        return norm, rms_norm
    if name == canonical.GATED_ACTIVATION:
        gate = canonical.gate_contract(op)

        def gated_activation(*halves: torch.Tensor) -> torch.Tensor:
            first, second = ops.split_gate_up(halves[0]) if gate.packed else halves
            return ops.gated_activation_reference(first, second, gate)

        return gate, gated_activation
    if name == canonical.GROUP_QUANT:
        quantization = canonical.quantization(op)
        return quantization, lambda x: ops.group_quant_contiguous_reference(x, quantization)
    if name == canonical.GROUPED_TOPK:
        return _routing_reference(op)
    if name == canonical.BLOCK_SCALED_MATMUL:
        result, layout = torch_ir.tensor_type(op.results[0]), canonical.product_contract(op).b_layout
        assert result is not None
        dtype = getattr(torch, result.dtype)

        def block_scaled_matmul(
            a: torch.Tensor,
            b: torch.Tensor,
            a_scale: torch.Tensor,
            b_scale: torch.Tensor,
            bias: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return ops.block_scaled_matmul_reference(a, b, a_scale, b_scale, dtype, bias, layout)

        return (dtype, layout), block_scaled_matmul
    if name in _MOVES:
        to, move = torch_ir.constant(op.operands[1]), _MOVES[name]
        return to, lambda weight: move(weight, to)
    return None


# Of a weight that is no parameter; one that is has been shuffled when compiling.
_MOVES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    weight_layouts.SHUFFLE: shuffle_weight_reference,
    weight_layouts.UNSHUFFLE: unshuffle_weight_reference,
}


def _routing_reference(op: ir.Operation) -> tuple[Any, Callable[..., Any]]:
    """Raises CompileError where the routing is impossible: then there is nothing to expand either."""
    routing = canonical.routing_contract(op)
    gating, ids = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(op.results[1])
    assert gating is not None and gating.shape[-1] is not None and ids is not None
    if reason := why_impossible(routing, gating.shape[-1]):
        raise CompileError(f"{torch_ir.location(op)}: grouped_topk cannot be done: {reason}")
    dtype = getattr(torch, ids.dtype)
    return (routing, dtype), lambda x, bias: ops.grouped_topk_reference(x, bias, routing, dtype)


def _examples(types: list[torch_ir.TensorType]) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
    """Example tensors, and which of their axes are dynamic.

    The leading axes of all row operands are the same axes, so axis i is one dimension in all of them.
    """
    args, shapes = [], []
    for type_ in types:
        size = [dim if dim is not None else 7 + 2 * axis for axis, dim in enumerate(type_.shape)]
        args.append(torch.zeros(size, dtype=getattr(torch, type_.dtype)))
        dynamic = [axis for axis, dim in enumerate(type_.shape) if dim is None]
        shapes.append({axis: torch.export.Dim(f"axis{axis}") for axis in dynamic})
    return args, shapes


def _inline(function: ir.Operation, op: ir.Operation) -> None:
    """Copy the body of ``function`` in place of ``op``."""
    block = torch_ir.block_of(function)
    tensors = [operand for operand in op.operands if torch_ir.tensor_type(operand) is not None]
    values: dict[ir.Value, ir.Value] = dict(zip(block.arguments, tensors, strict=True))
    for inner in [inner.operation for inner in block.operations]:
        if inner.name == "func.return":
            for old, new in zip(op.results, inner.operands, strict=True):
                old.replace_all_uses_with(_matching(values[new], old, op))
            break
        copy = inner.clone(ir.InsertionPoint(op))
        for index, operand in enumerate(inner.operands):
            copy.operands[index] = values[operand]
        values.update(zip(inner.results, copy.results, strict=True))
    op.erase()


def _matching(value: ir.Value, old: ir.Value, op: ir.Operation) -> ir.Value:
    """``value`` as the type of ``old``: a size that one of them knows the other may not."""
    if value.type == old.type:
        return value
    with ir.InsertionPoint(op), op.location:
        return ir.Operation.create(
            "torch.tensor_static_info_cast", results=[old.type], operands=[value]
        ).result
