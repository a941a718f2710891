"""Make a kernel instance of a TopkSpec and a target: the grouped top-k of ``kernels/topk.*``.

What that kernel family supports is decided here and nowhere else: ``why_unsupported`` says it in a sentence
that the fusion can record, ``instance`` raises the same sentence.
"""

from __future__ import annotations

import torch
from iree.compiler import ir

from patterns import canonical, torch_ir
from patterns.contracts import TopkSpec
from patterns.grouped_topk import FAMILY as PATTERNS

from .. import ops
from ..errors import CompileError
from ..ops.grouped_topk import why_impossible
from ..targets import Target
from .base import Family, Reference
from .instance import Binding, GridRule, KernelInstance, float32_literal
from .row_mapping import Tile

# What a wave has registers for; a CPU's kernel has the scores on its stack.
MAX_EXPERTS = {"cpu": 2048, "cuda": 512, "hip": 512}
MAX_GROUPS = 32
MAX_TOPK = 32

_SOURCES = {"cpu": "topk.c", "cuda": "topk.cu", "hip": "topk.hip"}
_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
# How the sources call what ids are stored as: CPU and GPU sources name their integers differently.
_IDS = {
    "int32": {"cpu": "i32", "cuda": "int", "hip": "int"},
    "int64": {"cpu": "i64", "cuda": "u64", "hip": "u64"},
}

# How the sources call the words of a contract.
_SCORES = {
    "sigmoid": "SIGMOID",
    "softmax": "SOFTMAX",
    "sqrt_softplus": "ROOT_OF_SOFTPLUS",
    "gating": "GATING",
}
_WEIGHTS = {
    "scores": "OF_SCORES",
    "choices": "OF_CHOICES",
    "softmax": "SOFTMAX_OF_CHOICES",
    "sigmoid": "SIGMOID_OF_CHOICES",
}
_ORDERS = {"first": "FIRST", "torch": "TORCH_SORTED", "torch_unsorted": "TORCH_UNSORTED"}
# The rank of an expert whose group is dropped: none, or that of the float32.
_DROPPED = {"never": "0u", "least": "0x007fffffu", "zero": "0x80000000u"}

# Experts a lane should have before a token is spread over more lanes: with fewer there is little to do
# between two exchanges.
_LEAST_PER_LANE = 4
_WAVES = 4  # of a workgroup
# Experts that one CPU workgroup scores: some ten microseconds, well above the cost of handing it out.
_CPU_EXPERTS = 4096


def why_unsupported(spec: TopkSpec, target: Target) -> str | None:
    """Say in a sentence why the kernel cannot do ``spec`` on ``target``; None if it can."""
    if reason := why_impossible(spec.routing, spec.experts):
        return reason
    for name, dtype in (
        ("takes gating", spec.dtype),
        ("takes a bias", spec.bias_dtype),
        ("writes weights", spec.weights_dtype),
    ):
        if dtype is not None and dtype not in _CODES:
            return f"The routing kernel {name} of bfloat16, float16 or float32, not {dtype}."
    if spec.ids_dtype not in _IDS:
        return f"The routing kernel writes ids of int32 or int64, not {spec.ids_dtype}."
    return _why_too_large(spec, target)


def _why_too_large(spec: TopkSpec, target: Target) -> str | None:
    limits = [("experts", spec.experts, MAX_EXPERTS[target.backend])]
    if target.is_gpu:
        limits.append(("groups", spec.routing.num_expert_group, MAX_GROUPS))
        limits.append(("chosen experts", spec.routing.topk, MAX_TOPK))
    for what, value, most in limits:
        if value > most:
            return f"The routing kernel knows at most {most} {what} on {target.name}, not {value}."
    return None


def instance(spec: TopkSpec, target: Target, tile: Tile | None = None) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; ``tile`` overrides the chosen mapping (for tuning).

    Raises CompileError with ``why_unsupported``'s sentence.
    """
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    tile = tile or choose_tile(spec, target)
    defines = _defines(spec, target) + _tile_defines(spec, tile, target)
    source, grid_rule = _SOURCES[target.backend], GridRule(tile.rows)
    return KernelInstance.named(
        _stem(spec), target, spec, source, defines, bindings(spec), grid_rule, tile.threads
    )


def bindings(spec: TopkSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order."""
    topk = spec.routing.topk
    bias = [] if spec.bias_dtype is None else [Binding("bias", spec.bias_dtype, (spec.experts,), "read")]
    return (
        Binding("gating", spec.dtype, ("T", spec.experts), "read"),
        *bias,
        Binding("weights", spec.weights_dtype, ("T", topk), "write"),
        Binding("ids", spec.ids_dtype, ("T", topk), "write"),
    )


def choose_tile(spec: TopkSpec, target: Target) -> Tile:
    """The default mapping: as many lanes as a wave has for every group, as long as each has enough to do.

    A token has ``lanes``, a power of two; every group an equal number of them, of ``vector`` experts each.
    """
    if not target.is_gpu:
        return Tile(lanes=1, vectors=1, vector=1, rows=max(1, _CPU_EXPERTS // spec.experts))
    groups = spec.routing.num_expert_group
    size, parts = spec.experts // groups, _power_of_two_above(groups)
    lanes = 1
    while 2 * lanes * parts <= target.wave and size >= 2 * lanes * _LEAST_PER_LANE:
        lanes *= 2
    rows = _WAVES * target.wave // (lanes * parts)
    return Tile(lanes=lanes * parts, vectors=1, vector=-(-size // lanes), rows=rows)


def _power_of_two_above(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _defines(spec: TopkSpec, target: Target) -> tuple[tuple[str, str], ...]:
    routing = spec.routing
    values: dict[str, int | str] = {
        "EXPERTS": spec.experts,
        "GROUPS": routing.num_expert_group,
        "TOPK_GROUP": routing.topk_group,
        "TOPK": routing.topk,
        "GATING_DTYPE": _CODES[spec.dtype],
        "HAS_BIAS": int(spec.bias_dtype is not None),
        "BIAS_DTYPE": _CODES[spec.bias_dtype or spec.dtype],
        "WEIGHT_DTYPE": _CODES[spec.weights_dtype],
        "ID": _IDS[spec.ids_dtype][target.backend],
        "SCORES": _SCORES[routing.scores],
        "LARGEST_OF_GROUP": int(routing.group_value == "largest"),
        "DROPPED": _DROPPED[routing.dropped],
        "WEIGHTS": _WEIGHTS[routing.weights],
        "ORDER": _ORDERS[routing.order],
        "SCORE_DTYPE": _CODES[routing.score_dtype],
        "CHOICE_DTYPE": _CODES[routing.choice_dtype],
        "STEP_DTYPE": _CODES[routing.step_dtype],
        "RENORMALIZE": int(routing.renormalize),
        "EPS": float32_literal(routing.eps),
        "HAS_LEAST_TOTAL": int(routing.least_total is not None),
        "LEAST_TOTAL": float32_literal(routing.least_total or 0.0),
        "FACTOR": float32_literal(routing.routed_scaling_factor),
    }
    return tuple((name, str(value)) for name, value in values.items())


def _tile_defines(spec: TopkSpec, tile: Tile, target: Target) -> tuple[tuple[str, str], ...]:
    if not target.is_gpu:
        return (("ROWS", str(tile.rows)),)
    values = {
        "GROUP_LANES": tile.lanes // _power_of_two_above(spec.routing.num_expert_group),
        "PER_LANE": tile.vector,
        "TOKEN_LANES": tile.lanes,
        "THREADS": tile.threads,
    }
    return tuple((name, str(value)) for name, value in values.items())


def _stem(spec: TopkSpec) -> str:
    routing = spec.routing
    return f"topk{routing.topk}_{_SHORT[spec.dtype]}_e{spec.experts}_g{routing.num_expert_group}"


def _reference(op: ir.Operation) -> Reference:
    """Give the eager definition.  Raises CompileError where the sizes are impossible."""
    routing = canonical.routing_contract(op)
    gating = torch_ir.tensor_type(op.operands[0])
    dtypes = [getattr(torch, torch_ir.dtype_of(result) or "") for result in op.results]
    assert gating is not None and gating.shape[-1] is not None
    if reason := why_impossible(routing, gating.shape[-1]):
        raise CompileError(f"{torch_ir.location(op)}: grouped_topk cannot be done: {reason}")

    def reference(x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.grouped_topk_reference(x, bias, routing, dtypes[1], dtypes[0])

    return (routing, *dtypes), reference


FAMILY = Family(
    name="grouped_topk",
    patterns=PATTERNS,
    spec=TopkSpec,
    instance=instance,
    why_unsupported=why_unsupported,
    sources={
        "topk.c": ("cpu.h", "scores.h", "order.h"),
        "topk.cu": ("topk.h", "scores.h"),
        "topk.hip": ("topk.h", "scores.h"),
    },
    references={canonical.GROUPED_TOPK: _reference},
)
