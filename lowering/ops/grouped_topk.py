"""``torch.ops.lowering.grouped_topk``: which experts a token goes to, and with what weights.

Like everything in ``ops``: the plain function is the definition, in aten operations that torch.export can
trace.  Values are compared as integers, so that neither the order among equals nor NaN is left to a device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from patterns.contracts import (
    ChoiceOrder,
    Dropped,
    GroupedTopk,
    GroupValue,
    RoutingDtype,
    RoutingWeights,
    Scores,
)

from .checks import FLOAT_DTYPES, check_dtype, check_rank, check_shape

_NAN = 0x7FFFFFFF
_NEVER = -(2**31)  # below the ordinal of every value
_LEAST = -0x7F800000  # that of -inf


def grouped_topk_reference(
    gating: Tensor,
    bias: Tensor | None,
    routing: GroupedTopk,
    ids_dtype: torch.dtype = torch.int32,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute weights [..., topk] in ``weights_dtype`` and ids [..., topk] in ``ids_dtype``.

    gating: [..., E]; bias: [E] or None; E divisible by ``num_expert_group``.

    Source: ``GroupedTopk`` names those of each variant.
    """
    scores = _rounded(_scores(gating, routing), routing.score_dtype)
    choices = scores if bias is None else _rounded(scores + bias.to(torch.float32), routing.choice_dtype)
    choices = choices + 0.0  # of a -0 the choice is 0
    choose = _chosen_first if routing.order == "first" else _chosen_by_torch
    chosen, ids = choose(choices, routing)
    weights = torch.gather(scores, -1, ids.to(torch.int64)) if routing.weights == "scores" else chosen
    return _steps(weights, routing).to(weights_dtype), ids.to(ids_dtype)


def _steps(chosen: Tensor, routing: GroupedTopk) -> Tensor:
    """Make float32 weights of what is chosen, each step rounded."""

    def step(value: Tensor) -> Tensor:
        return _rounded(value, routing.step_dtype)

    weights = chosen
    if routing.weights == "softmax":
        weights = torch.softmax(weights.to(torch.float64), dim=-1).to(torch.float32)
    if routing.weights == "sigmoid":
        weights = torch.sigmoid(weights.to(torch.float64)).to(torch.float32)
    weights = step(weights)
    if routing.renormalize:
        total = step(weights.to(torch.float64).sum(dim=-1, keepdim=True).to(torch.float32))
        total = step(total + routing.eps)
        if routing.least_total is not None:
            total = total.clamp(min=float(step(torch.tensor(routing.least_total))))
        weights = step(weights / total)
    return step(weights * routing.routed_scaling_factor)


def _rounded(value: Tensor, dtype: RoutingDtype) -> Tensor:
    """``value``, a float32, rounded to ``dtype``, which float32 holds exactly."""
    return value if dtype == "float32" else value.to(getattr(torch, dtype)).to(torch.float32)


def _scores(gating: Tensor, routing: GroupedTopk) -> Tensor:
    """Compute the scores in float64, and round once: the nearest float32 on every device."""
    if routing.scores == "gating":
        return gating.to(torch.float32)
    wide = gating.to(torch.float64)
    if routing.scores == "softmax":
        return torch.softmax(wide, dim=-1).to(torch.float32)
    if routing.scores == "sigmoid":
        return torch.sigmoid(wide).to(torch.float32)
    softplus = torch.nn.functional.softplus(wide, threshold=40.0).to(torch.float32)
    return softplus.to(torch.float64).sqrt().to(torch.float32)


def _chosen_first(choices: Tensor, routing: GroupedTopk) -> tuple[Tensor, Tensor]:
    """The chosen choices and their places, largest first, among equals the lower place."""
    ordinals = _ordinal(choices)
    if routing.topk_group < routing.num_expert_group:
        dropped = {"never": _NEVER, "least": _LEAST, "zero": 0}[routing.dropped]
        ordinals = torch.where(_in_kept_groups(ordinals, routing), ordinals, dropped)
    chosen = _largest(ordinals, routing.topk)
    return _value(chosen.values), chosen.places


def _chosen_by_torch(choices: Tensor, routing: GroupedTopk) -> tuple[Tensor, Tensor]:
    """The chosen choices and their places as torch.topk returns them."""
    groups = routing.num_expert_group
    if routing.topk_group < groups:
        size = choices.shape[-1] // groups
        values = _group_values(choices.unflatten(-1, (groups, size)), routing)
        best = torch.topk(values, routing.topk_group, dim=-1, sorted=False).indices
        kept = torch.zeros_like(values).scatter(-1, best, 1.0) > 0
        dropped = 0.0 if routing.dropped == "zero" else -math.inf
        choices = torch.where(kept.repeat_interleave(size, dim=-1), choices, dropped)
    found = torch.topk(choices, routing.topk, dim=-1, sorted=routing.order == "torch")
    return found.values, found.indices


def _group_values(choices: Tensor, routing: GroupedTopk) -> Tensor:
    if routing.group_value == "largest":
        return choices.amax(dim=-1)
    return _rounded(choices.topk(2, dim=-1).values.sum(dim=-1), routing.choice_dtype)


def _ordinal(values: Tensor) -> Tensor:
    """Map float32 ``values`` to int32 in the same order, every NaN above all numbers; there is no -0."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    return torch.where(values.isnan(), _NAN, torch.where(bits < 0, -magnitude, bits))


def _value(ordinal: Tensor) -> Tensor:
    """The float32 that ``_ordinal`` was given."""
    return torch.where(ordinal < 0, -ordinal - 2**31, ordinal).view(torch.float32)


class _Largest(NamedTuple):
    """The largest values along the last axis, in descending order, and their places; what is left."""

    values: Tensor
    places: Tensor
    rest: Tensor


def _largest(ordinals: Tensor, count: int) -> _Largest:
    """Take the ``count`` largest; of equal ones the first.  Where they were, ``rest`` holds ``_NEVER``.

    One after another: a sort of whole rows, or a maximum of int64, is more than some code generators can do.
    """
    size = ordinals.shape[-1]
    numbers = torch.arange(size, dtype=torch.int32, device=ordinals.device)
    values, places = [], []
    for _ in range(count):
        values.append(ordinals.amax(dim=-1, keepdim=True))
        places.append(torch.where(ordinals == values[-1], numbers, size).amin(dim=-1, keepdim=True))
        ordinals = torch.where(numbers == places[-1], _NEVER, ordinals)
    return _Largest(torch.cat(values, dim=-1), torch.cat(places, dim=-1), ordinals)


def _in_kept_groups(ordinals: Tensor, routing: GroupedTopk) -> Tensor:
    """bool [..., E]: whether an expert's group is one of those kept."""
    groups = routing.num_expert_group
    size = ordinals.shape[-1] // groups
    of_groups = ordinals.unflatten(-1, (groups, size))
    if routing.group_value == "largest":
        values = of_groups.amax(dim=-1)
    else:
        best = _value(_largest(of_groups, 2).values)
        values = _ordinal(_rounded(best[..., 0] + best[..., 1], routing.choice_dtype) + 0.0)
    kept = _largest(values, routing.topk_group).rest == _NEVER
    return kept.repeat_interleave(size, dim=-1)


_SCHEMA = (
    "(Tensor gating_output, Tensor? correction_bias=None, *, int topk, int num_expert_group=1, "
    "int topk_group=1, bool renormalize=True, float routed_scaling_factor=1.0, float eps=0.0, "
    "str scores='sigmoid', str group_value='two_largest', str dropped='never', str weights='scores', "
    "str order='first', float? least_total=None, str score_dtype='float32', str choice_dtype='float32', "
    "str step_dtype='float32') -> (Tensor, Tensor)"
)


@torch.library.custom_op("lowering::grouped_topk", mutates_args=(), schema=_SCHEMA)
def grouped_topk(
    gating_output: Tensor, correction_bias: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Choose ``topk`` experts a token: the best of scores with a bias, in the best groups, and weigh them.

    gating_output: [..., E] float32, bfloat16 or float16; correction_bias: [E] of any of these dtypes, or
    none; the E experts lie in ``num_expert_group`` equal groups.  The other arguments are the fields of
    ``GroupedTopk``, which says what is computed: by default sigmoid scores, the groups of largest two choices
    kept, the weights the chosen scores over their sum.  Returns float32 weights and int32 ids, both
    [..., topk].

    Among equals the lower expert, and the lower group, comes first, unless ``order`` says otherwise.  A NaN
    counts as larger than every number: its expert is chosen, and its weight, with ``renormalize`` every
    weight of the token, is NaN.  A choice of -inf is smaller than every number, yet its expert is chosen
    before those of groups that are not kept, which never are unless ``dropped`` says otherwise.

    Raises ValueError naming the argument that does not fit.
    """
    routing = GroupedTopk(**arguments)
    _check(gating_output, correction_bias, routing)
    weights, ids = grouped_topk_reference(gating_output, correction_bias, routing)
    return weights.contiguous(), ids.contiguous()


@grouped_topk.register_fake
def _(
    gating_output: Tensor, correction_bias: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    routing = GroupedTopk(**arguments)
    _check(gating_output, correction_bias, routing)
    shape = (*gating_output.shape[:-1], routing.topk)
    return gating_output.new_empty(shape, dtype=torch.float32), gating_output.new_empty(
        shape, dtype=torch.int32
    )


def _check(gating: Tensor, bias: Tensor | None, routing: GroupedTopk) -> None:
    check_dtype("gating_output", gating, FLOAT_DTYPES)
    check_rank("gating_output", gating, 1)
    if bias is not None:
        check_dtype("correction_bias", bias, FLOAT_DTYPES)
        check_shape("correction_bias", bias, gating.shape[-1:])
    if reason := why_impossible(routing, gating.shape[-1]):
        raise ValueError(reason)


_WORDS = {
    "scores": Scores,
    "group_value": GroupValue,
    "dropped": Dropped,
    "weights": RoutingWeights,
    "order": ChoiceOrder,
    "score_dtype": RoutingDtype,
    "choice_dtype": RoutingDtype,
    "step_dtype": RoutingDtype,
}


def why_impossible(routing: GroupedTopk, experts: int) -> str | None:
    """Say why ``experts`` cannot be routed so, in a sentence that begins with the wrong argument."""
    for name, words in _WORDS.items():
        if getattr(routing, name) not in get_args(words):
            return f"{name}: expected one of {', '.join(get_args(words))}, got {getattr(routing, name)!r}"
    if not math.isfinite(routing.routed_scaling_factor):
        return f"routed_scaling_factor: expected a finite number, got {routing.routed_scaling_factor}"
    if not 0 <= routing.eps < math.inf:
        return f"eps: expected a number of at least 0, got {routing.eps}"
    if routing.least_total is not None and not 0 <= routing.least_total < math.inf:
        return f"least_total: expected a number of at least 0, got {routing.least_total}"
    if routing.weights == "softmax" and routing.renormalize:
        return "renormalize: weights that are a softmax add up to one already"
    return _why_no_groups(routing, experts)


def _why_no_groups(routing: GroupedTopk, experts: int) -> str | None:
    groups, kept, topk = routing.num_expert_group, routing.topk_group, routing.topk
    if groups < 1 or experts % groups:
        return f"num_expert_group: {experts} experts do not divide into {groups} groups"
    if not 1 <= kept <= groups:
        return f"topk_group: from 1 to all {groups} groups can be kept, not {kept}"
    size = experts // groups
    if size < 2 and kept < groups and routing.group_value == "two_largest":
        return (
            f"num_expert_group: a group has at least two experts, and {experts} in {groups} groups are {size}"
        )
    if kept < groups and routing.dropped == "never" and routing.order != "first":
        return f"dropped: in order {routing.order} what is dropped is least or zero, not never"
    most = kept * size if routing.dropped == "never" else experts
    if not 1 <= topk <= most:
        return f"topk: from 1 to all {most} experts of {kept} groups can be chosen, not {topk}"
    return None
