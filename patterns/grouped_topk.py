"""Raise routing that is written out to ``vmfuse.grouped_topk``, and give each such operation to a kernel.

It is recognised whatever the dtype of the gating and of the scores: what is rounded to 16 bits on the way is
part of the contract.  It is whole when it is raised, so one kernel computes it and nothing around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import GroupedTopk, TopkSpec
from .match import ANY, Bindings, Const, Exact, Is, OneOf, Op, Pattern, f32
from .named_routings import NAMED_OPS, REFUSED
from .near_routings import MOST_EXPERTS, SUSPICIONS
from .operation import Operation, PatternFamily, Support, Types
from .recogniser import Raised
from .sites import Ledger
from .well_typed import FLOATS, is_routing, why_no_routing

# --- written out -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Once(Pattern):
    """Remember by name what ``pattern`` matches; where it is met again it must be the same value."""

    name: str
    pattern: Pattern

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        if self.name in bound:
            if bound[self.name] == value:
                yield bound
            return
        for found in self.pattern.match(value, bound):
            yield {**found, self.name: value}


@dataclass(frozen=True)
class _Means(Pattern):
    """What ``pattern`` matches means that ``field`` of the contract is ``word``."""

    field: str
    word: str
    pattern: Pattern

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        for found in self.pattern.match(value, bound):
            yield {**found, self.field: self.word}


@dataclass(frozen=True)
class _Widened(Pattern):
    """What ``pattern`` matches, as it is or widened to float32."""

    pattern: Pattern

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        yield from self.pattern.match(torch_ir.widened_from(value), bound)


@dataclass(frozen=True)
class _Largest(Pattern):
    """The ``result`` (0: values, 1: places) of a top-k of ``values`` along the last axis.

    ``count`` is bound to how many, ``count`` with ``_op`` behind to the operation.
    """

    values: Pattern
    count: str
    result: int

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        op, name = torch_ir.producer(value), f"{self.count}_op"
        if op is None or op.name != "torch.aten.topk" or value != op.results[self.result]:
            return
        values, count, axis, largest, _ = (op.operands[i] for i in range(5))
        if bound.get(name, op) == op and _is_last(axis, value) and torch_ir.constant(largest) is True:
            for found in self.values.match(values, {**bound, name: op}):
                yield from Const(self.count).match(count, found)


@dataclass(frozen=True)
class _Softmax(Pattern):
    """A softmax of ``of`` over the last axis."""

    of: Pattern

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        op = torch_ir.producer(value)
        if op is not None and op.name == "torch.aten._softmax" and _is_last(op.operands[1], value):
            yield from self.of.match(op.operands[0], bound)


def _is_last(axis: ir.Value, tensor: ir.Value) -> bool:
    type_ = torch_ir.tensor_type(tensor)
    return type_ is not None and torch_ir.constant(axis) in (-1, len(type_.shape) - 1)


def _sum(a: Pattern, *, keepdim: bool) -> Pattern:
    return Op("torch.aten.sum.dim_IntList", a, Is([-1]), Is(keepdim), Is(None))


_GATING = Exact("gating")
# As PyTorch has it: beyond 20 the gating is what float32 holds of its softplus.
_SOFTPLUS = f32(
    "where.self",
    Op("torch.aten.gt.Scalar", _GATING, Is(20)),
    _GATING,
    f32("log1p", f32("exp", _GATING)),
)
_CAST = "torch.prims.convert_element_type"


def _or_cast(value: Pattern) -> Pattern:
    """A value as it is, or cast to another dtype."""
    return OneOf(value, Op(_CAST, value, ANY))


_MADE_SCORES = _Once(
    "made_scores",
    OneOf(
        _Means("scores", "sigmoid", Op("torch.aten.sigmoid", _GATING)),
        _Means("scores", "softmax", _Softmax(_GATING)),
        _Means("scores", "sqrt_softplus", f32("sqrt", _SOFTPLUS)),
    ),
)
_SCORES = _Widened(_Once("scores_value", _or_cast(_MADE_SCORES)))


def _choices(scores: Pattern) -> Pattern:
    """Scores, with a bias or without."""
    biased = Op("torch.aten.add.Tensor", scores, Exact("bias"), Is(1), commutative=True)
    return _Once("choices", OneOf(biased, scores))


def _in_kept_groups(choices: Pattern) -> Pattern:
    """Choices that are -inf or 0 outside of the groups that are kept; or choices without groups."""
    in_groups = _Once("in_groups", Op("torch.aten.view", choices, ANY))
    two = Op("torch.aten.topk", in_groups, Is(2), Is(-1), Is(True), ANY)
    best = OneOf(
        Op("torch.aten.max.dim", in_groups, Is(-1), Is(False)),
        Op("torch.aten.amax", in_groups, Is([-1]), Is(False)),
    )
    values = _Once(
        "group_values",
        OneOf(
            _Means("group_value", "two_largest", _sum(two, keepdim=False)),
            _Means("group_value", "largest", best),
        ),
    )
    # A one for each group that is kept, then for each expert in it, then a truth value.
    kept = Op(
        "torch.aten.scatter.value",
        Op("torch.aten.full_like", values, Is(0), ANY, ANY, ANY, ANY, ANY),
        Const("scatter_axis"),
        _Largest(values, "topk_group", 1),
        Is(1),
    )
    spread = _Once("spread", Op("torch.aten.expand", Op("torch.aten.unsqueeze", kept, Is(-1)), ANY, ANY))
    flat = Op("torch.aten.view", spread, ANY)
    is_kept = _Once("is_kept", Op("torch.prims.convert_element_type", flat, ANY, dtype="bool"))
    not_kept = OneOf(Op("torch.aten.bitwise_not", is_kept), Op("torch.aten.logical_not", is_kept))
    dropped = OneOf(_Means("dropped", "least", _number(-math.inf)), _Means("dropped", "zero", _number(0)))
    return OneOf(
        Op("torch.aten.where.self", not_kept, dropped, choices),
        Op("torch.aten.where.self", is_kept, choices, dropped),
        choices,
    )


def _number(value: float) -> Pattern:
    return OneOf(Is(value), Op("torch.aten.scalar_tensor", Is(value), ANY, ANY, ANY, ANY))


def _steps(raw: Pattern) -> Pattern:
    """What is done with weights, cast or not: they are divided by their sum, multiplied, both or neither."""
    raw = _Once("raw", raw)
    chosen = _Once("chosen", _or_cast(raw))
    total = _sum(chosen, keepdim=True)
    shifted = OneOf(Op("torch.aten.add.Scalar", total, Const("eps"), Is(1)), total)
    divisor = OneOf(
        Op("torch.aten.clamp", shifted, Const("least_total"), Is(None)),
        Op("torch.aten.clamp_min", shifted, Const("least_total")),
        shifted,
    )
    normalized = _Once("normalized", Op("torch.aten.div.Tensor", chosen, divisor))
    unscaled = OneOf(normalized, chosen)
    return OneOf(
        Op("torch.aten.mul.Scalar", unscaled, Const("factor")),
        Op("torch.aten.mul.Tensor", unscaled, Const("factor"), commutative=True),
        normalized,
        raw,
    )


def _weights() -> Pattern:
    """The weights of what is chosen, of its scores or of its choices."""
    allowed = _in_kept_groups(_choices(_SCORES))
    ids = _Largest(allowed, "topk", 1)
    of_scores = Op("torch.aten.gather", _SCORES, Const("gather_axis"), ids, Is(False))
    of_choices = _Largest(allowed, "topk", 0)
    of_gating = _Widened(
        _Largest(_choices(_Once("scores_value", _Means("scores", "gating", _GATING))), "topk", 0)
    )
    return OneOf(
        _steps(_Means("weights", "scores", of_scores)),
        _steps(_Means("weights", "choices", of_choices)),
        _steps(_Means("weights", "sigmoid", Op("torch.aten.sigmoid", of_gating))),
        _steps(_Means("weights", "softmax", _Softmax(of_gating))),
    )


_WEIGHTS = _weights()


class DecomposedTopk:
    """Routing as models write it: scores, a bias, groups, top-k, weights; all but scores and top-k may lack.

    Without groups it is one of a single group.
    """

    roots = (
        *("torch.aten.mul.Scalar", "torch.aten.mul.Tensor", "torch.aten.div.Tensor", "torch.aten.gather"),
        *("torch.aten.topk", "torch.aten._softmax", "torch.aten.sigmoid", _CAST),
    )

    def recognise(self, op: ir.Operation) -> Raised | None:
        weights = _unrounded(op)
        return next(
            (raised for found in _WEIGHTS.match(weights, {}) if (raised := _raised(op, weights, found))), None
        )


def _unrounded(op: ir.Operation) -> ir.Value:
    """The weights that ``op`` makes; those that it rounds where nothing else reads them."""
    result = op.results[0]
    if op.name != _CAST or torch_ir.dtype_of(op.operands[0]) != "float32":
        return result
    return op.operands[0] if len(torch_ir.users(op.operands[0])) == 1 else result


def _raised(op: ir.Operation, weights: ir.Value, found: Bindings) -> Raised | None:
    """Make of what was found the operation whose weights replace the result of ``op``; None if it is none."""
    gating, ids = found["gating"], found["topk_op"].results[1]
    if not torch_ir.users(op.results[0]):
        return None  # only the ids of this top-k are read: what the weights are is not known
    operands = [gating, _vector(found["bias"])] if "bias" in found else [gating]
    types = [torch_ir.tensor_type(value) for value in (*operands, op.results[0])]
    groups, dtypes = _groups(found), _dtypes(found, weights)
    if not is_routing(types) or groups is None or dtypes is None or not _is_of_experts(found):
        return None
    least = found.get("least_total")
    contract = GroupedTopk(
        topk=found["topk"],
        num_expert_group=groups,
        topk_group=found.get("topk_group", 1),
        renormalize="normalized" in found,
        routed_scaling_factor=float(found.get("factor", 1.0)),
        eps=float(found.get("eps", 0.0)),
        scores=found["scores"],
        group_value=found.get("group_value", "two_largest"),
        dropped=found.get("dropped", "never"),
        weights=found["weights"],
        order="torch" if torch_ir.constant(found["topk_op"].operands[4]) is True else "torch_unsorted",
        least_total=None if least is None else float(least),
        **dtypes,
    )
    # Weights may be rounded long after they were made.
    place = torch_ir.producer(weights)
    return Raised(canonical.GROUPED_TOPK, contract, operands, [op.results[0], ids], place)


def _is_of_experts(found: Bindings) -> bool:
    """Tell whether what is compared are experts, few enough to be such, and gathered along their axis."""
    scores = torch_ir.tensor_type(found["scores_value"])
    assert scores is not None
    return (
        found.get("gather_axis", -1) in (-1, len(scores.shape) - 1)
        and isinstance(found["topk"], int)
        and (scores.shape[-1] or 0) <= MOST_EXPERTS
    )


def _dtypes(found: Bindings, weights: ir.Value) -> dict[str, Any] | None:
    """To which dtypes scores, choices and weights are rounded; None where a kernel rounds them otherwise.

    Those that round nothing are left out: a gating is not rounded, nor the best choice of a group.
    """
    names = ("scores_value", "choices", "raw", "chosen")
    scores, choices, raw, chosen = (torch_ir.dtype_of(found.get(name, weights)) for name in names)
    if not {scores, choices, raw, chosen} <= set(FLOATS):
        return None
    dtypes: dict[str, Any] = {}
    if found["scores"] != "gating":
        if torch_ir.dtype_of(found["made_scores"]) not in (scores, "float32"):
            return None  # rounded twice
        dtypes["score_dtype"] = scores
    if "bias" in found or found.get("group_value") == "two_largest":
        dtypes["choice_dtype"] = choices
    if "normalized" in found or "factor" in found:
        if torch_ir.dtype_of(weights) != chosen or (_is_made(found) and raw not in (chosen, "float32")):
            return None
        dtypes["step_dtype"] = chosen
    return dtypes


def _is_made(found: Bindings) -> bool:
    """Tell whether weights are computed of what was chosen."""
    return found["weights"] in ("softmax", "sigmoid")


def _vector(bias: ir.Value) -> ir.Value:
    """The vector that ``bias`` is a row of; ``bias`` itself if it is not."""
    op = torch_ir.producer(bias)
    if op is not None and op.name == "torch.aten.unsqueeze" and torch_ir.constant(op.operands[1]) == 0:
        return torch_ir.widened_from(op.operands[0])
    return bias


def _groups(found: Bindings) -> int | None:
    """Count the groups; None where the views around them are of other sizes."""
    if "topk_group" not in found:
        return 1
    names = ("scores_value", "in_groups", "spread", "is_kept")
    scores, grouped, spread, mask = (torch_ir.tensor_type(found[name]) for name in names)
    if scores is None or grouped is None or spread is None or mask is None or scores.shape[-1] is None:
        return None
    *lead, experts = scores.shape
    *before, groups, size = grouped.shape
    # Of two unknown sizes a view may make one of the other.
    settled = lead.count(None) <= 1 and before == lead
    fits = settled and groups is not None and size is not None and groups * size == experts
    same = spread.shape[-2:] == (groups, size) and mask.shape[-1] == experts
    return groups if fits and same and found["scatter_axis"] in (-1, len(lead)) else None


# --- to a kernel -----------------------------------------------------------------------------------


def fuse_routings(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Give every ``vmfuse.grouped_topk`` to a kernel, or refuse it with a reason."""
    for op in [op.operation for op in block.operations]:
        if torch_ir.op_name(op) == canonical.GROUPED_TOPK:
            _fuse(op, ledger, support)


def _fuse(routing: ir.Operation, ledger: Ledger, support: Support) -> None:
    site, spec = canonical.site_of(routing), _spec(routing)
    reason = support(spec)
    if reason is not None:
        ledger.refuse(site, reason)
        return
    types = [torch_ir.tensor_type(result) for result in routing.results]
    with ir.InsertionPoint(routing), routing.location:
        fused = canonical.create(
            canonical.TOPK,
            list(routing.operands),
            [type_ for type_ in types if type_ is not None],
            spec=canonical.to_attribute(spec),
            sites=canonical.to_attribute((site,)),
        )
    torch_ir.set_example(fused, [torch_ir.example_shape(result) for result in routing.results])
    for old, new in zip(routing.results, fused.results, strict=True):
        old.replace_all_uses_with(new)
    routing.erase()
    ledger.fuse(site, "grouped_topk")


def _spec(routing: ir.Operation) -> TopkSpec:
    gating = torch_ir.tensor_type(routing.operands[0])
    bias = torch_ir.dtype_of(routing.operands[1]) if len(routing.operands) > 1 else None
    weights, ids = (torch_ir.dtype_of(result) for result in routing.results)
    assert gating is not None and gating.shape[-1] is not None and weights is not None and ids is not None
    contract = canonical.routing_contract(routing)
    return TopkSpec(gating.shape[-1], gating.dtype, bias, contract, ids, weights)


def _why_no_kernel(spec: TopkSpec, operands: Types, results: Types) -> str | None:
    return why_no_routing(spec.routing, operands, results)


OPERATION = Operation(
    canonical.GROUPED_TOPK, GroupedTopk, why_no_routing, site=lambda routing: "grouped_topk"
)
FAMILY = PatternFamily(
    operations=(OPERATION, Operation(canonical.TOPK, TopkSpec, _why_no_kernel, is_kernel=True)),
    recognisers=(*NAMED_OPS, DecomposedTopk()),
    suspicions=(REFUSED, *SUSPICIONS),
    named=NAMED_OPS,
    fuse=fuse_routings,
)
