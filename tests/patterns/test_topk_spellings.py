"""Grouped top-k routing in models: by other libraries' names, written out, left to IREE; compiled and run."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lowering
from lowering.errors import CompileError
from lowering.importing import foreign
from patterns import grouped_topk
from patterns.contracts import GroupedTopk

foreign.declare_ops()

CONTRACT = GroupedTopk(topk=6, num_expert_group=8, topk_group=3, routed_scaling_factor=2.5)


class Router(nn.Module):
    """A function of gating [T, 64] and a bias of its own."""

    def __init__(self, function: Callable[..., Any], bias: torch.dtype = torch.float32):
        super().__init__()
        self.function = function
        self.register_buffer("bias", (torch.randn(64) * 0.1).to(bias))

    def forward(self, gating: torch.Tensor) -> Any:
        return self.function(gating, self.bias)


def eager(
    gating: torch.Tensor, bias: torch.Tensor | None, contract: GroupedTopk
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.lowering.grouped_topk(gating, bias, **contract.__dict__)


def compiled(model: nn.Module, *args: torch.Tensor) -> Any:
    """The results of the compiled model, and its report."""
    result = lowering.compile(model, args)
    return lowering.load(result.vmfb)(*args), result.report


# -- by name ------------------------------------------------------------------------------------------


def aiter(name: str) -> Callable[..., Any]:
    def function(gating: torch.Tensor, bias: torch.Tensor) -> Any:
        weights = gating.new_empty((gating.shape[0], 6), dtype=torch.float32)
        ids = gating.new_empty((gating.shape[0], 6), dtype=torch.int32)
        namespace, _, op = name.partition("::")
        getattr(getattr(torch.ops, namespace), op)(gating, bias, weights, ids, 8, 3, True, 2.5)
        return weights, ids

    return function


def sglang(scaled: bool) -> Callable[..., Any]:
    fused_gate = torch.ops.sgl_kernel.moe_fused_gate
    return lambda gating, bias: tuple(fused_gate(gating, bias, 8, 3, 6, 0, 2.5, scaled))


def ungrouped(name: str, *arguments: Any, source: bool = True, biased: bool = False) -> Callable[..., Any]:
    """A call that writes weights and ids, and the places it read them from where there is a ``source``."""
    namespace, _, op = name.partition("::")

    def function(gating: torch.Tensor, bias: torch.Tensor) -> Any:
        weights = gating.new_empty((gating.shape[0], 6), dtype=torch.float32)
        ids, places = (gating.new_empty((gating.shape[0], 6), dtype=torch.int32) for _ in range(2))
        given = [bias if argument == "bias" else argument for argument in arguments]
        getattr(getattr(torch.ops, namespace), op)(
            weights, ids, *([places] if source else []), gating, *given
        )
        return weights, ids

    return function


def grouped(name: str, scores: Any) -> Callable[..., Any]:
    namespace, _, op = name.partition("::")

    def function(gating: torch.Tensor, bias: torch.Tensor) -> Any:
        weights = gating.new_empty((gating.shape[0], 6), dtype=torch.float32)
        ids = gating.new_empty((gating.shape[0], 6), dtype=torch.int32)
        getattr(getattr(torch.ops, namespace), op)(gating, weights, ids, 8, 3, True, scores, 2.5)
        return weights, ids

    return function


SOFTMAX = {"scores": "softmax"}
OF_LARGEST = GroupedTopk(6, 8, 3, True, 2.5, **SOFTMAX, group_value="largest")
SOFTPLUS = GroupedTopk(6, routed_scaling_factor=1.5, scores="sqrt_softplus")
NARROW = GroupedTopk(
    6, least_total=3.5, score_dtype="bfloat16", choice_dtype="float16", step_dtype="bfloat16", order="torch"
)

# Each with whether a bias is among what it takes.
NAMED: dict[str, tuple[Callable[..., Any], GroupedTopk, bool]] = {
    "lowering::grouped_topk": (lambda gating, bias: eager(gating, bias, CONTRACT), CONTRACT, True),
    "lowering::grouped_topk, unbiased": (lambda gating, _: eager(gating, None, SOFTPLUS), SOFTPLUS, False),
    "lowering::grouped_topk, 16 bits": (lambda gating, bias: eager(gating, bias, NARROW), NARROW, True),
    "aiter::biased_grouped_topk": (aiter("aiter::biased_grouped_topk"), CONTRACT, True),
    "aiter::biased_grouped_topk_hip": (aiter("aiter::biased_grouped_topk_hip"), CONTRACT, True),
    "vllm::rocm_aiter_biased_grouped_topk": (aiter("vllm::rocm_aiter_biased_grouped_topk"), CONTRACT, True),
    "aiter::grouped_topk": (grouped("aiter::grouped_topk", True), OF_LARGEST, False),
    "vllm::rocm_aiter_grouped_topk": (grouped("vllm::rocm_aiter_grouped_topk", "softmax"), OF_LARGEST, False),
    "_moe_C::grouped_topk": (
        lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 8, 3, 6, False, 2.5, bias, 1),
        GroupedTopk(6, 8, 3, renormalize=False, routed_scaling_factor=2.5, eps=1e-20),
        True,
    ),
    "_moe_C::grouped_topk, scores given": (
        lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 8, 3, 6, True, 2.5, bias, 0),
        GroupedTopk(6, 8, 3, True, 2.5, 1e-20, "gating"),
        True,
    ),
    "sgl_kernel::moe_fused_gate": (sglang(scaled=True), CONTRACT, True),
    "sgl_kernel::moe_fused_gate, unscaled": (sglang(scaled=False), GroupedTopk(6, 8, 3), True),
    "_moe_C::topk_softmax": (ungrouped("_moe_C::topk_softmax", True), GroupedTopk(6, **SOFTMAX), False),
    "_moe_C::topk_softmax, biased": (
        ungrouped("_moe_C::topk_softmax", False, "bias"),
        GroupedTopk(6, renormalize=False, **SOFTMAX),
        True,
    ),
    "_moe_C::topk_sigmoid": (
        ungrouped("_moe_C::topk_sigmoid", True, "bias", 2.5),
        GroupedTopk(6, routed_scaling_factor=2.5),
        True,
    ),
    "_moe_C::topk_softplus_sqrt": (ungrouped("_moe_C::topk_softplus_sqrt", True, 1.5), SOFTPLUS, False),
    "vllm::rocm_aiter_topk_softmax": (
        ungrouped("vllm::rocm_aiter_topk_softmax", True),
        GroupedTopk(6, **SOFTMAX),
        False,
    ),
    "sgl_kernel::topk_softmax": (
        ungrouped("sgl_kernel::topk_softmax", True, source=False),
        GroupedTopk(6, **SOFTMAX),
        False,
    ),
    "sgl_kernel::topk_sigmoid": (
        ungrouped("sgl_kernel::topk_sigmoid", False, source=False),
        GroupedTopk(6, renormalize=False),
        False,
    ),
}


class Routers(nn.Module):
    """All of them, of one gating and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", (torch.randn(64) * 0.1).bfloat16())

    def forward(self, gating: torch.Tensor) -> Any:
        return [tuple(function(gating, self.bias)) for function, _, _ in NAMED.values()]


@pytest.fixture(scope="module")
def named() -> tuple[Any, list[Any]]:
    """The report of a model that calls every name, and what it and the contracts compute."""
    model, gating = Routers(), torch.randn(9, 64).bfloat16()
    actual, report = compiled(model, gating)
    expected = [
        eager(gating, model.bias if biased else None, contract) for _, contract, biased in NAMED.values()
    ]
    return report, list(zip(actual, expected, strict=True))


def test_by_name_is_one_dispatch(named: tuple[Any, list[Any]]) -> None:
    report, _ = named
    assert [(site.op, site.contract) for site in report.sites] == [
        ("grouped_topk", contract) for _, contract, _ in NAMED.values()
    ]
    assert report.summary() == {"fused": len(NAMED), "unfused": 0, "dispatches": len(NAMED)}


@pytest.mark.parametrize("name", NAMED)
def test_by_name(name: str, named: tuple[Any, list[Any]]) -> None:
    """What the contract says, bit for bit."""
    (weights, ids), expected = named[1][list(NAMED).index(name)]
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert ids.dtype == torch.int32


def test_every_name_has_a_test() -> None:
    assert {row.name for row in grouped_topk.NAMED_OPS} == {name.partition(",")[0] for name in NAMED}


REFUSED = {
    "another bias dtype": (
        aiter("aiter::biased_grouped_topk"),
        "it reads the bias as if it had the gating's dtype, and they have bfloat16 and float32",
    ),
    "unknown scores": (
        lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 8, 3, 6, True, 2.5, bias, 2),
        "scoring_func is 2, which has no meaning here",
    ),
    "a shared expert": (
        lambda gating, bias: tuple(torch.ops.sgl_kernel.moe_fused_gate(gating, bias, 8, 3, 6, 1, 2.5, True)),
        "num_fused_shared_experts is 1, not 0",
    ),
    "a bias taken away again": (
        ungrouped("sgl_kernel::topk_sigmoid", True, "bias", source=False),
        "correction_bias is computed, not None",
    ),
    "capped gating": (
        ungrouped("sgl_kernel::topk_softmax", True, 30.0, None, source=False),
        "moe_softcapping is 30.0, not 0.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_meanings_of_a_name_are_refused(name: str) -> None:
    """In the report with what is wrong; and there is nothing to compile."""
    function, reason = REFUSED[name]
    model, gating = Router(function), torch.randn(9, 64).bfloat16()
    (site,) = lowering.explain(model, (gating,)).sites
    assert (site.op, site.status) == ("grouped_topk", "unfused") and reason in (site.reason or "")
    with pytest.raises(CompileError, match=re.escape(reason)):
        lowering.compile(model, (gating,))


def test_impossible_routing_is_refused_with_its_line() -> None:
    """A library's own operation does not check when it is traced: the compiler does."""
    model = Router(lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 7, 3, 6, True, 2.5, bias, 1))
    report = lowering.explain(model, (torch.randn(9, 64),))
    assert report.sites[0].reason == "num_expert_group: 64 experts do not divide into 7 groups"
    with pytest.raises(CompileError, match=r"test_topk_spellings\.py:\d+: .*num_expert_group: 64 experts"):
        lowering.compile(model, (torch.randn(9, 64),))


# -- written out --------------------------------------------------------------------------------------


EXPERTS = 32
DEEPSEEK = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5}
V3 = GroupedTopk(5, 4, 2, True, 2.5, 1e-20, dropped="least", order="torch_unsorted")
SORTED = {"scores": "softmax", "weights": "choices", "order": "torch"}
V2 = {**SORTED, "renormalize": False, "routed_scaling_factor": 16.0, "order": "torch_unsorted"}


@dataclass(frozen=True)
class HuggingFace:
    """A router of transformers: its family and class, its configuration, and what it computes."""

    family: str
    router: str
    options: dict[str, Any]
    contract: GroupedTopk
    dtype: torch.dtype = torch.float32

    def make(self) -> nn.Module:
        """A router of as many features as experts, whose product leaves them as they are."""
        module = importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")
        name = re.sub("Top[kK]Router", "", self.router)
        options = {"hidden_size": EXPERTS, "num_attention_heads": 4, "num_experts_per_tok": 5}
        config = getattr(transformers, f"{name}Config")(**{**options, **self.options})
        for count in ("num_experts", "num_local_experts"):
            setattr(config, count, EXPERTS)
        router = getattr(module, self.router)(config).eval()
        with torch.no_grad():
            for parameter in router.parameters():
                square = parameter.shape == (EXPERTS, EXPERTS)
                parameter.copy_(torch.eye(EXPERTS) if square else torch.zeros(parameter.shape))
        for buffer in router.buffers():
            torch.nn.init.normal_(buffer, std=0.1)
        return router.to(self.dtype)


HF = {
    "deepseek_v3": HuggingFace(
        "deepseek_v3", "DeepseekV3TopkRouter", {**DEEPSEEK, "routed_scaling_factor": 2.5}, V3
    ),
    "not renormalized": HuggingFace(
        *("deepseek_v3", "DeepseekV3TopkRouter"),
        {**DEEPSEEK, "routed_scaling_factor": 2.5, "norm_topk_prob": False},
        replace(V3, renormalize=False, eps=0.0),
    ),
    "glm4_moe": HuggingFace("glm4_moe", "Glm4MoeTopkRouter", {**DEEPSEEK, "routed_scaling_factor": 2.5}, V3),
    "dots1": HuggingFace(
        "dots1", "Dots1TopkRouter", {**DEEPSEEK, "norm_topk_prob": True, "routed_scaling_factor": 2.5}, V3
    ),
    "deepseek_v2": HuggingFace(
        *("deepseek_v2", "DeepseekV2TopkRouter"),
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        GroupedTopk(5, 4, 2, **V2, group_value="largest", dropped="zero"),
    ),
    "greedy": HuggingFace(
        *("deepseek_v2", "DeepseekV2TopkRouter"),
        {**DEEPSEEK, "topk_method": "greedy", "routed_scaling_factor": 16.0},
        GroupedTopk(5, **V2),
    ),
    "deepseek_v4": HuggingFace(
        *("deepseek_v4", "DeepseekV4TopKRouter"),
        {"routed_scaling_factor": 1.5},
        GroupedTopk(5, routed_scaling_factor=1.5, eps=1e-20, scores="sqrt_softplus", order="torch_unsorted"),
    ),
    "mixtral": HuggingFace("mixtral", "MixtralTopKRouter", {}, GroupedTopk(5, **SORTED), torch.bfloat16),
    "qwen2_moe": HuggingFace(
        "qwen2_moe", "Qwen2MoeTopKRouter", {}, GroupedTopk(5, renormalize=False, **SORTED)
    ),
    "qwen3_moe": HuggingFace(
        *("qwen3_moe", "Qwen3MoeTopKRouter"),
        {"norm_topk_prob": True},
        GroupedTopk(5, **SORTED),
        torch.bfloat16,
    ),
    "olmoe": HuggingFace(
        *("olmoe", "OlmoeTopKRouter"), {}, GroupedTopk(5, renormalize=False, **SORTED), torch.bfloat16
    ),
    "ernie4_5_moe": HuggingFace(
        *("ernie4_5_moe", "Ernie4_5_MoeTopKRouter"),
        {"moe_norm_min": 1e-12},
        GroupedTopk(5, scores="softmax", least_total=1e-12, order="torch"),
        torch.bfloat16,
    ),
    "lfm2_moe": HuggingFace(
        *("lfm2_moe", "Lfm2MoeTopKRouter"),
        {"use_expert_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
        GroupedTopk(
            *(5, 1, 1, True, 1.5, 1e-6),
            **{"weights": "choices", "order": "torch", "score_dtype": "bfloat16", "step_dtype": "bfloat16"},
        ),
        torch.bfloat16,
    ),
    "gpt_oss": HuggingFace(
        *("gpt_oss", "GptOssTopKRouter", {}),
        GroupedTopk(5, renormalize=False, scores="gating", weights="softmax", order="torch"),
        torch.bfloat16,
    ),
}


class AllRouters(nn.Module):
    """One after another, so that they are compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(router.make() for router in HF.values())

    def forward(self, x: torch.Tensor) -> Any:
        return [router(x.to(next(router.parameters()).dtype)) for router in self.routers]


@pytest.fixture(scope="module")
def hugging_face() -> tuple[AllRouters, Any, lowering.Report]:
    model, shapes = AllRouters(), ({0: torch.export.Dim("tokens")},)
    result = lowering.compile(model, (torch.randn(7, EXPERTS),), dynamic_shapes=shapes)
    return model, lowering.load(result.vmfb), result.report


def test_hugging_face_routers_are_one_dispatch_each(hugging_face: Any) -> None:
    _, _, report = hugging_face
    assert [site.contract for site in report.sites] == [router.contract for router in HF.values()]
    assert all(site.fused for site in report.sites)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_hugging_face_routers(hugging_face: Any, tokens: int) -> None:
    """The experts that eager chooses, in its order, among many equals: gating is of few values.

    Weights within the roundings of scores and of their sum in eager, and of the dtype that holds them.
    """
    model, program, _ = hugging_face
    x = (torch.randn(tokens, EXPERTS) * 4).round() / 4
    for name, actual, expected in zip(HF, program(x), model(x), strict=True):
        assert torch.equal(actual[0], expected[0]), name
        assert torch.equal(actual[2], expected[2]) and actual[2].dtype == torch.int64, name
        ulp = 2**-8 if expected[1].dtype == torch.bfloat16 else 2**-20
        assert actual[1].dtype == expected[1].dtype, name
        torch.testing.assert_close(actual[1], expected[1], rtol=ulp, atol=0.0, msg=name)


@pytest.mark.slow
def test_hugging_face_deepseek_v3() -> None:
    """A whole model: every router of it is one dispatch, and its logits are eager's."""
    config = transformers.DeepseekV3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        use_cache=False,
    )
    # Eager experts are a Python loop over those that were chosen, which no export can follow.
    config._experts_implementation = "batched_mm"
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("gate.weight", "e_score_correction_bias")):
            torch.nn.init.normal_(tensor, std=0.5)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens, use_cache=False).logits

    tokens = torch.randint(0, 128, (2, 12))
    with torch.no_grad():
        logits, report = compiled(Logits(), tokens)
        torch.testing.assert_close(logits, Logits()(tokens), rtol=1e-4, atol=1e-5)
    routers = [site for site in report.sites if site.op == "grouped_topk"]
    assert len(routers) == 2 and all(site.fused for site in routers)
    assert all("modeling_deepseek_v3.py" in site.location for site in routers)


def written_out(
    gating: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    score: Callable = torch.sigmoid,
    largest: bool = False,
    fill: float = -torch.inf,
    gathered: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing as SGLang and vLLM write it in PyTorch."""
    scores = score(gating)
    choices = scores if bias is None else scores.view(gating.shape[0], -1) + bias.unsqueeze(0)
    in_groups = choices.view(gating.shape[0], 8, -1)
    values = in_groups.max(dim=-1).values if largest else in_groups.topk(2, dim=-1)[0].sum(dim=-1)
    groups = torch.topk(values, k=3, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(values).scatter_(1, groups, 1)
    mask = mask.unsqueeze(-1).expand(gating.shape[0], 8, 8).reshape(gating.shape[0], -1)
    chosen = torch.topk(choices.masked_fill(~mask.bool(), fill), k=6, dim=-1, sorted=False)
    weights = scores.gather(1, chosen.indices) if gathered else chosen.values
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * 2.5, chosen.indices.to(torch.int32)


def softmax(gating: torch.Tensor) -> torch.Tensor:
    return torch.softmax(gating, dim=-1)


def root_of_softplus(gating: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(gating).sqrt()


def best_of(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest scores, gathered."""
    ids = scores.topk(6, dim=-1)[1]
    return scores.gather(1, ids), ids


def normed_after(gating: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k first, of what is not widened; then a softmax, scaled."""
    values, ids = gating.topk(6, dim=-1, sorted=False)
    return torch.softmax(values.float(), dim=-1) * 2.5, ids


def laid_out(gating: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sigmoid of the chosen, zero for others, as Llama 4 has it."""
    values, ids = gating.topk(3, dim=-1)
    scores = torch.full_like(gating, -torch.inf).scatter_(1, ids, values)
    return torch.sigmoid(scores.float()).to(gating.dtype), ids


def in_one_dtype(
    gating: torch.Tensor, bias: torch.Tensor | None, score: Callable, least: float, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, their sum and quotients of the gating's dtype; choices of the wider of that and the bias's."""
    scores = score(gating)
    ids = torch.topk(scores if bias is None else scores + bias, 6, dim=-1)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True).clamp(min=least) * factor, ids


def chosen_then_widened(gating: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = torch.softmax(gating, dim=-1).topk(6, dim=-1)
    values = values.float()
    return values / values.sum(-1, keepdim=True), ids


IN_16_BITS = {"score_dtype": "bfloat16", "step_dtype": "bfloat16", "order": "torch"}
SERVING: dict[str, tuple[Callable[..., Any], GroupedTopk]] = {
    "biased groups": (
        lambda gating, bias: written_out(gating.float(), bias.float()),
        replace(CONTRACT, dropped="least", order="torch_unsorted"),
    ),
    "dropped at zero": (
        lambda gating, bias: written_out(gating.float(), bias, fill=0.0),
        replace(CONTRACT, dropped="zero", order="torch_unsorted"),
    ),
    "groups of largest softmax": (
        lambda gating, _: written_out(gating.float(), score=softmax, largest=True, fill=0.0, gathered=False),
        GroupedTopk(6, 8, 3, True, 2.5, 0.0, "softmax", "largest", "zero", "choices", "torch_unsorted"),
    ),
    "a softmax with a bias": (
        lambda gating, bias: written_out(gating.float(), bias, score=softmax),
        replace(CONTRACT, scores="softmax", dropped="least", order="torch_unsorted"),
    ),
    "groups of roots of softplus": (
        lambda gating, bias: written_out(gating.float(), bias, score=root_of_softplus),
        replace(CONTRACT, scores="sqrt_softplus", dropped="least", order="torch_unsorted"),
    ),
    "neither groups nor bias": (
        lambda gating, _: best_of(torch.sigmoid(gating.float())),
        GroupedTopk(6, renormalize=False, order="torch"),
    ),
    "a softmax afterwards": (
        lambda gating, _: normed_after(gating),
        GroupedTopk(*(6, 1, 1, False, 2.5), scores="gating", weights="softmax", order="torch_unsorted"),
    ),
    "a sigmoid of the chosen, laid out": (
        lambda gating, _: laid_out(gating),
        GroupedTopk(3, renormalize=False, scores="gating", weights="sigmoid", order="torch"),
    ),
    "a least total": (
        lambda gating, bias: in_one_dtype(gating.float(), bias, softmax, 0.5),
        GroupedTopk(6, scores="softmax", order="torch", least_total=0.5),
    ),
    "16 bits": (
        lambda gating, _: in_one_dtype(gating, None, torch.sigmoid, 5.8, 1.3),
        GroupedTopk(6, routed_scaling_factor=1.3, least_total=5.8, **IN_16_BITS),
    ),
    "16 bits, a bias of float32": (
        lambda gating, bias: in_one_dtype(gating, bias, softmax, 0.0),
        GroupedTopk(6, scores="softmax", least_total=0.0, **IN_16_BITS),
    ),
    "16 bits, a bias too": (
        lambda gating, bias: in_one_dtype(gating, bias.bfloat16(), torch.sigmoid, 0.0),
        GroupedTopk(6, least_total=0.0, choice_dtype="bfloat16", **IN_16_BITS),
    ),
    "groups of 16 bits": (
        lambda gating, bias: written_out(gating, bias.bfloat16()),
        replace(
            CONTRACT, dropped="least", choice_dtype="bfloat16", **IN_16_BITS | {"order": "torch_unsorted"}
        ),
    ),
    "scores rounded, then float32": (
        lambda gating, bias: written_out(
            gating, bias, score=lambda gating: torch.sigmoid(gating.float()).bfloat16().float()
        ),
        replace(CONTRACT, dropped="least", score_dtype="bfloat16", order="torch_unsorted"),
    ),
    "chosen in 16 bits, then widened": (
        lambda gating, _: chosen_then_widened(gating),
        GroupedTopk(6, scores="softmax", weights="choices", score_dtype="bfloat16", order="torch"),
    ),
    "a softmax of 16 bits, scaled": (
        lambda gating, _: ((best := gating.topk(6, dim=-1)).values.softmax(-1) * 2.5, best.indices),
        GroupedTopk(
            *(6, 1, 1, False, 2.5), scores="gating", weights="softmax", step_dtype="bfloat16", order="torch"
        ),
    ),
}


class Serving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(64) * 0.1)

    def forward(self, gating: torch.Tensor) -> Any:
        return [tuple(function(gating, self.bias)) for function, _ in SERVING.values()]


def test_written_out_by_serving_stacks() -> None:
    """The experts that eager chooses in its order; weights within the roundings of its scores and sums."""
    model, gating = Serving(), ((torch.randn(40, 64) * 4).round() / 4).bfloat16()
    actual, report = compiled(model, gating)
    assert report.summary() == {"fused": len(SERVING), "unfused": 0, "dispatches": len(SERVING)}
    assert [site.contract for site in report.sites] == [contract for _, contract in SERVING.values()]
    for name, mine, wanted in zip(SERVING, actual, model(gating), strict=True):
        assert torch.equal(mine[1], wanted[1]), name
        # In 16 bits a sum and three quotients and products are rounded, of which each may fall otherwise.
        ulp = 2**-6 if wanted[0].dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(mine[0], wanted[0], rtol=ulp, atol=0.0, msg=name)


def bounded(gating: torch.Tensor) -> torch.Tensor:
    weights, _ = best_of(softmax(gating))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12, max=0.5)


NEARLY = {
    "scores of float64": (
        lambda gating, bias: written_out(gating.double(), bias),
        "its scores are float64; convert the gating with .float()",
    ),
    "a softplus": (
        lambda gating, bias: written_out(gating, bias, score=torch.nn.functional.softplus),
        "made of a softplus, of which the routing kernel takes the root",
    ),
    "a softmax in float64": (
        lambda gating, _: torch.softmax(gating.topk(6, dim=-1)[0].double(), dim=-1),
        "the values of its chosen experts become weights otherwise than by a softmax or sigmoid",
    ),
    "another softmax axis": (
        lambda gating, _: best_of(torch.softmax(gating, dim=0))[0] * 2,
        "its groups, mask, top-k or weights are not those of the routing kernel",
    ),
}


def test_nearly_this_routing_is_left_alone_and_named() -> None:
    class Nearly(nn.Module):
        def forward(self, gating: torch.Tensor, bias: torch.Tensor) -> Any:
            return [function(gating, bias) for function, _ in NEARLY.values()]

    sites = lowering.explain(Nearly(), (torch.randn(9, 64), torch.randn(64))).sites
    for site, (name, (_, reason)) in zip(sites, NEARLY.items(), strict=True):
        assert (site.op, site.status) == ("grouped_topk", "unfused"), name
        assert reason in (site.reason or ""), name
        assert "test_topk_spellings.py" in site.location


def test_what_is_made_of_weights_is_left_to_others() -> None:
    """A sum with an upper bound is none: the top-k before it is a routing, what follows plain operations."""
    gating = torch.randn(9, 64)
    actual, report = compiled(Router(lambda gating, bias: bounded(gating)), gating)
    assert [site.contract for site in report.sites] == [
        GroupedTopk(6, renormalize=False, scores="softmax", order="torch")
    ]
    torch.testing.assert_close(actual, bounded(gating), rtol=2**-20, atol=0.0)


def test_weights_that_are_rounded_later_are_reported_where_they_were_made() -> None:
    def routed(gating: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = eager(gating, bias, CONTRACT)
        return weights.bfloat16(), ids

    router = Router(routed)
    (plain,) = lowering.explain(Router(lambda *given: eager(*given, CONTRACT)), (torch.randn(9, 64),)).sites
    (rounded,) = lowering.explain(router, (torch.randn(9, 64),)).sites
    assert rounded.fused and rounded.location == plain.location


# -- left to IREE, and reported -----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", pytest.param("sm_90", marks=pytest.mark.slow), "gfx950"])
def test_what_has_no_kernel_is_still_computed(target: str) -> None:
    """The reference becomes plain operations for IREE; on the CPU its weights may differ in the last bits."""
    contract = GroupedTopk(topk=3, num_expert_group=33, topk_group=4)
    most = 2048 if target == "cpu" else 512

    class Wide(nn.Module):
        def forward(self, gating: torch.Tensor, bias: torch.Tensor) -> Any:
            return eager(gating, bias, contract)

    gating, bias = torch.randn(5, 2079), torch.randn(2079) * 0.1
    result = lowering.compile(Wide(), (gating, bias), target=target)
    assert result.report.summary() == {"fused": 0, "unfused": 1, "dispatches": 0}
    reason = f"The routing kernel knows at most {most} experts on {target}, not 2079."
    assert result.report.sites[0].reason == reason
    if target == "cpu":
        weights, ids = lowering.load(result.vmfb)(gating, bias)
        expected = eager(gating, bias, contract)
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(weights, expected[0], rtol=2**-21, atol=0.0)


def test_report_and_dumped_launch(tmp_path: Path) -> None:
    """The contract survives JSON; kernels.json says all that a launch needs."""
    model = Router(lambda gating, bias: eager(gating, bias, CONTRACT))
    result = lowering.compile(model, (torch.randn(9, 64),), target="h200")
    report = lowering.Report.from_json(result.report.to_json())
    assert report == result.report and report.sites[0].contract == CONTRACT
    size = 9 * 64 * 4 + 64 * 4 + 9 * 6 * (4 + 4)
    assert report.sites[0].bytes is not None and report.sites[0].bytes.after == size
    result.dump_kernels(tmp_path)
    (launch,) = json.loads((tmp_path / "kernels.json").read_text())["launches"]
    assert (tmp_path / launch["object"]).is_file() and launch["entry"].startswith("topk6_f32_e64_g8_")
    assert (launch["arch"], launch["grid"], launch["constants"]) == ("sm_90a", [2, 1, 1], [9])
    assert [(b["name"], b["dtype"], b["shape"], b["access"]) for b in launch["bindings"]] == [
        ("gating", "float32", [9, 64], "read"),
        ("bias", "float32", [64], "read"),
        ("weights", "float32", [9, 6], "write"),
        ("ids", "int32", [9, 6], "write"),
    ]
