"""What people write, and what it is raised to: spellings, view chains, real model families."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import lowering
from patterns.contracts import GatedActivation, Norm, Quantization
from tests.raised import Function, contracts, integers, sites

group_quant = torch.ops.lowering.group_quant
rms_norm = torch.ops.lowering.rms_norm


GATES = {
    "silu": (lambda g, u: F.silu(g) * u, "silu"),
    "silu, up first": (lambda g, u: u * F.silu(g), "silu"),
    "gelu": (lambda g, u: F.gelu(g) * u, "gelu"),
    "gelu_tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, "gelu_tanh"),
}


@pytest.mark.parametrize(("function", "activation"), GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gated_activations(function: Callable, activation: str, dtype: torch.dtype) -> None:
    halves = torch.randn(4, 256).to(dtype), torch.randn(4, 256).to(dtype)
    rounding = "twice" if dtype == torch.bfloat16 else "once"
    two = Function(lambda w, g, u: group_quant(function(g, u), 128))
    expected = GatedActivation(activation, rounding, packed=False)
    assert contracts(two, *halves) == [expected, Quantization(128)]
    one = Function(lambda w, x: group_quant(function(*x.chunk(2, dim=-1)), 128))
    expected = GatedActivation(activation, rounding, packed=True)
    assert contracts(one, torch.cat(halves, -1)) == [expected, Quantization(128)]


def test_a_gate_of_swapped_halves_is_not_packed() -> None:
    def function(w: torch.Tensor, x: torch.Tensor) -> Any:
        up, gate = x.chunk(2, dim=-1)
        return group_quant(F.silu(gate) * up, 128)

    found = contracts(Function(function), torch.randn(4, 512, dtype=torch.bfloat16))
    assert found[0] == GatedActivation("silu", "twice", packed=False)


def test_an_activation_nobody_quantizes_is_left_to_the_code_generator() -> None:
    module = Function(lambda w, g, u: F.silu(g) * u)
    assert contracts(module, torch.randn(4, 256), torch.randn(4, 256)) == []


def test_gemma_multiplies_by_one_plus_the_weight() -> None:
    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (h * (1.0 + w.float())).type_as(x)

    found = contracts(Function(function), torch.randn(4, 256, dtype=torch.bfloat16))
    assert found == [Norm(1e-5, weight_offset=1.0)]


# -- views ----------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda y: y.transpose(0, 1),
    "slice": lambda y: y[:, -1:],
    "select": lambda y: y[:, 0],
    "expand": lambda y: y.unsqueeze(1).expand(-1, 3, -1, -1),
    "heads": lambda y: y.unflatten(-1, (2, 128)).transpose(1, 2),
    "flat": lambda y: y.flatten(0, 1).contiguous(),
    "chain": lambda y: y.unflatten(-1, (2, 128)).permute(2, 0, 1, 3).reshape(-1, 128)[1:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_view_cannot_hide_a_fusion(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = Function(lambda w, x: group_quant(view(rms_norm(x, w, 1e-6)), 128))
    batch, time = torch.export.Dim("batch", max=64), torch.export.Dim("time", min=2, max=64)
    example = torch.randn(3, 5, 256, dtype=torch.bfloat16)
    compiled = lowering.compile(module, (example,), dynamic_shapes=(({0: batch, 1: time},),))
    assert compiled.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}
    program = lowering.load(compiled.vmfb)
    for shape in ((3, 5), (2, 2), (4, 7)):
        x = integers(*shape, 256)
        for ours, eager in zip(program(x), module(x), strict=True):
            assert torch.equal(ours.float(), eager.float())


def test_a_view_of_the_last_axis_blocks_and_says_so() -> None:
    module = Function(lambda w, x: group_quant(rms_norm(x, w, 1e-6)[..., 64:192], 128))
    report = lowering.explain(module, (torch.randn(4, 256, dtype=torch.bfloat16),))
    norm, quant = report.sites
    assert norm.reason is None
    assert quant.reason is not None and "touches the last axis" in quant.reason


# -- whole models -----------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 64}
# Latent attention (norms of the compressed queries and keys), a dense layer, then routed and shared experts.
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
KIMI = {"routed_scaling_factor": 2.827, "norm_topk_prob": True, "rope_theta": 50000.0}
FAMILIES = {
    "Llama": (transformers.LlamaConfig, {}),
    "Qwen2": (transformers.Qwen2Config, {}),
    "Qwen3": (transformers.Qwen3Config, HEADS),
    "Mistral": (transformers.MistralConfig, HEADS),
    "Gemma2": (transformers.Gemma2Config, HEADS),
    "Gemma3": (transformers.Gemma3TextConfig, HEADS),
    "Phi3": (transformers.Phi3Config, {}),
    "Olmo2": (transformers.Olmo2Config, {}),
    "Glm4": (transformers.Glm4Config, HEADS),
    "Granite": (transformers.GraniteConfig, {}),
    "DeepSeek-V3": (transformers.DeepseekV3Config, DEEPSEEK),
    # One group of experts, another scaling: what Kimi K2 changes.
    "Kimi-K2": (transformers.DeepseekV3Config, {**DEEPSEEK, "n_group": 1, "topk_group": 1, **KIMI}),
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def family(name: str, dtype: torch.dtype, **fewer: int) -> tuple[nn.Module, nn.Module]:
    """A small model of the family with random weights, and the same with its linear layers quantized."""
    config, more = FAMILIES[name]
    small = config(**{**SMALL, **more, **fewer})
    model = transformers.AutoModelForCausalLM.from_config(small).to(dtype).eval()
    return model, Logits(lowering.quantize(model))


TIME = ({1: torch.export.Dim("time", max=512)},)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_and_quantization_of_a_family_is_recognised(name: str) -> None:
    # A layer with experts where there are any; test_block_fp8 has one of each kind.
    model, quantized = family(name, torch.bfloat16, num_hidden_layers=1, first_k_dense_replace=0)
    records = sites(quantized, torch.randint(0, 1000, (1, 13))).records  # of any length: below
    norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
    assert sum(site.op == "rms_norm" for site in records) == norms > 0
    quantized_layers = sum(isinstance(m, lowering.nn.BlockScaledLinear) for m in model.modules())
    assert sum(site.op == "group_quant" for site in records) == quantized_layers > 0
    assert [site.reason for site in records if not site.fused] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_eager_computes(name: str) -> None:
    """In float32, to the tolerances that test_compile explains for Llama: most logits to 1e-5 of their range.

    A difference in a last place can decide how one value rounds to fp8, or which expert a token goes to; what
    lies behind it then moves by up to about 2%.
    """
    model, quantized = family(name, torch.float32, num_hidden_layers=1, first_k_dense_replace=0)
    # Experts as products of gathered weights: nothing in IREE lowers the default's grouped product.
    model.set_experts_implementation("batched_mm")
    compiled = lowering.compile(quantized, (torch.zeros(1, 13, dtype=torch.long),), dynamic_shapes=TIME)
    assert not compiled.report.unfused
    program, errors = lowering.load(compiled.vmfb), []
    for tokens in (13, 1, 30):
        ids = torch.randint(0, 1000, (1, tokens))
        with torch.no_grad():
            expected = quantized(ids)
        got = program(ids)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        errors.append(((got - expected).abs() / (expected.max() - expected.min())).flatten())
    assert torch.cat(errors).max() <= 5e-2
    assert torch.cat(errors).median() <= 1e-5


# -- from outside -------------------------------------------------------------------------------------------


def test_a_recogniser_from_a_file(tmp_path: Path) -> None:
    """A norm written with division by a square root, which the built-in recognisers do not know."""

    def function(w: torch.Tensor, x: torch.Tensor) -> Any:
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w
        return group_quant(y, 128)

    module, x = Function(function, torch.float32), torch.randn(4, 256)
    norm, _ = lowering.explain(module, (x,)).sites
    assert norm.op == "rms_norm" and "divides by a square root" in (norm.reason or "")
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent("""
        from patterns import canonical
        from patterns.contracts import Norm
        from patterns.match import ANY, Const, Is, Op, Var, first_match
        from patterns.recogniser import Raised

        X = Var("x")
        MEAN = Op("torch.aten.mean.dim", Op("torch.aten.mul.Tensor", X, X), Is([-1]), Is(True), ANY)
        ROOT = Op("torch.aten.sqrt", Op("torch.aten.add.Scalar", MEAN, Const("eps"), Is(1)))
        NORM = Op("torch.aten.mul.Tensor", Op("torch.aten.div.Tensor", X, ROOT), Var("weight"))

        class DividedNorm:
            roots = ("torch.aten.mul.Tensor",)

            def recognise(self, op):
                found = first_match(NORM, op.result)
                if found is None:
                    return None
                contract = Norm(found["eps"])
                return Raised(canonical.NORM, contract, [found["x"], found["weight"]], [op.result])

        RECOGNISERS = (DividedNorm(),)
        """)
    )
    compiled = lowering.compile(module, (x,), patterns=[file])
    assert [(site.op, site.pattern) for site in compiled.report.sites] == [
        ("rms_norm", "norm_quant"),
        ("group_quant", "norm_quant"),
    ]
    assert compiled.report.to_json() == lowering.explain(module, (x,), patterns=[file]).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such Python file"),
        ("1 +", "does not import: SyntaxError"),
        ("x = 1", "holds no RECOGNISERS"),
    ],
)
def test_a_bad_file_of_patterns_is_a_usage_error(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(lowering.UsageError, match=message):
        lowering.explain(nn.ReLU(), (torch.randn(4),), patterns=[file])
