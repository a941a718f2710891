"""Grouped top-k routing in models: by other libraries' names, written out, left to IREE; compiled and run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
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
    gating: torch.Tensor, bias: torch.Tensor, contract: GroupedTopk
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


NAMED: dict[str, tuple[Callable[..., Any], GroupedTopk]] = {
    "lowering::grouped_topk": (lambda gating, bias: eager(gating, bias, CONTRACT), CONTRACT),
    "aiter::biased_grouped_topk": (aiter("aiter::biased_grouped_topk"), CONTRACT),
    "aiter::biased_grouped_topk_hip": (aiter("aiter::biased_grouped_topk_hip"), CONTRACT),
    "vllm::rocm_aiter_biased_grouped_topk": (aiter("vllm::rocm_aiter_biased_grouped_topk"), CONTRACT),
    "_moe_C::grouped_topk": (
        lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 8, 3, 6, False, 2.5, bias, 1),
        GroupedTopk(6, 8, 3, renormalize=False, routed_scaling_factor=2.5, eps=1e-20),
    ),
    "sgl_kernel::moe_fused_gate": (sglang(scaled=True), CONTRACT),
    "sgl_kernel::moe_fused_gate, unscaled": (sglang(scaled=False), GroupedTopk(6, 8, 3)),
}


@pytest.mark.parametrize("name", NAMED)
def test_by_name(name: str) -> None:
    """One dispatch, which computes what the contract says, bit for bit."""
    function, contract = NAMED[name]
    gating = torch.randn(9, 64).bfloat16()
    model = Router(function, torch.bfloat16)
    (weights, ids), report = compiled(model, gating)
    assert report.summary() == {"fused": 1, "unfused": 0, "dispatches": 1}
    assert (report.sites[0].op, report.sites[0].contract) == ("grouped_topk", contract)
    expected = eager(gating, model.bias, contract)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert ids.dtype == torch.int32


def test_every_name_has_a_test() -> None:
    assert {row.name for row in grouped_topk.NAMED_OPS} == {name.partition(",")[0] for name in NAMED}


@pytest.mark.parametrize(
    "function",
    [
        aiter("aiter::biased_grouped_topk"),  # reads a float32 bias as if it were bfloat16
        lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 8, 3, 6, True, 2.5, bias, 0),
        lambda gating, bias: tuple(torch.ops.sgl_kernel.moe_fused_gate(gating, bias, 8, 3, 6, 1, 2.5, True)),
    ],
    ids=["another bias dtype", "scores given", "a shared expert"],
)
def test_other_meanings_of_a_name_are_left_alone(function: Callable[..., Any]) -> None:
    report = lowering.explain(Router(function), (torch.randn(9, 64).bfloat16(),))
    assert report.sites == ()


def test_impossible_routing_is_refused_with_its_line() -> None:
    """A library's own operation does not check when it is traced: the compiler does."""
    model = Router(lambda gating, bias: torch.ops._moe_C.grouped_topk(gating, 7, 3, 6, True, 2.5, bias, 1))
    report = lowering.explain(model, (torch.randn(9, 64),))
    assert report.sites[0].reason == "num_expert_group: 64 experts do not divide into 7 groups"
    with pytest.raises(CompileError, match=r"test_topk_spellings\.py:\d+: .*num_expert_group: 64 experts"):
        lowering.compile(model, (torch.randn(9, 64),))


# -- written out --------------------------------------------------------------------------------------


def assert_same_routing(actual: tuple, expected: tuple) -> None:
    """The same experts, whatever their order, with weights that agree within the rounding of a sum."""
    for weights, ids in (actual, expected):
        assert weights.dtype == torch.float32 and ids.dtype in (torch.int32, torch.int64)
    order, wanted = actual[1].argsort(-1), expected[1].argsort(-1)
    assert torch.equal(actual[1].gather(-1, order).long(), expected[1].gather(-1, wanted).long())
    torch.testing.assert_close(
        actual[0].gather(-1, order), expected[0].gather(-1, wanted), rtol=2**-21, atol=0.0
    )


ROUTERS = {
    "deepseek_v3": "DeepseekV3TopkRouter",
    "glm4_moe": "Glm4MoeTopkRouter",
    "dots1": "Dots1TopkRouter",
}


@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_hugging_face_routers(family: str, renormalize: bool) -> None:
    """The router of each is its matrix product and one dispatch, for any number of tokens."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(module, ROUTERS[family].removesuffix("TopkRouter") + "Config")(
        hidden_size=48, n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=5
    )
    config.num_local_experts, config.norm_topk_prob, config.routed_scaling_factor = 32, renormalize, 2.5
    router = getattr(module, ROUTERS[family])(config).eval()
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.1)
    shapes = ({0: torch.export.Dim("tokens")},)
    result = lowering.compile(router, (torch.randn(7, 48),), dynamic_shapes=shapes)
    (site,) = result.report.sites
    eps = 1e-20 if renormalize else 0.0
    assert site.fused and site.contract == GroupedTopk(5, 4, 2, renormalize, 2.5, eps)
    program = lowering.load(result.vmfb)
    for tokens in (1, 7, 64):
        x = torch.randn(tokens, 48)
        logits, *actual = program(x)
        expected_logits, *expected = router(x)
        torch.testing.assert_close(logits, expected_logits)
        assert_same_routing(tuple(actual), tuple(expected))
        assert actual[1].dtype == torch.int64


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
    gating: torch.Tensor, bias: torch.Tensor, *, sigmoid: Callable = torch.sigmoid, fill: float = -torch.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing as SGLang and vLLM write it in PyTorch."""
    scores = sigmoid(gating)
    choices = scores.view(gating.shape[0], -1) + bias.unsqueeze(0)
    values = choices.view(gating.shape[0], 8, -1).topk(2, dim=-1)[0].sum(dim=-1)
    groups = torch.topk(values, k=3, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(values).scatter_(1, groups, 1)
    mask = mask.unsqueeze(-1).expand(gating.shape[0], 8, 8).reshape(gating.shape[0], -1)
    ids = torch.topk(choices.masked_fill(~mask.bool(), fill), k=6, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * 2.5, ids.to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_out_by_serving_stacks(dtype: torch.dtype) -> None:
    model = Router(lambda gating, bias: written_out(gating.float(), bias.float()), torch.bfloat16)
    gating = torch.randn(9, 64).to(dtype)
    actual, report = compiled(model, gating)
    assert report.summary() == {"fused": 1, "unfused": 0, "dispatches": 1}
    assert report.sites[0].contract == CONTRACT
    assert_same_routing(actual, model(gating))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sigmoid": lambda gating: torch.sigmoid(gating.bfloat16()).float()}, "rounded to bfloat16 before"),
        ({"sigmoid": lambda gating: torch.softmax(gating, dim=-1)}, "its scores are a softmax"),
        ({"fill": 0.0}, "its groups, mask or top-k are not those of the routing kernel"),
    ],
    ids=["scores rounded", "softmax", "dropped groups at zero"],
)
def test_nearly_this_routing_is_left_alone_and_named(options: dict[str, Any], reason: str) -> None:
    model = Router(lambda gating, bias: written_out(gating, bias, **options))
    (site,) = lowering.explain(model, (torch.randn(9, 64),)).sites
    assert (site.op, site.status) == ("grouped_topk", "unfused")
    assert site.reason is not None and reason in site.reason
    assert "test_topk_spellings.py" in site.location


def test_a_choice_without_a_bias_has_no_kernel() -> None:
    """The largest scores, gathered."""

    def largest(gating: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = torch.sigmoid(gating)
        return scores.gather(1, scores.topk(6, dim=-1)[1])

    (site,) = lowering.explain(Router(largest), (torch.randn(9, 64),)).sites
    assert (site.op, site.status) == ("grouped_topk", "unfused")
    assert "no bias is added to its scores" in (site.reason or "")


# -- left to IREE, and reported -----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", pytest.param("sm_90", marks=pytest.mark.slow), "gfx950"])
def test_what_has_no_kernel_is_still_computed(target: str) -> None:
    """The reference becomes plain operations for IREE; on the CPU its weights may differ in the last bits."""
    contract = GroupedTopk(topk=3, num_expert_group=33, topk_group=4)

    class Wide(nn.Module):
        def forward(self, gating: torch.Tensor, bias: torch.Tensor) -> Any:
            return eager(gating, bias, contract)

    gating, bias = torch.randn(5, 66), torch.randn(66) * 0.1
    result = lowering.compile(Wide(), (gating, bias), target=target)
    assert result.report.summary() == {"fused": 0, "unfused": 1, "dispatches": 0}
    assert result.report.sites[0].reason == "The routing kernel knows at most 32 groups, not 33."
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
