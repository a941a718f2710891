"""Layers that other libraries quantized in memory, beside what these libraries compute of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowering
from lowering.checkpoints.adopt import adopted
from lowering.checkpoints.causal_lm import Logits
from lowering.errors import CheckpointError
from lowering.nn import ScaledLinear

from . import folders, test_packed, test_row_scaled

X = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48).to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture
def torchao(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    import torchao.quantization as library
    from torchao.quantization import quant_api

    # A host without a GPU; the layers are those a GPU host gets.
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda *args, **kwargs: None)
    return library


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_torchao_per_row(kind, torchao):
    configurations = {
        "fp8": lambda: torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow()),
        "int8": torchao.Int8DynamicActivationInt8WeightConfig,
    }
    model = nn.Sequential(linear())
    torchao.quantize_(model, configurations[kind]())
    expected, weight = model(X), model[0].weight
    with adopted(model) as adopting:
        assert torch.equal(adopting[0].weight.view(torch.int8), weight.qdata.view(torch.int8))
        y = adopting(X)
    # Codes of an activation may be the next ones: torchao's int8 scale is amax / 127.5, and ours amax / 127.
    assert (y - expected).abs().max() <= 2**-6 * expected.abs().max()
    assert model[0].weight is weight
    assert isinstance(lowering.adopt(model)[0], ScaledLinear)


def test_torchao_without_a_layer(torchao):
    for configuration in (
        torchao.Float8WeightOnlyConfig(),
        torchao.Int8WeightOnlyConfig(),
        torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerTensor()),
    ):
        model = nn.Sequential(linear())
        torchao.quantize_(model, configuration)
        with pytest.raises(CheckpointError, match=r"0 is a Linear of torchao's .*Tensor .*per row only"):
            lowering.adopt(model)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8 static", "INT8 W8A8"])
def test_compressed_tensors(name, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import transformers

    folder = test_row_scaled.save(tmp_path, name)
    folders.edit(
        folder,
        quantization_config={**test_row_scaled.FORMATS[name][5], "quantization_status": "compressed"},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    mine = Logits(lowering.from_pretrained(folder))(test_row_scaled.IDS)
    with adopted(model) as adopting:
        assert torch.equal(Logits(adopting)(test_row_scaled.IDS), mine)
    expected = Logits(model)(test_row_scaled.IDS)  # decompresses the model
    # Theirs rounds the scale of an activation to bfloat16, so a code may be the next one, 2^-3 of it.
    assert (mine - expected).abs().max() <= 2**-3 * expected.abs().max()
    with pytest.raises(CheckpointError, match="was decompressed"):
        lowering.adopt(model)


def test_packed_weights_of_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import transformers

    folder, _ = test_packed.save(tmp_path, "W4A16")
    quantization = {**test_packed.FORMATS["W4A16"][1], "quantization_status": "compressed"}
    folders.edit(folder, quantization_config=quantization)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    mine = Logits(lowering.from_pretrained(folder, dtype=torch.float16))(test_row_scaled.IDS)
    with adopted(model) as adopting:
        assert torch.equal(Logits(adopting)(test_row_scaled.IDS), mine)
    assert torch.equal(Logits(model)(test_row_scaled.IDS), mine)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_fp8_linear_with_one_scale(scheme):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(64, 48, None, scheme, has_bias=True).requires_grad_(False)
    torch.manual_seed(0)
    layer.weight.copy_(torch.randn(48, 64).to(torch.float8_e4m3fn))
    layer.weight_scale_inv.fill_(0.25)
    layer.bias.normal_()
    if scheme == "static":
        layer.activation_scale.fill_(0.03)
    x = X.float()
    y = lowering.adopt(copy.deepcopy(layer))(x)
    scale = layer.activation_scale if scheme == "static" else x.abs().amax(-1, keepdim=True) / 448
    rows = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    expected = rows @ (layer.weight.double() * 0.25).t() + layer.bias
    assert (y - expected).abs().max() <= 2**-20 * expected.abs().max()
