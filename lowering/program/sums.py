"""Add long sums of float32 on the CPU in float64 (step 7).

IREE adds one element after the other to each accumulator.  Of millions of them an accumulator in float32
loses percents: what is added becomes as small as a rounding of the sum.  PyTorch adds pairwise.  On GPUs the
threads that share a sum keep the sums of each short.  A softmax keeps its float32: float64 would take it
three times as long, other sums a tenth longer.
"""

from __future__ import annotations

import math

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg

from patterns import torch_ir

from ..passes import tensors
from ..targets import Target

# Of so many elements float32 is as near as other ways to add them.
_SHORT = 4096


def widen_sums(module: ir.Module, target: Target) -> int:
    """Add up in float64, in place, what is long or of unknown length; returns how many sums that was."""
    if target.is_gpu:
        return 0
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        generic = op.operation.name == "linalg.generic"
        if generic and _is_long(op.operation) and not _is_of_exponentials(op.operation):
            found.append(op.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return sum(_widen(op) for op in found)


def _is_long(op: ir.Operation) -> bool:
    kinds = [str(kind) for kind in ir.ArrayAttr(op.attributes["iterator_types"])]
    reduced = [axis for axis, kind in enumerate(kinds) if tensors.REDUCTION in kind]
    sizes: dict[int, int] = {}
    for operand, place in zip(op.operands, ir.ArrayAttr(op.attributes["indexing_maps"]), strict=True):
        shape = ir.RankedTensorType(operand.type).shape
        for size, axis in zip(shape, ir.AffineMapAttr(place).value.results, strict=True):
            if isinstance(axis, ir.AffineDimExpr):
                sizes[axis.position] = size
    if not reduced:
        return False
    known = [sizes.get(axis, -1) for axis in reduced]
    return min(known) < 0 or math.prod(known) > _SHORT


def _is_of_exponentials(op: ir.Operation) -> bool:
    terms = torch_ir.producer(op.operands[0])
    if terms is None or terms.name != "linalg.generic":
        return False
    made = _yielded(terms)
    return made is not None and made.name == "math.exp"


def _yielded(op: ir.Operation) -> ir.Operation | None:
    """Give what the body of ``op`` computes last."""
    operations = op.regions[0].blocks[0].operations
    return torch_ir.producer(operations[len(operations) - 1].operands[0])


def _widen(op: ir.Operation) -> bool:
    """Have ``op`` add up in float64 if it is a sum of float32."""
    block = op.regions[0].blocks[0]
    adding = _yielded(op)
    total, narrow = block.arguments[len(block.arguments) - 1], ir.F32Type.get(op.context)
    one = len(op.results) == 1 and total.type == narrow and len(list(total.uses)) == 1
    if not one or adding is None or adding.name != "arith.addf" or total not in list(adding.operands):
        return False
    number = len(op.operands) - 1
    start = torch_ir.producer(op.operands[number])
    if start is None or start.name != "linalg.fill":
        return False
    wide = ir.F64Type.get(op.context)
    result = op.results[0]
    with op.location:
        with ir.InsertionPoint(op):
            # Filled, not converted: IREE lets two sums have what is converted for their accumulator.
            first = arith.ExtFOp(wide, start.operands[0]).result
            op.operands[number] = linalg.fill(
                first, outs=[tensors.empty(tensors.sizes(start.results[0]), wide)]
            )
        total.set_type(wide)
        with ir.InsertionPoint(adding):
            (term,) = (operand for operand in adding.operands if operand != total)
            added = arith.AddFOp(arith.ExtFOp(wide, term).result, total).result
        adding.result.replace_all_uses_with(added)
        adding.erase()
        readers = list(result.uses)
        result.set_type(ir.RankedTensorType.get(ir.RankedTensorType(result.type).shape, wide))
        with ir.InsertionPoint.after(op):
            rounded = _rounded(result, narrow)
        for use in readers:
            use.owner.operands[use.operand_number] = rounded
    return True


def _rounded(value: ir.Value, element: ir.Type) -> ir.Value:
    """``value`` as a tensor of a narrower float."""
    sizes = tensors.sizes(value)
    identity = ir.AffineMap.get_identity(len(sizes))
    return tensors.generic(
        [value],
        tensors.empty(sizes, element),
        [identity, identity],
        [tensors.PARALLEL] * len(sizes),
        lambda one, _: arith.TruncFOp(element, one).result,
    )
