"""``torch.ops.lowering.grouped_topk``: which experts a token goes to, and with what weights.

Like everything in ``ops``: the plain function is the definition, in aten operations that torch.export can
trace.  Values are compared as integers, so that neither the order among equals nor NaN is left to a device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patterns.contracts import GroupedTopk

from .checks import FLOAT_DTYPES, check_dtype, check_rank, check_shape

_NAN = 0x7FFFFFFF
_NEVER = -(2**31)  # below the ordinal of every value


def grouped_topk_reference(
    gating: Tensor, bias: Tensor, routing: GroupedTopk, ids_dtype: torch.dtype = torch.int32
) -> tuple[Tensor, Tensor]:
    """Compute weights, float32 [..., topk], and ids, ``ids_dtype`` [..., topk], as ``routing`` says.

    gating: [..., E]; bias: [E]; E divisible by ``num_expert_group``, at least two experts a group.

    Source: biased_grouped_topk of SGLang and AITER, DeepSeek-V3 of Hugging Face.
    """
    # In float64, and rounded once: the nearest float32 on every device.
    scores = torch.sigmoid(gating.to(torch.float64)).to(torch.float32)
    ordinals = _ordinal(scores + bias.to(torch.float32))
    if routing.topk_group < routing.num_expert_group:
        ordinals = torch.where(_in_kept_groups(ordinals, routing), ordinals, _NEVER)
    ids = _largest(ordinals, routing.topk).places
    weights = torch.gather(scores, -1, ids.to(torch.int64))
    if routing.renormalize:
        total = weights.to(torch.float64).sum(dim=-1, keepdim=True).to(torch.float32)
        weights = weights / (total + routing.eps)
    return weights * routing.routed_scaling_factor, ids.to(ids_dtype)


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
    best = _value(_largest(ordinals.unflatten(-1, (groups, size)), 2).values)
    kept = _largest(_ordinal(best[..., 0] + best[..., 1]), routing.topk_group).rest == _NEVER
    return kept.repeat_interleave(size, dim=-1)


@torch.library.custom_op(
    "lowering::grouped_topk",
    mutates_args=(),
    schema=(
        "(Tensor gating_output, Tensor correction_bias, *, int topk, int num_expert_group, int topk_group, "
        "bool renormalize=True, float routed_scaling_factor=1.0, float eps=0.0) -> (Tensor, Tensor)"
    ),
)
def grouped_topk(
    gating_output: Tensor,
    correction_bias: Tensor,
    *,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Choose ``topk`` experts a token: biased sigmoid scores, the best groups first, then the best experts.

    gating_output: [..., E] float32, bfloat16 or float16; correction_bias: [E] of any of these dtypes; the E
    experts lie in ``num_expert_group`` equal groups of at least two.  In float32: score = sigmoid(gating),
    choice = score + bias; of the groups, each worth the sum of its two largest choices, ``topk_group`` are
    kept; of the experts in them the ``topk`` of largest choice are chosen.  Returns float32 weights and int32
    ids, both [..., topk], largest choice first: weight = score, divided by the sum of the chosen scores + eps
    where ``renormalize``, times ``routed_scaling_factor``.

    score is the float32 nearest to the exact sigmoid.  Among equals the lower expert, and the lower group,
    comes first.  A NaN counts as larger than every number: its expert is chosen, and its weight, with
    ``renormalize`` every weight of the token, is NaN.  A choice of -inf is smaller than every number, yet its
    expert is chosen before those of groups that are not kept, which never are.

    Raises ValueError naming the argument that does not fit.
    Source: biased_grouped_topk of AITER and SGLang, grouped_topk of vLLM, DeepSeek-V3 of Hugging Face.
    """
    routing = GroupedTopk(topk, num_expert_group, topk_group, renormalize, routed_scaling_factor, eps)
    _check(gating_output, correction_bias, routing)
    weights, ids = grouped_topk_reference(gating_output, correction_bias, routing)
    return weights.contiguous(), ids.contiguous()


@grouped_topk.register_fake
def _(gating_output: Tensor, correction_bias: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    routing = GroupedTopk(**arguments)
    _check(gating_output, correction_bias, routing)
    shape = (*gating_output.shape[:-1], routing.topk)
    return gating_output.new_empty(shape, dtype=torch.float32), gating_output.new_empty(
        shape, dtype=torch.int32
    )


def _check(gating: Tensor, bias: Tensor, routing: GroupedTopk) -> None:
    check_dtype("gating_output", gating, FLOAT_DTYPES)
    check_rank("gating_output", gating, 1)
    check_dtype("correction_bias", bias, FLOAT_DTYPES)
    check_shape("correction_bias", bias, gating.shape[-1:])
    if reason := why_impossible(routing, gating.shape[-1]):
        raise ValueError(reason)


def why_impossible(routing: GroupedTopk, experts: int) -> str | None:
    """Say why ``experts`` cannot be routed so, in a sentence that begins with the wrong argument."""
    groups, kept, topk = routing.num_expert_group, routing.topk_group, routing.topk
    if groups < 1 or experts % groups:
        return f"num_expert_group: {experts} experts do not divide into {groups} groups"
    size = experts // groups
    if size < 2:
        return (
            f"num_expert_group: a group has at least two experts, and {experts} in {groups} groups are {size}"
        )
    if not 1 <= kept <= groups:
        return f"topk_group: from 1 to all {groups} groups can be kept, not {kept}"
    if not 1 <= topk <= kept * size:
        return f"topk: from 1 to all {kept * size} experts of {kept} groups can be chosen, not {topk}"
    if not math.isfinite(routing.routed_scaling_factor):
        return f"routed_scaling_factor: expected a finite number, got {routing.routed_scaling_factor}"
    if not 0 <= routing.eps < math.inf:
        return f"eps: expected a number of at least 0, got {routing.eps}"
    return None
