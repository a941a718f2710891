"""Grouped top-k routing: the reference against NumPy, the kernels against the reference, and whole programs.

The GPU kernel runs in emulation (``topk_emulation.cpp``), with waves of 32 and of 64 lanes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from lowering.backends import abi, cpu, toolchain
from lowering.errors import CompileError
from lowering.families.grouped_topk import choose_tile, instance, why_unsupported
from lowering.families.instance import KernelInstance
from lowering.families.row_mapping import Tile
from lowering.ops.grouped_topk import grouped_topk_reference
from lowering.targets import Target, resolve
from patterns.contracts import GroupedTopk, TopkSpec
from tests.families.host_kernels import assert_same, run

grouped_topk = torch.ops.lowering.grouped_topk

CPU, SM90, SM100 = resolve("cpu"), resolve("sm_90"), resolve("sm_100")
GFX950, GFX942 = resolve("gfx950"), resolve("gfx942")


def spec(
    experts: int, groups: int, kept: int, topk: int, dtype="bfloat16", bias="float32", **fields
) -> TopkSpec:
    ids, weights = fields.pop("ids", "int32"), fields.pop("made", "float32")
    return TopkSpec(experts, dtype, bias, GroupedTopk(topk, groups, kept, **fields), ids, weights)


SOFTMAX = {"scores": "softmax", "weights": "choices"}


CASES = {
    "deepseek_v3": spec(256, 8, 4, 8, routed_scaling_factor=2.5),
    "kimi_k2": spec(384, 1, 1, 8, "float32", routed_scaling_factor=2.827, eps=1e-20),
    "largest": spec(512, 32, 9, 32, "float32", "bfloat16", ids="int64"),
    "one_group_of_512": spec(512, 1, 1, 32, "float16", "float16"),
    "many_groups": spec(64, 32, 3, 6, "float16", renormalize=False),
    "odd_groups": spec(170, 17, 3, 5, "float16", "bfloat16"),
    "three_groups_of_170": spec(510, 3, 2, 31, "bfloat16", eps=0.5),
    "several_tokens_a_wave": spec(16, 1, 1, 3, "bfloat16", "bfloat16"),
    "more_chosen_than_lanes": spec(16, 2, 2, 13, "float32", routed_scaling_factor=-1.5),
    "all_groups": spec(72, 9, 9, 4, "float32", renormalize=False, routed_scaling_factor=0.1),
    "two_experts": spec(2, 1, 1, 2, "float32"),
    "one_chosen": spec(160, 8, 1, 1, "bfloat16", ids="int64"),
    # Other scores, weights and groups.
    "mixtral": spec(8, 1, 1, 2, "bfloat16", None, **SOFTMAX, order="torch"),
    "qwen3_moe": spec(128, 1, 1, 8, "bfloat16", None, **SOFTMAX, order="torch", made="bfloat16"),
    "gpt_oss": spec(
        *(128, 1, 1, 4, "bfloat16", None),
        **{
            "scores": "gating",
            "weights": "softmax",
            "renormalize": False,
            "order": "torch",
            "made": "bfloat16",
        },
    ),
    "deepseek_v2": spec(
        *(160, 8, 3, 6, "float32", None),
        **{**SOFTMAX, "renormalize": False, "routed_scaling_factor": 16.0},
        **{"group_value": "largest", "dropped": "zero", "order": "torch_unsorted", "ids": "int64"},
    ),
    "deepseek_v4": spec(
        *(256, 1, 1, 6, "float32"),
        **{"scores": "sqrt_softplus", "routed_scaling_factor": 1.5, "eps": 1e-20, "order": "torch_unsorted"},
    ),
    "dropped_at_zero": spec(64, 8, 3, 12, "float32", dropped="zero", order="torch_unsorted"),
    "dropped_at_least": spec(
        *(170, 17, 3, 31, "float16", "bfloat16"),
        **{
            "scores": "softmax",
            "dropped": "least",
            "weights": "choices",
            "order": "torch",
            "made": "float16",
        },
    ),
    "groups_of_one": spec(
        *(6, 6, 2, 4, "float32", None), **SOFTMAX, group_value="largest", dropped="zero", made="float16"
    ),
    "gating_with_a_bias": spec(
        *(72, 9, 4, 33 - 1, "bfloat16", "bfloat16"),
        **{"scores": "gating", "weights": "softmax", "renormalize": False, "dropped": "least"},
    ),
    "ernie_4_5": spec(64, 1, 1, 6, "float32", scores="softmax", least_total=0.5, order="torch"),
    "llama_4": spec(
        *(128, 1, 1, 3, "bfloat16", None),
        **{
            "scores": "gating",
            "weights": "sigmoid",
            "renormalize": False,
            "order": "torch",
            "made": "bfloat16",
        },
    ),
    "lfm2": spec(
        *(32, 1, 1, 4, "bfloat16"),
        **{"score_dtype": "bfloat16", "step_dtype": "bfloat16", "eps": 1e-6, "order": "torch"},
        **{"routed_scaling_factor": 1.3, "made": "bfloat16"},
    ),
    "scores_of_16_bits": spec(
        *(64, 1, 1, 8, "bfloat16", None),
        **{**SOFTMAX, "score_dtype": "bfloat16", "choice_dtype": "bfloat16", "order": "torch"},
        **{"made": "bfloat16"},
    ),
    "groups_of_16_bits": spec(
        *(72, 9, 4, 11, "float16", "float16"),
        **{"score_dtype": "float16", "choice_dtype": "float16", "step_dtype": "float16"},
        **{"dropped": "least", "order": "torch_unsorted", "made": "float16", "least_total": 4.1},
    ),
    "sigmoids_normalized": spec(
        *(40, 8, 3, 7, "bfloat16", "bfloat16"),
        **{"scores": "gating", "choice_dtype": "bfloat16", "weights": "sigmoid", "step_dtype": "bfloat16"},
    ),
    "few_of_many": spec(512, 1, 1, 8, "bfloat16", None, scores="sqrt_softplus", order="torch"),
}


# -- an independent definition ------------------------------------------------------------------------


def by_numpy(gating: np.ndarray, bias: np.ndarray, routing: GroupedTopk) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, sorting with a key, as the contract says it."""
    with np.errstate(all="ignore"):
        scores = SCORES[routing.scores](gating.astype(np.float64)).astype(np.float32)
        if routing.scores == "sqrt_softplus":
            scores = np.sqrt(scores)
        scores = rounded(scores, routing.score_dtype)
        choices = rounded(scores + bias.astype(np.float32), routing.choice_dtype)
        rows = [_one_token(*token, routing) for token in zip(scores, choices, strict=True)]
    return np.array([row[0] for row in rows], np.float32), np.array([row[1] for row in rows])


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(np.asarray(values, np.float32)).to(getattr(torch, dtype)).float().numpy()


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


SCORES = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softmax": _softmax,
    "sqrt_softplus": lambda x: np.logaddexp(x, 0),
    "gating": lambda x: x,
}


def _one_token(scores: np.ndarray, choices: np.ndarray, routing: GroupedTopk) -> tuple[np.ndarray, list[int]]:
    groups = np.arange(len(scores)).reshape(routing.num_expert_group, -1)
    count = 1 if routing.group_value == "largest" else 2
    values = np.array([sum(choices[_ranked(choices, group)[:count]], np.float32(0)) for group in groups])
    values = rounded(values, routing.choice_dtype)
    kept = groups[sorted(_largest(values, routing.topk_group, routing))].ravel()
    if routing.dropped != "never":
        fill = np.float32(0 if routing.dropped == "zero" else -np.inf)
        choices = np.where(np.isin(np.arange(len(scores)), kept), choices, fill)
        kept = np.arange(len(scores))
    ids = kept[_largest(choices[kept], routing.topk, routing)]
    weights = (scores if routing.weights == "scores" else choices)[ids]
    if routing.weights == "softmax":
        weights = _softmax(weights.astype(np.float64)).astype(np.float32)
    if routing.weights == "sigmoid":
        weights = SCORES["sigmoid"](weights.astype(np.float64)).astype(np.float32)
    weights = rounded(weights, routing.step_dtype)
    if routing.renormalize:
        total = rounded(weights.astype(np.float64).sum().astype(np.float32), routing.step_dtype)
        total = rounded(total + np.float32(routing.eps), routing.step_dtype)
        if routing.least_total is not None:
            total = np.maximum(total, rounded(np.float32(routing.least_total), routing.step_dtype))
        weights = rounded(weights / total, routing.step_dtype)
    return rounded(weights * np.float32(routing.routed_scaling_factor), routing.step_dtype), ids


def _largest(values: np.ndarray, count: int, routing: GroupedTopk) -> list[int]:
    """The places of the largest, in the order that is asked for."""
    if routing.order == "first":
        return _ranked(values, range(len(values)))[:count]
    return torch.topk(torch.from_numpy(values), count, sorted=routing.order == "torch").indices.tolist()


def _ranked(values: np.ndarray, indices) -> list[int]:
    """NaN first, then from large to small; among equals the lower index first."""
    return sorted((int(i) for i in indices), key=lambda i: (not np.isnan(values[i]), -values[i], i))


def on(target: Target, routing: GroupedTopk) -> GroupedTopk:
    """What ``target`` computes: on a GPU, where torch promises no order among equals, the first."""
    return dataclasses.replace(routing, order="first") if target.is_gpu else routing


def expected_of(case: TopkSpec, target: Target, gating: torch.Tensor, *bias: torch.Tensor) -> Any:
    """The reference's weights and ids, in the dtypes that ``case`` asks for."""
    dtypes = (getattr(torch, case.ids_dtype), getattr(torch, case.weights_dtype))
    return grouped_topk_reference(gating, *(bias or (None,)), on(target, case.routing), *dtypes)


def tokens(case: TopkSpec, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Gating, and bias if any: random, with ties, and from the fourth token on special values."""
    generator = torch.Generator().manual_seed(seed)
    gating = torch.randn(rows, case.experts, generator=generator) * 2
    bias = torch.randn(case.experts, generator=generator) * 0.2
    ties = torch.randint(0, case.experts, (case.experts // 2,), generator=generator)
    bias[ties] = 0.125
    gating[:, ties] = gating[:, ties].round()
    specials = [torch.nan, torch.inf, -torch.inf, -104.0, 88.0, -150.0, 1e-30, -0.0]
    for row, value in enumerate(specials, start=3):
        if row < rows:
            gating[row, torch.randperm(case.experts, generator=generator)[: 1 + case.experts // 5]] = value
        if row + len(specials) < rows:
            gating[row + len(specials)] = value
    made = [gating.to(getattr(torch, case.dtype))]
    return made if case.bias_dtype is None else [*made, bias.to(getattr(torch, case.bias_dtype))]


def as_numpy(gating: torch.Tensor, *bias: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return gating.float().numpy(), bias[0].float().numpy() if bias else np.zeros(gating.shape[-1])


def assert_routed(
    actual: tuple[torch.Tensor, torch.Tensor] | list[torch.Tensor], expected: tuple, what: object = ""
) -> None:
    """The same experts in the same order, and the same weights bit for bit."""
    weights, ids = (torch.as_tensor(value) for value in expected)
    assert torch.equal(actual[1].long(), ids.long()), what
    assert_same([actual[0]], [weights], what)


# -- the reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_reference_is_what_the_contract_says(name: str) -> None:
    case = CASES[name]
    for routing in {case.routing, on(SM90, case.routing)}:
        given = tokens(case, 40)
        weights, ids = expected_of(dataclasses.replace(case, routing=routing), CPU, *given)
        assert (weights.dtype, ids.dtype) == (
            getattr(torch, case.weights_dtype),
            getattr(torch, case.ids_dtype),
        )
        wanted, places = by_numpy(*as_numpy(*given), routing)
        assert_routed((weights, ids), (torch.from_numpy(wanted).to(weights.dtype), places))


def test_operation() -> None:
    """Leading axes are free, defaults are no scaling and renormalisation, and the fake kernel agrees."""
    gating, bias = torch.randn(2, 3, 64).bfloat16(), torch.randn(64)
    arguments = {"topk": 6, "num_expert_group": 8, "topk_group": 3}
    weights, ids = grouped_topk(gating, bias, **arguments)
    assert weights.shape == ids.shape == (2, 3, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    expected = by_numpy(*as_numpy(gating.flatten(0, 1), bias), GroupedTopk(6, 8, 3))
    assert_routed((weights.flatten(0, 1), ids.flatten(0, 1)), expected)
    torch.library.opcheck(grouped_topk, (gating, bias), arguments)


def test_order_among_equals_and_special_values() -> None:
    """What the docstring promises, one sentence at a time."""
    two = {"topk": 2, "num_expert_group": 2, "topk_group": 1}
    zeros, bias = torch.zeros(1, 8), torch.zeros(8)
    assert grouped_topk(zeros, bias, **two)[1].tolist() == [[0, 1]]  # lower group, lower experts
    nan = torch.tensor([[0.0, 0, 0, 0, 0, 9, torch.nan, 0]])
    weights, ids = grouped_topk(nan, bias, **two)
    assert ids.tolist() == [[6, 5]] and weights.isnan().all()
    weights, _ = grouped_topk(nan, bias, renormalize=False, **two)
    assert weights.isnan().tolist() == [[True, False]]
    masked = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf, -1, -1, -1, -1])
    _, ids = grouped_topk(zeros, masked, **{**two, "topk_group": 2, "topk": 6})
    assert ids.tolist() == [[0, 4, 5, 6, 7, 1]]
    _, ids = grouped_topk(zeros, masked + torch.tensor([9e9] + [0] * 7), **{**two, "topk": 2})
    assert ids.tolist() == [[4, 5]]  # 9e9 - inf is -inf: the other group is worth more
    lone = torch.tensor([0.0, 0, -torch.inf, -torch.inf, -9, -9, -9, -9])
    _, ids = grouped_topk(zeros, lone, **{**two, "topk": 4})
    assert ids.tolist() == [[0, 1, 2, 3]]  # -inf in the kept group before -9 in the other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_expert_group": 7}, "num_expert_group: 64 experts do not divide into 7 groups"),
        ({"num_expert_group": 0}, "num_expert_group: 64 experts do not divide into 0 groups"),
        ({"num_expert_group": 64}, "num_expert_group: a group has at least two experts"),
        ({"topk_group": 9}, "topk_group: from 1 to all 8 groups can be kept, not 9"),
        ({"topk_group": 0}, "topk_group: from 1 to all 8 groups can be kept, not 0"),
        ({"topk": 17}, "topk: from 1 to all 16 experts of 2 groups can be chosen, not 17"),
        ({"topk": 0}, "topk: from 1 to all 16 experts"),
        ({"eps": -1.0}, "eps: expected a number of at least 0"),
        ({"scores": "tanh"}, "scores: expected one of sigmoid, softmax, sqrt_softplus, gating, got 'tanh'"),
        ({"order": "torch"}, "dropped: in order torch what is dropped is least or zero, not never"),
        ({"weights": "softmax"}, "renormalize: weights that are a softmax add up to one already"),
        ({"score_dtype": "float64"}, "score_dtype: expected one of float32, bfloat16, float16"),
        ({"least_total": -1.0}, "least_total: expected a number of at least 0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor: expected a finite number"),
        ({"bias": torch.zeros(63)}, r"correction_bias: expected shape \[64\], got \[63\]"),
        ({"bias": torch.zeros(64, dtype=torch.float64)}, "correction_bias: expected float32"),
        ({"gating": torch.zeros(2, 64, dtype=torch.int32)}, "gating_output: expected float32"),
        ({"gating": torch.tensor(1.0)}, "gating_output: expected at least 1 dimension"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input_is_refused_by_name(change: dict, message: str, device: str) -> None:
    tensors = {"gating": torch.zeros(2, 64), "bias": torch.zeros(64)}
    tensors = {name: change.get(name, tensor).to(device) for name, tensor in tensors.items()}
    given = {"topk": 4, "num_expert_group": 8, "topk_group": 2}
    given |= {name: value for name, value in change.items() if name not in tensors}
    with pytest.raises(ValueError, match=message):
        grouped_topk(tensors["gating"], tensors["bias"], **given)


# -- the kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"),
    list(itertools.product(CASES, [CPU, SM90])),  # tests/gfx950 executes those of AMD
    ids=lambda value: getattr(value, "name", value),
)
def test_kernel_equals_reference(name: str, target: Target, launcher) -> None:
    """Any number of tokens, none among them, and pointers aligned to nothing but their element."""
    case = CASES[name]
    kernel = instance(case, target)
    for rows, shift in [(0, 0), (1, 0), (3, 1), (37, 0), (21, 5)]:
        given = tokens(case, rows, seed=rows)
        expected = expected_of(case, target, *given)
        assert_routed(run(kernel, launcher(kernel), given, rows, shift), expected, (name, rows, shift))


def test_a_full_batch_on_the_cpu(launcher) -> None:
    """4096 tokens of random float32: bit for bit what eager computes."""
    case = dataclasses.replace(CASES["deepseek_v3"], dtype="float32")
    kernel = instance(case, CPU)
    gating, bias = torch.randn(4096, 256), torch.randn(256) * 0.1
    expected = grouped_topk_reference(gating, bias, case.routing)
    assert_routed(run(kernel, launcher(kernel), [gating, bias], 4096), expected)


EXACT = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "sqrt_softplus": lambda x: torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0),
    "softmax": lambda x: torch.softmax(x, -1),
}


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda target: target.name)
@pytest.mark.parametrize("scores", EXACT)
def test_scores_are_the_nearest_float32(scores: str, target: Target, launcher) -> None:
    """Over the whole range, subnormal scores included: every expert is chosen, so every score is seen."""
    case = spec(32, 1, 1, 32, "float32", None, renormalize=False, scores=scores)
    kernel = instance(case, target)
    rows = 4096 if target is CPU else 256
    widths = torch.tensor([1e-3, 1.0, 18, 108]).repeat(8)
    gating = ((torch.rand(rows, 32, dtype=torch.float64) * 2 - 1) * widths).float()
    weights, ids = run(kernel, launcher(kernel), [gating], rows)
    exact = EXACT[scores](gating.double()).gather(1, ids.long()).float()
    assert torch.equal(weights, exact.double().sqrt().float() if scores == "sqrt_softplus" else exact)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_every_mapping_gives_the_same(lanes: int, launcher) -> None:
    case = spec(96, 1, 1, 7, "bfloat16")
    kernel = instance(case, SM90, Tile(lanes, vectors=1, vector=-(-96 // lanes), rows=64 // lanes))
    given = tokens(case, 9, seed=lanes)
    assert_routed(run(kernel, launcher(kernel), given, 9), expected_of(case, SM90, *given))


@pytest.mark.slow
@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda target: target.name)
@pytest.mark.parametrize("groups", [1, 2, 5, 8, 16, 31, 32])
def test_any_sizes(groups: int, target: Target, launcher) -> None:
    generator = np.random.default_rng(groups)
    for _ in range(4):
        size = int(generator.integers(2, 512 // groups + 1))
        kept = int(generator.integers(1, groups + 1))
        topk = int(generator.integers(1, min(32, kept * size) + 1))
        case = spec(
            groups * size, groups, kept, topk, str(generator.choice(["float32", "bfloat16", "float16"]))
        )
        kernel = instance(case, target)
        given = tokens(case, 19, seed=topk)
        expected = expected_of(case, target, *given)
        assert_routed(run(kernel, launcher(kernel), given, 19, shift=topk % 2), expected, case)


@pytest.mark.parametrize("target", [CPU, SM90, SM100, GFX950, GFX942], ids=lambda target: target.name)
@pytest.mark.parametrize(
    "name", ["deepseek_v3", "largest", "more_chosen_than_lanes", "deepseek_v4", "gpt_oss"]
)
def test_objects_take_what_is_passed(name: str, target: Target) -> None:
    kernel = instance(CASES[name], target)
    found = abi.check(kernel, toolchain.compile_kernel(kernel))
    if target is CPU:
        assert found.prototype == cpu.prototype(kernel)
        other = dataclasses.replace(CASES[name], ids_dtype="int64" if name != "largest" else "int32")
        with pytest.raises(CompileError, match="the dispatch calls"):
            abi.check(dataclasses.replace(kernel, bindings=instance(other, CPU).bindings), _object(kernel))
    else:
        assert found.arch == target.arch
        assert [p.size for p in found.parameters] == [8] * len(kernel.bindings) + [4]


def _object(kernel: KernelInstance) -> bytes:
    return toolchain.compile_kernel(kernel)


def test_tiles_fill_the_wave() -> None:
    """A token of DeepSeek-V3 has a wave to itself; small ones share it."""
    tiles = {name: choose_tile(CASES[name], SM90) for name in CASES}
    assert tiles["deepseek_v3"] == Tile(lanes=32, vectors=1, vector=8, rows=4)
    assert choose_tile(CASES["deepseek_v3"], GFX950) == Tile(lanes=64, vectors=1, vector=4, rows=4)
    assert tiles["several_tokens_a_wave"] == Tile(lanes=4, vectors=1, vector=4, rows=32)
    assert all(tile.threads == 128 and 1 <= tile.lanes <= 32 for tile in tiles.values())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (spec(1024, 8, 4, 8), "at most 512 experts on {}, not 1024"),
        (spec(512, 64, 4, 8), "at most 32 groups on {}, not 64"),
        (spec(512, 8, 4, 33), "at most 32 chosen experts on {}, not 33"),
        (spec(4096, 8, 4, 8), "experts on {}, not 4096"),
        (spec(250, 8, 4, 8), "num_expert_group: 250 experts do not divide into 8 groups"),
        (spec(64, 8, 1, 9), "topk: from 1 to all 8 experts of 1 groups can be chosen, not 9"),
        (spec(64, 8, 2, 8, "float64"), "takes gating of bfloat16, float16 or float32, not float64"),
        (spec(64, 8, 2, 8, bias="int32"), "takes a bias of bfloat16, float16 or float32, not int32"),
        (spec(64, 8, 2, 8, ids="int16"), "writes ids of int32 or int64, not int16"),
        (spec(64, 8, 2, 8, made="float64"), "writes weights of bfloat16, float16 or float32, not float64"),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(case: TopkSpec, reason: str) -> None:
    """Sizes are those of a wave's registers: a CPU does larger ones."""
    for target in (CPU, SM90, GFX950):
        if target is CPU and "at most" in reason:
            assert why_unsupported(case, target) is None
            continue
        assert reason.format(target.name) in (why_unsupported(case, target) or "")
        with pytest.raises(CompileError, match=reason.format(target.name)):
            instance(case, target)


def test_more_than_a_gpu_does(launcher) -> None:
    """On the CPU: as many experts, groups and chosen ones as the kernel of a GPU has no registers for."""
    case = spec(2048, 64, 48, 1500, "float32", order="torch_unsorted", dropped="least")
    given = tokens(case, 8)
    kernel = instance(case, CPU)
    assert_routed(run(kernel, launcher(kernel), given, 8), expected_of(case, CPU, *given))
