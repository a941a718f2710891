"""Find what looks like a grouped top-k and is none that a kernel computes, and say why not.

What gives one away is a top-k of scores, which a sigmoid or softmax makes, or whose best are made weights by
one.  Top-ks within it, of groups, are part of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from iree.compiler import ir

from . import torch_ir
from .near_norms import BOUNDS, CAST, FACTORS, RESHAPES, SUMS
from .recogniser import NearMiss
from .well_typed import FLOATS

_TOPK = "torch.aten.topk"
_SOFTMAX = ("torch.aten._softmax", "torch.aten.softmax.int")
_SCORES = ("torch.aten.sigmoid", *_SOFTMAX)
MOST_EXPERTS = 2048  # more columns are the words of a vocabulary
_INSIDE = (
    *BOUNDS,
    *FACTORS,
    *SUMS,
    *RESHAPES,
    CAST,
    *(
        f"torch.aten.{name}"
        for name in (
            *("where.self", "masked_fill.Scalar", "masked_fill.Tensor", "sqrt", "log1p", "exp", "softplus"),
            *("sum.dim_IntList", "scatter.value", "scatter.src", "bitwise_not", "logical_not", "gather"),
            *("amax", "max.dim", "slice.Tensor", "select.int", "one_hot", "neg", "eq.Scalar", "ne.Scalar"),
        )
    ),
)
_WRITE_IT = "write it like torch.ops.lowering.grouped_topk, or call that"


class UnmatchedRouting:
    """The last top-k of a grouped one that was not raised."""

    roots = (_TOPK,)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        gating = torch_ir.tensor_type(op.operands[0])
        if gating is None or not gating.shape or not 1 < (gating.shape[-1] or 0) <= MOST_EXPERTS:
            return None
        above = list(_inside(op.operands[0]))
        scores = next((maker for maker in above if maker.name in _SCORES), None)
        made = scores or next(_softplus(above), None)
        if made is None and not _makes_weights(op.results[0]):
            return None
        if any(user != op and op in list(_inside(user.operands[0])) for user in _topks(op)):
            return None  # of groups, within the routing that ``user`` ends
        return NearMiss("grouped_topk", _why_no_routing(above, scores))


def _inside(value: ir.Value) -> Iterator[ir.Operation]:
    """Walk what ``value`` is computed of, up to the scores and with them; each operation once."""
    seen, pending = set[ir.Operation](), [value]
    while pending:
        op = torch_ir.producer(pending.pop())
        if op is None or op in seen:
            continue
        seen.add(op)
        if op.name in (*_INSIDE, _TOPK, *_SCORES):
            yield op
        if op.name in (*_INSIDE, _TOPK):
            pending += op.operands


def _topks(op: ir.Operation) -> Iterator[ir.Operation]:
    """The top-ks that are made of results of ``op`` without scores between."""
    seen, pending = set[ir.Operation](), list(op.results)
    while pending:
        for user in torch_ir.users(pending.pop()):
            if user in seen:
                continue
            seen.add(user)
            if user.name == _TOPK:
                yield user
            elif user.name in _INSIDE:
                pending += user.results


def _softplus(above: list[ir.Operation]) -> Iterator[ir.Operation]:
    """Find what makes scores of a softplus, which is a logarithm of 1 and an exponential."""
    return (op for op in above if op.name in ("torch.aten.log1p", "torch.aten.softplus"))


def _makes_weights(values: ir.Value) -> bool:
    """Tell whether the largest ``values`` are made weights by a sigmoid or softmax of them alone."""
    readers = torch_ir.users(values)
    return any(
        op.name in _SCORES or (op.name in (CAST, *RESHAPES) and _makes_weights(op.result)) for op in readers
    )


def _why_no_routing(above: list[ir.Operation], scores: ir.Operation | None) -> str:
    if scores is None and any(_softplus(above)):
        return f"its scores are made of a softplus, of which the routing kernel takes the root; {_WRITE_IT}"
    if scores is None:
        made = "the values of its chosen experts become weights otherwise than by a softmax or sigmoid"
        return f"{made}; {_WRITE_IT}"
    dtype = torch_ir.dtype_of(scores.result)
    if dtype not in FLOATS:
        return f"its scores are {dtype}; convert the gating with .float()"
    return f"its groups, mask, top-k or weights are not those of the routing kernel; {_WRITE_IT}"


SUSPICIONS = (UnmatchedRouting(),)
