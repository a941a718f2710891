"""Rules of ``scalar_ops`` about comparisons: a bound and a maximum keep a NaN, and the place of one finds it.

The torch dialect lowers a bound to a comparison that a NaN fulfils and a maximum to one that it does not, and
looks for the place of the largest with the latter.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith

from patterns import torch_ir

_OLT, _OGT, _ORD = arith.CmpFPredicate.OLT, arith.CmpFPredicate.OGT, arith.CmpFPredicate.ORD
_ULT, _ULE, _UGT = arith.CmpFPredicate.ULT, arith.CmpFPredicate.ULE, arith.CmpFPredicate.UGT

# Which of the two a comparison chooses, and what that is: `a < b ? b : a` is the larger one.
_CHOICES = {
    (_ULT, "second"): arith.MaximumFOp,
    (_UGT, "second"): arith.MinimumFOp,
    (_OGT, "first"): arith.MaximumFOp,
    (_OLT, "first"): arith.MinimumFOp,
}
# IREE's operation for the place of the largest; elsewhere its value is made beside it.
_PLACE = "iree_linalg_ext.arg_compare"
_REDUCTIONS = {_OGT: ("arith.maximumf", _UGT), _OLT: ("arith.minimumf", _ULT)}


def _choice(select: ir.Operation) -> ir.Value | None:
    """The larger or smaller of two numbers, as an operation that keeps a NaN of either."""
    condition, yes, no = select.operands
    comparison = torch_ir.producer(condition)
    if comparison is None or comparison.name != "arith.cmpf":
        return None
    a, b = comparison.operands
    which = {(a, b): "first", (b, a): "second"}.get((yes, no))
    choice = _CHOICES.get((_predicate(comparison), which or ""))
    return choice(a, b).result if choice is not None else None


def _comparison(op: ir.Operation) -> ir.Value | None:
    """Nothing is at most NaN; the first NaN is the place of the largest, as of the smallest."""
    predicate, (a, b) = _predicate(op), op.operands
    if predicate == _ULE:
        return arith.CmpFOp(arith.CmpFPredicate.OLE, a, b).result
    reduction, unordered = _REDUCTIONS.get(predicate, ("", predicate))
    together = [(use.owner.operation.name, tuple(use.owner.operation.operands)) for use in a.uses]
    if not reduction or (op.parent.name != _PLACE and (reduction, (a, b)) not in together):
        return None
    further = arith.CmpFOp(unordered, a, b).result
    return arith.AndIOp(further, arith.CmpFOp(_ORD, b, b).result).result


def _predicate(comparison: ir.Operation) -> arith.CmpFPredicate:
    return arith.CmpFPredicate(ir.IntegerAttr(comparison.attributes["predicate"]).value)


RULES = {"arith.select": _choice, "arith.cmpf": _comparison}
