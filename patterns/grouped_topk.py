"""Raise grouped top-k, by name and written out, to ``vmfuse.grouped_topk``.

It is recognised where its scores are float32, whatever the dtype of the gating they come from.  It is
whole when it is raised, so one kernel computes it and nothing around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import GroupedTopk, TopkSpec
from .match import ANY, Bindings, Const, Exact, Is, OneOf, Op, Pattern, first_match
from .named_call import Arg, Fields, NamedOp
from .near_routings import SUSPICIONS
from .operation import Operation, PatternFamily, Support, Types
from .recogniser import Raised
from .sites import Ledger
from .torch_ir import TensorType
from .well_typed import is_routing, why_no_routing

# --- by name ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedTopk(NamedOp):
    """One row: ``name`` with its ``schema`` stands for a grouped top-k; ``x`` holds the gating.

    routing
        Fields of the contract but ``topk``, which the results' size gives.
    bias
        Name of the argument that holds it.
    same_dtype
        The library reads the bias as if it had the gating's dtype; where it has not there is no telling what
        was meant.
    """

    bias: str = "correction_bias"
    routing: Fields = field(default_factory=dict)
    same_dtype: bool = False

    def shapes(self, given: Mapping[str, Any], fp8: str) -> dict[str, tuple[tuple[Any, ...], Any]]:
        shape = (*given[self.x].shape[:-1], given["topk"])
        return {"weights": (shape, "float32"), "ids": (shape, "int32")}

    def recognise(self, op: ir.Operation) -> Raised | None:
        # MLIR written by hand may leave out what the schema has a value for.
        names = self.arguments[: max(len(op.operands), self.required)]
        results = _results(op)
        if len(op.operands) != len(names) or len(results) != 2:
            return None
        operands = dict(zip(names, op.operands, strict=True))
        values = {name: torch_ir.constant(operand) for name, operand in operands.items()}
        fields = self._fields(values)
        if fields is None or any(values.get(name) != value for name, value in self.requires.items()):
            return None
        gating, bias = operands[self.x], operands[self.bias]
        types = [torch_ir.tensor_type(value) for value in (gating, bias, results[0])]
        if not is_routing(types) or (
            self.same_dtype and len({type_.dtype for type_ in types[:2] if type_}) > 1
        ):
            return None
        topk = types[2].shape[-1] if types[2] is not None else None
        assert topk is not None
        contract = GroupedTopk(topk=topk, **fields)
        return Raised(canonical.GROUPED_TOPK, contract, [gating, bias], results)

    def _fields(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The fields of the contract; None where one of them is computed."""
        found = {}
        for name, given in self.routing.items():
            value = given
            if isinstance(given, Arg):
                if given.name not in values:
                    continue  # the contract's default, which is the schema's
                value = values[given.name]
            if value is torch_ir.NOT_CONSTANT:
                return None
            found[name] = value
        return found


def _results(op: ir.Operation) -> list[ir.Value]:
    """The results of ``op``; where it returns a list, what that is unpacked to."""
    if len(op.results) == 1:
        users = torch_ir.users(op.result)
        if len(users) == 1 and users[0].name == "torch.prim.ListUnpack":
            return list(users[0].results)
    return list(op.results)


_GROUPS = {"num_expert_group": Arg("num_expert_group"), "topk_group": Arg("topk_group")}
_SCALED = {**_GROUPS, "routed_scaling_factor": Arg("routed_scaling_factor")}


def _aiter(name: str, kept: str, *, same_dtype: bool = True) -> NamedTopk:
    """AITER's operation, under its own names and under vLLM's."""
    return NamedTopk(
        name,
        "(Tensor gating_output, Tensor correction_bias, Tensor! topk_weights, Tensor! topk_ids, "
        f"int num_expert_group, int {kept}, bool need_renorm, float routed_scaling_factor=1.0) -> ()",
        ("weights", "ids"),
        x="gating_output",
        routing={**_SCALED, "topk_group": Arg(kept), "renormalize": Arg("need_renorm")},
        same_dtype=same_dtype,
    )


def _sglang(scaled: bool) -> NamedTopk:
    """SGLang's, which scales its weights only if told to."""
    return NamedTopk(
        "sgl_kernel::moe_fused_gate",
        "(Tensor input, Tensor bias, int num_expert_group, int topk_group, int topk, "
        "int num_fused_shared_experts, float routed_scaling_factor, "
        "bool apply_routed_scaling_factor_on_output) -> Tensor[]",
        ("weights", "ids"),
        bias="bias",
        routing=_SCALED if scaled else _GROUPS,
        requires={"num_fused_shared_experts": 0, "apply_routed_scaling_factor_on_output": scaled},
    )


# How sure a row is: see patterns/named_ops.py.
NAMED_OPS = (
    NamedTopk(  # read: it is this project's own
        "lowering::grouped_topk",
        "(Tensor gating_output, Tensor correction_bias, *, int topk, int num_expert_group, int topk_group, "
        "bool renormalize=True, float routed_scaling_factor=1.0, float eps=0.0) -> (Tensor, Tensor)",
        ("weights", "ids"),
        x="gating_output",
        routing={**_SCALED, "renormalize": Arg("renormalize"), "eps": Arg("eps")},
    ),
    # Schemas read, arithmetic numerics.
    _aiter("aiter::biased_grouped_topk", "topk_group"),
    _aiter("aiter::biased_grouped_topk_hip", "topk_grp"),
    _aiter("vllm::rocm_aiter_biased_grouped_topk", "topk_group"),
    # Schema read, arithmetic memory; other values of scoring_func mean other scores.
    NamedTopk(
        "_moe_C::grouped_topk",
        "(Tensor scores, int n_group, int topk_group, int topk, bool renormalize, "
        "float routed_scaling_factor, Tensor bias, int scoring_func) -> (Tensor, Tensor)",
        ("weights", "ids"),
        x="scores",
        bias="bias",
        routing={
            **_SCALED,
            "num_expert_group": Arg("n_group"),
            "renormalize": Arg("renormalize"),
            "eps": 1e-20,
        },
        requires={"scoring_func": 1},
    ),
    # Schema and arithmetic read.
    _sglang(scaled=True),
    _sglang(scaled=False),
)


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
class _Largest(Pattern):
    """The indices of the ``count`` largest of ``values`` along the last axis."""

    values: Pattern
    count: str

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        op = torch_ir.producer(value)
        if op is None or op.name != "torch.aten.topk" or value != op.results[1]:
            return
        values, count, axis, largest, _ = (op.operands[i] for i in range(5))
        if torch_ir.constant(axis) == -1 and torch_ir.constant(largest) is True:
            for found in self.values.match(values, bound):
                yield from Const(self.count).match(count, found)


def _sum(a: Pattern, *, keepdim: bool) -> Pattern:
    return Op("torch.aten.sum.dim_IntList", a, Is([-1]), Is(keepdim), Is(None))


_SCORES = _Once("scores", Op("torch.aten.sigmoid", Exact("gating")))
_CHOICES = _Once("choices", Op("torch.aten.add.Tensor", _SCORES, Exact("bias"), Is(1), commutative=True))
_IN_GROUPS = _Once("in_groups", Op("torch.aten.view", _CHOICES, ANY))
_GROUP_VALUES = _Once(
    "group_values", _sum(Op("torch.aten.topk", _IN_GROUPS, Is(2), Is(-1), Is(True), ANY), keepdim=False)
)
# A one for each group that is kept, then for each expert in it, then a truth value.
_KEPT = Op(
    "torch.aten.scatter.value",
    Op("torch.aten.full_like", _GROUP_VALUES, Is(0), ANY, ANY, ANY, ANY, ANY),
    Const("scatter_axis"),
    _Largest(_GROUP_VALUES, "topk_group"),
    Is(1),
)
_SPREAD = _Once("spread", Op("torch.aten.expand", Op("torch.aten.unsqueeze", _KEPT, Is(-1)), ANY, ANY))
_IS_KEPT = _Once(
    "is_kept",
    Op("torch.prims.convert_element_type", Op("torch.aten.view", _SPREAD, ANY), ANY, dtype="bool"),
)
_LEAST = OneOf(Is(-math.inf), Op("torch.aten.scalar_tensor", Is(-math.inf), ANY, ANY, ANY, ANY))
_NOT_KEPT = OneOf(Op("torch.aten.bitwise_not", _IS_KEPT), Op("torch.aten.logical_not", _IS_KEPT))
_ALLOWED = OneOf(
    Op("torch.aten.where.self", _NOT_KEPT, _LEAST, _CHOICES),
    Op("torch.aten.where.self", _IS_KEPT, _CHOICES, _LEAST),
    _CHOICES,
)
_IDS = _Once("ids", _Largest(_ALLOWED, "topk"))
_CHOSEN = _Once("chosen", Op("torch.aten.gather", _SCORES, Const("gather_axis"), _IDS, Is(False)))
_TOTAL = _sum(_CHOSEN, keepdim=True)
_DIVISOR = OneOf(Op("torch.aten.add.Scalar", _TOTAL, Const("eps"), Is(1)), _TOTAL)
_RENORMALIZED = _Once("renormalized", Op("torch.aten.div.Tensor", _CHOSEN, _DIVISOR))
_UNSCALED = OneOf(_RENORMALIZED, _CHOSEN)
_WEIGHTS = OneOf(
    Op("torch.aten.mul.Scalar", _UNSCALED, Const("factor")),
    Op("torch.aten.mul.Tensor", _UNSCALED, Const("factor"), commutative=True),
    _UNSCALED,
)


class DecomposedTopk:
    """Grouped top-k as DeepSeek-V3 and the models like it write it: sigmoid, bias, groups, top-k, gather.

    Without groups it is one of a single group.
    """

    roots = ("torch.aten.mul.Scalar", "torch.aten.mul.Tensor", "torch.aten.div.Tensor", "torch.aten.gather")

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_WEIGHTS, op.result)
        if found is None:
            return None
        gating, bias = found["gating"], _vector(found["bias"])
        types = [torch_ir.tensor_type(value) for value in (gating, bias, op.result)]
        scores = torch_ir.tensor_type(found["scores"])
        if not is_routing(types) or scores is None or scores.dtype != "float32":
            return None
        groups = _groups(found, scores)
        last = len(scores.shape) - 1
        if groups is None or found["gather_axis"] not in (-1, last) or not isinstance(found["topk"], int):
            return None
        contract = GroupedTopk(
            topk=found["topk"],
            num_expert_group=groups,
            topk_group=found.get("topk_group", 1),
            renormalize="renormalized" in found,
            routed_scaling_factor=float(found.get("factor", 1.0)),
            eps=float(found.get("eps", 0.0)),
        )
        return Raised(canonical.GROUPED_TOPK, contract, [gating, bias], [op.result, found["ids"]])


def _vector(bias: ir.Value) -> ir.Value:
    """The vector that ``bias`` is a row of; ``bias`` itself if it is not."""
    op = torch_ir.producer(bias)
    if op is not None and op.name == "torch.aten.unsqueeze" and torch_ir.constant(op.operands[1]) == 0:
        return torch_ir.widened_from(op.operands[0])
    return bias


def _groups(found: Bindings, scores: TensorType) -> int | None:
    """Count the groups; None where the views around them are of other sizes."""
    if "in_groups" not in found:
        return 1
    *lead, experts = scores.shape
    grouped, spread, mask = (torch_ir.tensor_type(found[name]) for name in ("in_groups", "spread", "is_kept"))
    if grouped is None or spread is None or mask is None or experts is None:
        return None
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
    gating, bias = (torch_ir.tensor_type(operand) for operand in routing.operands)
    ids = torch_ir.tensor_type(routing.results[1])
    assert gating is not None and bias is not None and ids is not None
    experts = gating.shape[-1]
    assert experts is not None
    return TopkSpec(experts, gating.dtype, bias.dtype, canonical.routing_contract(routing), ids.dtype)


def _why_no_kernel(spec: TopkSpec, operands: Types, results: Types) -> str | None:
    return why_no_routing(spec.routing, operands, results)


OPERATION = Operation(
    canonical.GROUPED_TOPK, GroupedTopk, why_no_routing, site=lambda routing: "grouped_topk"
)
FAMILY = PatternFamily(
    operations=(OPERATION, Operation(canonical.TOPK, TopkSpec, _why_no_kernel, is_kernel=True)),
    recognisers=(*NAMED_OPS, DecomposedTopk()),
    suspicions=SUSPICIONS,
    named=NAMED_OPS,
    fuse=fuse_routings,
)
