"""BlockScaledLinear and quantize()."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lowering
from lowering.nn import BlockScaledLinear, quantize, quantize_weight


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return module


class Block(nn.Module):
    def __init__(self, hidden: int = 128):
        super().__init__()
        self.up = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, hidden: int = 128):
        super().__init__()
        self.embed = nn.Embedding(50, hidden)
        self.layers = nn.ModuleList([Block(hidden), Block(hidden)])
        self.lm_head = nn.Linear(hidden, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


@pytest.mark.parametrize(
    ("rows", "depth", "group"), [(256, 128, 128), (200, 192, 64), (5, 32, 32), (130, 192, 128)]
)
def test_quantized_weights_are_close(rows, depth, group):
    weight = torch.randn(rows, depth, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_weight(weight, group)
    groups = -(-depth // group)
    assert (q.shape, q.dtype) == ((rows, groups * group), torch.float8_e4m3fn)
    assert scale.shape == (-(-rows // group), groups)
    assert not q[:, depth:].float().any()
    expanded = scale.repeat_interleave(group, 0)[:rows].repeat_interleave(group, 1)[:, :depth]
    error = (q[:, :depth].float() * expanded - weight).abs()
    # Half a unit of a 3-bit mantissa, or of the smallest subnormal.
    assert (error <= torch.maximum(weight.abs() / 16, expanded * 2**-10) * 1.001).all()
    assert torch.equal(expanded[: len(weight)] * 448 >= weight.abs() * 0.999, torch.ones(rows, depth) > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_close_to_the_linear_layer(dtype, bias):
    linear = seeded(nn.Linear(256, 200, bias=bias)).to(dtype)
    layer = BlockScaledLinear.from_linear(linear, 64)
    x = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    y, expected = layer(x), linear(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert (y - expected).float().norm() < 0.05 * expected.float().norm()
    assert layer.bias is linear.bias


def test_state_dict_round_trip():
    layer = BlockScaledLinear.from_linear(seeded(nn.Linear(128, 100)), 32)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for assign in (False, True):
        other = BlockScaledLinear(128, 100, 32)
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        file.seek(0)
        assert other.weight.dtype == torch.float8_e4m3fn
        x = torch.randn(3, 128)
        assert torch.equal(other(x), layer(x))


def test_casting_a_model_keeps_the_quantized_weights():
    layer = BlockScaledLinear.from_linear(seeded(nn.Linear(128, 100)), 32)
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    for cast in (layer.to(torch.bfloat16), layer.half(), copy.deepcopy(layer).float()):
        assert cast.weight.dtype == torch.float8_e4m3fn and cast.weight_scale.dtype == torch.float32
        assert torch.equal(cast.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(cast.weight_scale, scale)
    assert layer.bias is not None and layer.bias.dtype == torch.float16
    assert layer.to("meta").weight.is_meta


def test_quantize_replaces_the_linear_layers():
    model = seeded(Model())
    tokens = torch.arange(12).view(3, 4)
    expected = model(tokens)
    assert quantize(model, group_size=64) is model
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["layers.0.up"] is kinds["layers.1.down"] is BlockScaledLinear
    assert kinds["lm_head"] is nn.Linear and model.lm_head.weight is model.embed.weight
    assert (model(tokens) - expected).norm() < 0.1 * expected.norm()
    assert "group_size=64" in repr(model.layers[0].up)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), []),
        (("lm_head",), ["lm_head"]),
        (("down",), ["layers.0.down", "layers.1.down"]),
        ("down", ["layers.0.down", "layers.1.down"]),
        (["layers.1", "lm_head"], ["layers.1.up", "layers.1.down", "lm_head"]),
        (("layers.1.*", "lm_*"), ["layers.1.up", "layers.1.down", "lm_head"]),
        (("*",), ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head"]),
    ],
)
def test_exclude(exclude, left):
    model = quantize(seeded(Model()), exclude=exclude)
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == left


@pytest.mark.parametrize(
    ("exclude", "error", "words"),
    [
        ("dwon", ValueError, "exclude 'dwon' names no layer of the model; it has down"),
        (["layers.0.upp"], ValueError, "it has layers.0.up"),
        (("down", 3), TypeError, "3 is no name"),
        (None, TypeError, "None is no name"),
    ],
)
def test_exclude_must_name_something(exclude, error, words):
    model = seeded(Model())
    with pytest.raises(error, match=words):
        quantize(model, exclude=exclude)
    assert not any(isinstance(module, BlockScaledLinear) for module in model.modules())
    no_head = nn.Sequential(nn.Linear(128, 128))
    assert isinstance(quantize(no_head, exclude=("lm_head",))[0], BlockScaledLinear)


def test_shared_layers_and_weights_stay_shared():
    block = Block()
    other = nn.Linear(128, 256)
    other.weight = block.up.weight
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block.up, nn.ReLU()), "c": other})
    quantize(seeded(model))
    assert isinstance(block.up, BlockScaledLinear)
    assert model["b"][0] is block.up
    assert model["c"].weight is block.up.weight and model["c"].bias is not block.up.bias


class SpelledOut(nn.Linear):
    """As Falcon has it."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    """Linear, and something else than the product with its weight."""

    def forward(self, x):
        return super().forward(x) * 1.01


def test_what_computes_the_product_is_quantized_whatever_its_class():
    conv = transformers.pytorch_utils.Conv1D(192, 128)
    kinds = nn.ModuleList([SpelledOut(128, 128), conv, Scaled(128, 128), nn.Bilinear(8, 8, 8)])
    model = nn.ModuleDict({"layers": seeded(kinds), "head": nn.Linear(128, 128)})
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    expected = [layer(x) for layer in list(kinds)[:2]]
    quantize(model, exclude="head")
    assert [type(layer) for layer in kinds] == [BlockScaledLinear, BlockScaledLinear, Scaled, nn.Bilinear]
    for layer, want in zip(kinds, expected, strict=False):
        # Codes of three bits of mantissa on both sides.
        assert (layer(x) - want).norm() < 0.05 * want.norm()
    done = lowering.nn.quantization(model)
    assert done.changed == {
        "layers.0": "SpelledOut, groups of 128", "layers.1": "Conv1D, groups of 128"
    }  # fmt: skip
    assert done.left["head"] == "excluded"
    assert done.left["layers.2"] == "a Scaled computes something else than a product with its weight"
    assert "layers.3: left, a Bilinear" in str(done)


def test_conv1d_layers_that_share_a_weight_share_its_codes():
    first, second = (transformers.pytorch_utils.Conv1D(128, 128) for _ in range(2))
    second.weight = first.weight
    model = quantize(nn.Sequential(first, second))
    assert model[0].weight is model[1].weight and model[0].bias is not model[1].bias


MIXTURES = {
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
}


@pytest.mark.parametrize("kind", list(MIXTURES))
def test_experts_of_a_mixture_are_quantized(kind):
    """As transformers holds them: three-dimensional, and of gpt_oss transposed, interleaved, with a bias."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, **MIXTURES[kind]
    )
    model: Any = seeded(transformers.AutoModelForCausalLM.from_config(config)).eval()
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    chosen, weights = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [3, 1]]), torch.rand(5, 2)
    expected = experts(x, chosen, weights)
    quantize(model, group_size=32)
    quantized = model.model.layers[0].mlp.experts
    assert type(quantized) is lowering.nn.QuantizedExperts
    # Two products of codes of three bits of mantissa.
    assert (quantized(x, chosen, weights) - expected).norm() < 0.1 * expected.norm()
    done = lowering.nn.quantization(model)
    assert "a layer for each of its experts" in done.changed["model.layers.0.mlp.experts"]
    assert done.left["lm_head"] == "excluded"
    again = transformers.AutoModelForCausalLM.from_config(config)
    quantize(again, group_size=32, exclude=("experts", "lm_head"))
    assert lowering.nn.quantization(again).left["model.layers.0.mlp.experts"] == "excluded"


def test_a_linear_layer_itself():
    assert isinstance(quantize(nn.Linear(128, 4)), BlockScaledLinear)


def test_layers_shorter_than_a_group_stay_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="shorter than one group of 32: 1$"):
        quantize(model, group_size=32)
    assert [type(layer) for layer in model] == [BlockScaledLinear, nn.Linear]


class ReadsWeights(nn.Module):
    """Reads of a weight as models have them: its dtype, its values, and what tells nothing of its values."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("cast", "multiplied", "placed", "trained", "plain"):
            setattr(self, name, nn.Linear(64, 64))
        nn.init.ones_(self.plain.weight)

    def forward(self, x):
        x = self.cast(x.to(self.cast.weight.dtype)) + x @ self.multiplied.weight
        if self.training:
            return x @ self.trained.weight
        return self.plain(self.trained(self.placed(x.to(self.placed.weight.device))))


def test_layers_whose_weight_is_read_elsewhere_stay_and_are_named() -> None:
    model = nn.ModuleDict({"a": ReadsWeights(), "b": nn.Linear(64, 64)}).eval()
    with pytest.warns(UserWarning, match=r"reads their weight.*: cast \(test_nn.py:\d+\), multiplied \(test"):
        quantize(model, group_size=64)
    left = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    assert left == ["a.cast", "a.multiplied"]
    assert model["a"](torch.randn(2, 64)).dtype == torch.float32


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear but Scaled, which may mean something else"):
        quantize(nn.Sequential(Scaled(64, 64)))
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear$"):
        quantize(nn.Sequential(nn.ReLU()))


def test_a_model_whose_only_linear_layer_is_its_head_is_refused() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "mix": Conv1D(), "lm_head": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"no nn\.Linear but lm_head, which is excluded, and Conv1D, which"):
        quantize(model, group_size=4)


def test_the_last_group_of_a_row_may_be_short() -> None:
    """As in checkpoints whose blocks do not divide a shard; padding with zeros changes nothing."""
    model = seeded(nn.Sequential(nn.Linear(128, 192), nn.Linear(192, 130)))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    with pytest.warns(
        UserWarning, match=r"rows of 192 are no whole groups of 128: .*; group_size 64 divides all"
    ):
        quantize(model)
    short = model[1]
    assert (short.weight.shape, short.weight_scale.shape, short.in_features) == ((130, 256), (2, 2), 192)
    assert (model(x) - expected).norm() < 0.1 * expected.norm()
    program = lowering.load(lowering.compile(model.eval(), (x,)).vmfb)
    # Sums of float32 in another order; a code may round the other way, which is far below this.
    torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-2)


def test_a_group_of_no_length_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(128, 4))
    for wrong in (lambda: quantize(model, group_size=0), lambda: BlockScaledLinear(128, 4, -32)):
        with pytest.raises(ValueError, match="group_size is the length of a group"):
            wrong()
    assert type(model[0]) is nn.Linear


def test_export():
    model = quantize(seeded(Block()).eval(), group_size=64)
    x = torch.randn(5, 128)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.lowering.group_quant.default) == 2
    assert called.count(torch.ops.lowering.block_scaled_matmul.default) == 2
    assert torch.equal(exported.module()(x[:3]), model(x[:3]))
