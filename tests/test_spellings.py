"""What people write, and what it is raised to: spellings, view chains, real model families."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from iree.compiler import ir
from torch import nn
from torch.nn import functional as F

import lowering
from lowering.fuse import fuse
from lowering.importer import import_module
from lowering.normalize import normalize
from lowering.raising import raise_function
from lowering.views import sink_views
from patterns import canonical, torch_ir
from patterns.contracts import GatedActivation, Quantization, RmsNorm
from patterns.sites import Ledger

group_quant = torch.ops.lowering.group_quant
rms_norm = torch.ops.lowering.rms_norm


class Function(nn.Module):
    """A function of tensors, with a weight of 256 elements as its first argument."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(256).to(dtype), requires_grad=False)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self.weight, *args)


def contracts(module: nn.Module, *args: torch.Tensor) -> list[Any]:
    """The contracts of the canonical operations ``module`` is raised to, in order."""
    context = ir.Context()
    program = import_module(module, args, context)
    readers = {
        canonical.RMS_NORM: canonical.norm_contract,
        canonical.GATED_ACTIVATION: canonical.gate_contract,
        canonical.GROUP_QUANT: canonical.quantization,
    }
    with context, ir.Location.unknown():
        function = program.main()
        normalize(function)
        raise_function(function, Ledger())
        ops = [op.operation for op in torch_ir.block_of(function).operations]
        return [readers[name](op) for op in ops if (name := torch_ir.op_name(op)) in readers]


def written_out(x: torch.Tensor, scale_of: Callable, quotient_of: Callable, floor_of: Callable) -> Any:
    """Group quantization as people write it."""
    groups = x.reshape(*x.shape[:-1], -1, 128).float()
    scale = scale_of(floor_of(groups.abs().amax(dim=-1, keepdim=True)))
    q = quotient_of(groups, scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q.reshape(x.shape), scale.squeeze(-1)


@pytest.mark.parametrize(
    ("scale_of", "quotient_of", "floor_of", "expected"),
    [
        (lambda a: a / 448.0, lambda g, s: g / s, lambda a: a.clamp(min=1e-10), {}),
        (
            lambda a: a / 448.0,
            lambda g, s: g * (1.0 / s),
            lambda a: a,
            {"amax_floor": 0.0, "quotient": "reciprocal"},
        ),
        (
            lambda a: a * (1.0 / 448.0),
            lambda g, s: g * torch.reciprocal(s),
            lambda a: torch.maximum(a, torch.tensor(1e-4)),
            {"amax_floor": pytest.approx(1e-4), "scale_division": "reciprocal", "quotient": "reciprocal"},
        ),
    ],
    ids=["divisions", "reciprocal", "products"],
)
def test_group_quantization_written_out(
    scale_of: Callable, quotient_of: Callable, floor_of: Callable, expected: dict[str, Any]
) -> None:
    module = Function(lambda w, x: written_out(rms_norm(x, w, 1e-6), scale_of, quotient_of, floor_of))
    norm, quantization = contracts(module, torch.randn(4, 256, dtype=torch.bfloat16))
    assert norm == RmsNorm(1e-6)
    fields = {**Quantization(128).__dict__, **expected}
    assert quantization.__dict__ == fields


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g, s: (g / s).clamp(-240.0, 240.0),  # not what the scale was made for
        lambda g, s: (g / s).clamp(-448.0, 440.0),
        lambda g, s: (g / (s + 1.0)).clamp(-448.0, 448.0),
    ],
)
def test_nearly_a_group_quantization_is_left_alone(wrong: Callable) -> None:
    def function(w: torch.Tensor, x: torch.Tensor) -> Any:
        groups = x.reshape(4, 2, 128).float()
        scale = groups.abs().amax(dim=-1, keepdim=True) / 448.0
        return wrong(groups, scale).to(torch.float8_e4m3fn), scale

    assert contracts(Function(function), torch.randn(4, 256, dtype=torch.bfloat16)) == []


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
    assert found == [RmsNorm(1e-5, weight_offset=1.0)]


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


def integers(*shape: int) -> torch.Tensor:
    """Small integers: the sum of their squares is exact in any order, so results are equal bit for bit."""
    return torch.randint(-8, 9, shape).to(torch.bfloat16)


def test_a_view_of_the_last_axis_blocks_and_says_so() -> None:
    module = Function(lambda w, x: group_quant(rms_norm(x, w, 1e-6)[..., :128], 128))
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
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize(("config", "more"), FAMILIES.values(), ids=FAMILIES.keys())
def test_every_norm_and_quantization_of_a_family_is_recognised(config: type, more: dict[str, int]) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config(**SMALL, **more)).to(torch.bfloat16).eval()
    quantized = Logits(lowering.quantize(model))
    context, ledger = ir.Context(), Ledger()
    ids = torch.randint(0, 1000, (1, 13))
    program = import_module(
        quantized, (ids,), context, dynamic_shapes=({1: torch.export.Dim("time", max=512)},)
    )
    with context, ir.Location.unknown():
        function = program.main()
        normalize(function)
        raise_function(function, ledger)
        sink_views(function)
        fuse(function, ledger, lambda spec: None)
        left = {torch_ir.op_name(op.operation) for op in torch_ir.block_of(function).operations}
    assert "torch.aten.rsqrt" not in left
    norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
    assert sum(site.op == "rms_norm" for site in ledger.records) == norms > 0
    quantized_layers = sum(isinstance(m, lowering.nn.BlockScaledLinear) for m in model.modules())
    assert sum(site.op == "group_quant" for site in ledger.records) == quantized_layers > 0
    assert [site.reason for site in ledger.records if not site.fused] == []


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
        from patterns.contracts import RmsNorm
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
                contract = RmsNorm(found["eps"])
                return Raised(canonical.RMS_NORM, contract, [found["x"], found["weight"]], [op.result])

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
