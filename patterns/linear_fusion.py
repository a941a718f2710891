"""Give a linear layer that is not quantized to ``vmfuse.linear`` where the target has a kernel for it.

Nothing fuses into it and it is no site of the report: IREE computes it as well, where there is no kernel.
"""

from __future__ import annotations

from dataclasses import replace

from iree.compiler import ir

from . import canonical, torch_ir, weight_layouts
from .contracts import LinearSpec
from .operation import Operation, PatternFamily, Support, Types
from .residuals import replace_product, residual_types
from .sites import Ledger
from .torch_ir import TensorType

LINEAR = "torch.aten.linear"


def fuse_linears(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Give every linear layer to a kernel where the target has one; the others are IREE's and no sites."""
    for op in [op.operation for op in block.operations]:
        if torch_ir.op_name(op) == LINEAR:
            _fuse(op, support)


def _fuse(op: ir.Operation, support: Support) -> None:
    """Replace a ``torch.aten.linear`` by a ``vmfuse.linear`` if ``support`` has no objection.

    A weight that is computed, as by a cast that widens it, is left to IREE, which computes it as the product
    reads it.
    """
    spec = _spec(op)
    if spec is None or support(spec) is not None or _is_computed(op.operands[1]):
        return
    replace_product(op, canonical.LINEAR, spec, list(op.operands)[: 2 + spec.bias], support)


def has_kernel(op: ir.Operation, support: Support, columns: int) -> bool:
    """Tell whether a kernel computes ``op``, of a parameter, with ``columns`` columns."""
    spec = _spec(op)
    return (
        spec is not None
        and not _is_computed(op.operands[1])
        and support(replace(spec, columns=columns)) is None
    )


def _is_computed(weight: ir.Value) -> bool:
    """Tell whether a call computes ``weight``; parameters that are joined are one by then."""
    op = torch_ir.producer(weight)
    if op is not None and op.name == "torch.aten.cat":
        parts = torch_ir.producer(op.operands[0])
        return parts is None or any(map(_is_computed, parts.operands))
    return op is not None and weight_layouts.parameter(weight) is None


def _spec(op: ir.Operation) -> LinearSpec | None:
    """Read what the layer computes; None if a size is unknown or its tensors are not all of one dtype.

    Nor if its weight was widened for it, at every call: IREE widens it as its product reads it.
    """
    if torch_ir.widened_from(op.operands[1]) != op.operands[1]:
        return None
    a, b, bias = (torch_ir.tensor_type(operand) for operand in op.operands)
    out = torch_ir.tensor_type(op.results[0])
    if not (a and b and out) or not a.shape or len(b.shape) != 2:
        return None
    columns, depth = b.shape
    same = {type_.dtype for type_ in (a, b, bias, out) if type_ is not None}
    if not columns or not depth or a.shape[-1] != depth or len(same) != 1:
        return None
    if str(op.operands[2].type) != "!torch.none" and (bias is None or bias.shape != (columns,)):
        return None
    return LinearSpec(columns, depth, out.dtype, bias is not None)


def _why_no_kernel(spec: LinearSpec, operands: Types, results: Types) -> str | None:
    a, out = (operands or [None])[0], (results or [None])[0]
    weights = [TensorType((spec.columns, spec.depth), spec.dtype), TensorType((spec.columns,), spec.dtype)]
    given = [*weights[: 1 + spec.bias], *residual_types(spec, results)]
    if a is None or out is None or list(operands[1:]) != given or len(results) != 1:
        return f"it takes {', '.join(map(str, operands))} to {', '.join(map(str, results))}"
    fits = (a.dtype, a.shape[-1:], out.dtype, out.shape) == (
        spec.dtype,
        (spec.depth,),
        spec.dtype,
        (*a.shape[:-1], spec.columns),
    )
    return None if fits else f"it takes {a} to {out}, and computes {spec.columns} columns from {spec.depth}"


FAMILY = PatternFamily(
    operations=(Operation(canonical.LINEAR, LinearSpec, _why_no_kernel, is_kernel=True),), fuse=fuse_linears
)
