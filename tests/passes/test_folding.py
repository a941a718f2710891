"""What depends on parameters alone is computed once: what is folded, and what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import iree.compiler.tools as iree
import pytest
import torch
from iree.compiler import ir
from torch import Tensor, nn

import lowering
from lowering.errors import CompileError
from lowering.importing.importer import Program, import_module
from lowering.passes.fold import SMALL, fold
from lowering.passes.normalize import normalize
from lowering.report.sites import Change
from lowering.weights.recipes import Recipe
from patterns import torch_ir

THIS = Path(__file__).name


def folded(module: nn.Module, *args: Tensor, **options) -> Program:
    """The program of ``module``, with everything that is not folding left out."""
    context = ir.Context()
    program = import_module(module, args, context, **options)
    with context, ir.Location.unknown():
        normalize(program.main())
        fold(program)
    return program


def values(program: Program) -> dict[str, Tensor]:
    """What the archive of ``program`` would hold."""
    return {n: t.evaluate() if isinstance(t, Recipe) else t for n, t in program.parameters.items()}


def names_of(program: Program) -> list[str]:
    """The torch operations that are left, without constants."""
    block = torch_ir.block_of(program.main())
    names = [torch_ir.op_name(op.operation) for op in block.operations]
    return [n.removeprefix("torch.") for n in names if re.match(r"torch\.(aten|prims|lowering)\.", n)]


def readers_of_parameters(program: Program) -> list[str]:
    """The operations that read a parameter."""
    operations = [op.operation for op in torch_ir.block_of(program.main()).operations]
    read = [op.result for op in operations if op.name == "torch_c.from_builtin_tensor"]
    return [torch_ir.op_name(user) for value in read for user in torch_ir.users(value)]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, type and shape included."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


class Computes(nn.Module):
    """A parameter or two, and a function of the input and of them."""

    def __init__(self, function, **tensors: Tensor):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor):
        return self.function(x, **dict(self.named_buffers()))


# --- the router --------------------------------------------------------------------------------------------

EXPERTS, KEPT = 256, 8


def distinct_biases() -> Tensor:
    """256 values that differ in float32, and are a handful in bfloat16."""
    bias = 1 + torch.randperm(EXPERTS) * 2.0**-14
    assert len(bias.unique()) == EXPERTS and len(bias.bfloat16().unique()) < 8
    return bias


def dispatches(phases: Path) -> list[str]:
    """The kernels IREE makes of a dumped program, called as any tool calls it."""
    [source] = phases.glob("*-linalg.mlir")
    flow = iree.compile_str(source.read_text(), extra_args=["--iree-input-type=none", "--compile-to=flow"])
    _, _, main = flow.decode().partition("util.func public @main$async(")
    called = main.partition("util.return")[0]
    assert called
    return re.findall(r"flow\.dispatch @\S+::@([^\s\[(]+)", called)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_correction_bias_is_cast_when_compiling_and_rounded_only_where_the_source_rounds(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """In a 16-bit gate the biases collapse, and must; in a float32 gate they must not, or routing changes."""
    bias = distinct_biases()
    model = Computes(lambda x, bias: x + bias.to(x.dtype), bias=bias)
    scores = torch.full((4, EXPERTS), 0.5, dtype=dtype) + torch.randn(4, 1).to(dtype)
    compiled = lowering.compile(model, (scores,), dump_phases_to=tmp_path)
    choice, expected = lowering.load(compiled.vmfb)(scores), model(scores)
    assert same(choice, expected)
    if dtype == torch.float32:
        assert not compiled.report.folded
        chosen = expected.topk(KEPT).indices
        assert torch.equal(choice.topk(KEPT).indices, chosen)
        rounded = (scores + bias.bfloat16()).topk(KEPT).indices
        assert not torch.equal(rounded.sort().values, chosen.sort().values)
    else:
        [value] = compiled.report.folded
        assert (value.name, value.sources, value.operations) == ("bias.folded", ("bias",), ("to(bfloat16)",))
        assert value.bytes == Change(4 * EXPERTS, 2 * EXPERTS) and value.saved == 6 * EXPERTS
        assert "convert_element_type" in (tmp_path / "1-normalize.mlir").read_text()
        assert "convert_element_type" not in (tmp_path / "6-fold.mlir").read_text()
    text = (tmp_path / "9-linalg.mlir").read_text()
    assert (
        "arith.truncf" not in re.sub(r"(?s)^.*?tensor<4x256xbf16>", "", text).partition("linalg.generic")[0]
    )
    assert len(dispatches(tmp_path)) == 1


ROUTING = {"topk": KEPT, "num_expert_group": 8, "topk_group": 4, "renormalize": True}


def routed(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.lowering.grouped_topk(x, bias, **ROUTING)


def test_routing_with_a_cast_bias_is_one_dispatch_and_goes_where_the_source_goes(tmp_path: Path) -> None:
    model = Computes(lambda x, bias: routed(x, bias.to(x.dtype)), bias=distinct_biases())
    gating = torch.randn(64, EXPERTS).bfloat16() / 64
    compiled = lowering.compile(model, (gating,), dump_phases_to=tmp_path)
    [value] = compiled.report.folded
    assert value.operations == ("to(bfloat16)",) and len(dispatches(tmp_path)) == 1
    weights, ids = lowering.load(compiled.vmfb)(gating)
    assert same(weights, model(gating)[0]) and torch.equal(ids, model(gating)[1])
    assert not torch.equal(ids, routed(gating, model.bias)[1])  # the rounding is the source's, and is seen


def test_routing_with_a_float32_bias_is_not_rounded(tmp_path: Path) -> None:
    """The gate is 16-bit, its bias is not cast, and nothing casts it here either."""
    model = Computes(routed, bias=distinct_biases())
    gating = torch.randn(64, EXPERTS).bfloat16() / 64
    compiled = lowering.compile(model, (gating,), dump_phases_to=tmp_path)
    assert not compiled.report.folded and len(dispatches(tmp_path)) == 1
    weights, ids = lowering.load(compiled.vmfb)(gating)
    assert same(weights, model(gating)[0]) and torch.equal(ids, model(gating)[1])


def test_a_router_of_deepseek_reads_its_parameters_as_they_are_stored(tmp_path: Path) -> None:
    """Hugging Face's: the gate's weight is cast to float32 in every forward, the bias already is float32."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(hidden_size=64, n_routed_experts=EXPERTS, n_group=8, topk_group=4)
    router = DeepseekV3TopkRouter(config).to(torch.bfloat16)
    router.e_score_correction_bias = nn.Buffer(distinct_biases())
    # Whole numbers of 2^-12: the logits, and so the routing, are the same in any order of summation.
    router.weight.data = torch.randint(-9, 10, router.weight.shape).bfloat16() / 1024
    hidden = torch.randint(-9, 10, (32, 64)).bfloat16() / 4
    program = folded(router, hidden)
    assert not [op for op in readers_of_parameters(program) if "convert_element_type" in op]
    stored = values(program)
    assert same(stored["e_score_correction_bias"], router.e_score_correction_bias)
    assert same(stored["weight.folded"], router.weight.detach().float()) and "weight" not in stored
    compiled = lowering.compile(router, (hidden,))
    with torch.no_grad():
        logits, weights, ids = router(hidden)
    got_logits, got_weights, got_ids = lowering.load(compiled.vmfb)(hidden)
    assert same(got_logits, logits)
    assert torch.equal(got_ids.sort().values, ids.sort().values)
    assert torch.allclose(got_weights.sort().values, weights.sort().values, rtol=1e-6)


def test_a_gate_too_large_to_be_widened_is_widened_inside_its_product(tmp_path: Path) -> None:
    """Storing it in float32 would double what every call reads; IREE casts it as the product reads it."""
    weight = torch.randn(EXPERTS, SMALL // EXPERTS).bfloat16()
    model = Computes(lambda x, weight: nn.functional.linear(x.float(), weight.float()), weight=weight)
    x = torch.randn(2, weight.shape[1]).bfloat16()
    compiled = lowering.compile(model, (x,), dump_phases_to=tmp_path)
    assert not compiled.report.folded
    [product] = dispatches(tmp_path)
    assert product.endswith("bf16xbf16xf32")


# --- what is folded ----------------------------------------------------------------------------------------


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def shuffled(w: Tensor) -> Tensor:
    """The (16, 16) layout of 1-byte weights."""
    n, k = w.shape
    return w.view(n // 16, 16, k // 32, 2, 16).permute(0, 2, 3, 1, 4).reshape(n, k)


FOLDS = {
    "cast": (lambda x, w: x.bfloat16() @ w.bfloat16(), lambda w: w.bfloat16()),
    "transpose": (lambda x, w: x @ w.t(), lambda w: w.t()),
    "concatenation": (lambda x, w, v: x @ torch.cat([w, v], 1), lambda w, v: torch.cat([w, v], 1)),
    "concatenation and transpose": (
        lambda x, w, v: x @ torch.cat([w, v]).t(),
        lambda w, v: torch.cat([w, v]).t(),
    ),
    "shuffle": (lambda x, w: x @ shuffled(w), shuffled),
    "arithmetic": (lambda x, w, v: x @ (w * 0.1 + v / 3).sqrt(), lambda w, v: (w * 0.1 + v / 3).sqrt()),
    "one of several results": (lambda x, w: x @ w.sort(0)[0], lambda w: w.sort(0)[0]),
    "rescaled": (
        lambda x, w: x @ (w / w.abs().amax(1, keepdim=True).clamp(min=1e-4)),
        lambda w: w / w.abs().amax(1, keepdim=True).clamp(min=1e-4),
    ),
}


@pytest.mark.parametrize("kind", FOLDS)
def test_what_depends_on_parameters_alone_is_stored_in_its_final_form(kind: str) -> None:
    function, final = FOLDS[kind]
    tensors = {"w": weight(64, 64), "v": weight(64, 64)}
    tensors = {name: tensors[name] for name in final.__code__.co_varnames[: final.__code__.co_argcount]}
    program = folded(Computes(function, **tensors), torch.randn(5, 64))
    [(name, value)] = values(program).items()
    assert name == "w.folded" and value.is_contiguous() and same(value, final(**tensors))
    assert names_of(program) in (["aten.mm"], ["prims.convert_element_type", "aten.mm"])
    [told] = program.folded
    assert told.sources == tuple(tensors) and re.match(rf".*/{THIS}:\d+$", told.location)
    assert told.bytes == Change(sum(t.nbytes for t in tensors.values()), value.nbytes)


def test_quantizing_a_weight_in_the_model_stores_codes_and_scales() -> None:
    """The quantization of a weight is an operation on parameters like any other, and no site."""

    def product(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        codes, scale = torch.ops.lowering.group_quant(w, 32)
        y = torch.ops.lowering.rms_norm(x, g.pow(2), 1e-6)
        normed = w.float() * torch.rsqrt(w.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return *torch.ops.lowering.group_quant(y, 32), codes, scale, y @ normed

    model = Computes(product, w=weight(64, 64), g=torch.rand(64))
    x = torch.randn(2, 64)
    compiled = lowering.compile(model, (x,))
    assert [site.op for site in compiled.report.sites] == ["rms_norm", "group_quant"]
    assert compiled.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}
    assert len(compiled.report.folded) == 4
    _, _, codes, scale, _ = lowering.load(compiled.vmfb)(x)
    expected = torch.ops.lowering.group_quant(model.w, 32)
    assert same(codes, expected[0]) and same(scale, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool])
def test_values_of_every_kind_of_dtype_run(dtype: torch.dtype) -> None:
    """What is stored is read back as what it is: bools as bytes, fp8 in its own type."""
    w = torch.randn(32, 48) * 20
    # An expand to the size of an argument keeps the last cast out of the folded part.
    model = Computes(lambda x, w: x + w.to(dtype).t().expand(x.shape[0], 48, 32).to(torch.float32), w=w)
    x = torch.randn(3, 48, 32)
    compiled = lowering.compile(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    [value] = compiled.report.folded
    assert value.bytes == Change(w.nbytes, w.numel() * dtype.itemsize)
    assert torch.equal(lowering.load(compiled.vmfb)(x), model(x))


def test_tables_made_of_constants_are_stored_and_constant_fills_are_not() -> None:
    def rotate(x: Tensor, frequencies: Tensor) -> tuple[Tensor, ...]:
        angles = torch.arange(16).float()[:, None] * frequencies
        return x * angles.cos(), x * angles.sin(), x + torch.arange(8), x * torch.full((8,), 0.5)

    model = Computes(rotate, frequencies=torch.rand(8))
    x = torch.randn(16, 8)
    program = folded(model, x)
    assert [value.operations[-1] for value in program.folded] == ["cos", "sin"]
    assert {"aten.cos", "aten.sin"}.isdisjoint(names_of(program))
    # The angles are computed once in the account of what is saved, with the first.
    first, second = program.folded
    assert first.saved > second.saved == 2 * 16 * 8 * 4
    compiled = lowering.load(lowering.compile(model, (x,)).vmfb)
    assert all(same(got, expected) for got, expected in zip(compiled(x), model(x), strict=True))


def test_equal_values_are_stored_once() -> None:
    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x @ w.t().bfloat16(), (x * 2) @ w.t().bfloat16(), x @ w.t().half().bfloat16()

    program = folded(Computes(twice, w=weight(64, 64)), weight(2, 64, dtype=torch.bfloat16))
    assert sorted(values(program)) == ["w.folded", "w.folded.2"]
    assert [value.bytes.before for value in program.folded] == [4 * 64 * 64, 0]


def test_zeros_of_both_signs_and_numbers_of_two_types_are_not_equal() -> None:
    def signed(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x + w * 0.0, x + w * -0.0, x + (w.int() + 1) * 1.0, x + (w.int() + 1) * 1

    model = Computes(signed, w=torch.rand(8))
    program = folded(model, torch.zeros(8))
    plus, minus, floating, integer = values(program).values()
    assert not plus.signbit().any() and minus.signbit().all()
    assert (floating.dtype, integer.dtype) == (torch.float32, torch.int32)


def test_a_tied_weight_stays_shared() -> None:
    """Both names are one parameter, and both uses of its transpose are one value."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(64, 64))
            self.b = self.a

        def forward(self, x: Tensor):
            return x @ self.a.t(), x @ self.b.t()

    [(name, value)] = values(folded(Tied(), torch.randn(2, 64))).items()
    assert name in ("a.folded", "b.folded") and value.shape == (64, 64)


# --- what is not -------------------------------------------------------------------------------------------

LARGE = 1024  # a square of float32 takes four times what is small


LEFT = {
    "widened": lambda x, w: x @ w.float(),
    "broadcast": lambda x, w: x.bfloat16()[:, None] + w.unsqueeze(0).expand(2, LARGE, LARGE) * 2,
    "read by something else": lambda x, w: (x.bfloat16() @ w.t(), x.bfloat16() @ w),
    "copies": lambda x, w: x.bfloat16() @ torch.cat([w, w * 2]).t(),
}


@pytest.mark.parametrize("why", LEFT)
def test_nothing_is_folded_that_would_take_more_room(why: str) -> None:
    model = Computes(LEFT[why], w=weight(LARGE, LARGE, dtype=torch.bfloat16))
    program = folded(model, torch.randn(2, LARGE))
    assert not program.folded and list(program.parameters) == ["w"]


def test_views_of_a_parameter_are_left_to_the_program() -> None:
    """They cost nothing there; stored, a broadcast would take its full size."""

    def views(x: Tensor, b: Tensor) -> Tensor:
        return x + b.view(1, 8, 8).expand(4, 8, 8) + b.half().unsqueeze(0).expand(4, 64).view(4, 8, 8)

    program = folded(Computes(views, b=torch.rand(64)), torch.randn(4, 8, 8))
    [told] = program.folded
    assert told.bytes == Change(0, 128) and told.operations == ("to(float16)",)
    assert sorted(t.numel() for t in values(program).values()) == [64, 64]


@pytest.mark.parametrize("size", [64, LARGE])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantized_weight_stays_quantized_and_its_scales_are_prepared(
    size: int, dtype: torch.dtype
) -> None:
    """At any size: what a call reads are the codes.  What is done to the scales alone is done once."""

    def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        full = (1 / scale).t().contiguous().repeat_interleave(size // 2, 0).repeat_interleave(size // 2, 1)
        return x @ (codes.to(torch.bfloat16) * full.to(torch.bfloat16))

    codes = (torch.randn(size, size) * 9).to(dtype)
    model = Computes(product, codes=codes, scale=torch.rand(2, 2) + 0.5)
    program = folded(model, weight(2, size, dtype=torch.bfloat16))
    stored = values(program)
    assert same(stored.pop("codes"), codes)
    assert all(name.startswith("scale.folded") and value.nbytes <= SMALL for name, value in stored.items())
    assert len(stored) == len(program.folded) == 1
    assert "aten.reciprocal" not in names_of(program)


def test_random_numbers_and_inputs_are_never_folded() -> None:
    def noisy(x: Tensor, w: Tensor) -> Tensor:
        return x + torch.rand_like(w) * w + x.sum() * w

    program = folded(Computes(noisy, w=torch.rand(8)), torch.randn(8))
    assert not program.folded and list(program.parameters) == ["w"]


def test_a_norm_keeps_its_weight_as_it_is_stored(tmp_path: Path) -> None:
    """A kernel adds Gemma's offset to the 16-bit weight itself, and reads half of what a float32 sum is."""

    class Gemma(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(256).bfloat16())

        def forward(self, x: Tensor):
            h = x.float()
            y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight.float())
            return torch.ops.lowering.group_quant(y.to(x.dtype), 128)

    compiled = lowering.compile(
        Gemma(), (weight(4, 256, dtype=torch.bfloat16),), dump_phases_to=tmp_path, parameters=tmp_path / "p"
    )
    assert compiled.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}
    assert not compiled.report.folded
    assert "tensor<256xbf16>" in (tmp_path / "8-expand.mlir").read_text()
    assert b"weightbfloat16[256]" in (tmp_path / "p").read_bytes()


def test_what_takes_too_much_memory_is_folded_in_parts() -> None:
    """Of 32 MiB each, both products and their sum are more than twice one of them; one product is not."""

    def combined(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return x + (a * b + c * d)

    tensors = {name: torch.empty(8 << 20) for name in "abcd"}
    program = folded(Computes(combined, **tensors), torch.empty(8 << 20))
    recipes = [recipe for recipe in program.parameters.values() if isinstance(recipe, Recipe)]
    assert [value.operations for value in program.folded] == [("mul",), ("mul",)]
    assert [recipe.memory for recipe in recipes] == [32 << 20, 32 << 20]


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x, w: x + w * 2, 1),
        (lambda x, w: x + (w * 2 + 1), 2),
        (lambda x, w: x + (w * 2 + 1) * 3, 2),  # the first is gone when the third is made
        (lambda x, w: x + (w * 2).t(), 2),  # a transposed view of the product, and its copy
        (lambda x, w: x + w.t(), 1),
    ],
)
def test_the_memory_a_value_takes_is_known_before_it_is_made(function, tensors: int) -> None:
    program = folded(Computes(function, w=torch.empty(64, 64)), torch.empty(64, 64))
    [recipe] = program.parameters.values()
    assert isinstance(recipe, Recipe) and recipe.memory == tensors * 4 * 64 * 64


def test_what_nothing_reads_is_not_stored() -> None:
    def one(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        unused = v * 2  # noqa: F841
        return x @ w

    assert list(folded(Computes(one, w=weight(8, 8), v=weight(8)), torch.randn(1, 8)).parameters) == ["w"]


def test_what_cannot_be_computed_is_refused_with_its_line() -> None:
    model = Computes(lambda x, w: x + w // (w - w), w=torch.arange(8))
    with pytest.raises(CompileError, match="depends on parameters alone, and cannot be computed") as caught:
        lowering.compile(model, (torch.zeros(8),))
    assert f"{THIS}:" in str(caught.value) and "ZeroDivisionError" in str(caught.value)


# --- the report --------------------------------------------------------------------------------------------


def test_explain_and_compile_report_the_same() -> None:
    model, x = Computes(FOLDS["concatenation"][0], w=weight(64, 64), v=weight(64, 64)), torch.randn(3, 64)
    compiled = lowering.compile(model, (x,)).report
    assert lowering.explain(model, (x,)).folded == compiled.folded != ()
    [written] = json.loads(compiled.to_json())["folded"]
    assert written["operations"] == ["cat"] and written["sources"] == ["w", "v"]
    assert lowering.report.report.Report.from_json(compiled.to_json()) == compiled
