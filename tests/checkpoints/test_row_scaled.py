"""FP8 and INT8 with a scale for a row or for all, beside float64 evaluations of the stored numbers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lowering
from lowering.checkpoints.causal_lm import Logits
from lowering.nn import ScaledLinear

from . import folders

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
QMAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
STATIC = 0.03


def quantized(
    weight: Tensor, dtype: torch.dtype, *, channels: bool, scale: str, given: str | None, stored
) -> dict:
    """Codes of a weight with scales of rows or of all, and an input scale where ``given`` names one."""
    amax = weight.abs().amax(1, keepdim=True) if channels else weight.abs().amax().reshape(1)
    scales = (amax / QMAX[dtype]).to(stored)
    codes = (weight / scales.float()).clamp(-QMAX[dtype], QMAX[dtype])
    codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
    return {"": codes, scale: scales, **({given: torch.tensor([STATIC]).to(stored)} if given else {})}


def compressed(kind: str, of: str, inputs: str) -> dict:
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": of, "dynamic": False},
                "input_activations": {**numbers, "strategy": inputs, "dynamic": inputs == "token"},
            }
        },
    }


E4M3, INT8, F32, BF16 = torch.float8_e4m3fn, torch.int8, torch.float32, torch.bfloat16
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FP8 = {"quant_method": "fp8", "weight_block_size": None}
# What is written: dtype of codes, scales of channels, their name, name of an input scale, dtype of scales.
FORMATS = {
    "FP8_DYNAMIC": (E4M3, True, "_scale", None, BF16, compressed("float", "channel", "token")),
    "FP8 static": (E4M3, False, "_scale", ".input_scale", BF16, compressed("float", "tensor", "tensor")),
    "FP8 per tensor": (E4M3, False, "_scale", None, F32, compressed("float", "tensor", "token")),
    "INT8 W8A8": (INT8, True, "_scale", None, BF16, compressed("int", "channel", "token")),
    "INT8 static": (INT8, True, "_scale", ".input_scale", F32, compressed("int", "channel", "tensor")),
    "ModelOpt FP8": (E4M3, False, "_scale", ".input_scale", F32, MODELOPT),
    "ModelOpt rows": (
        E4M3,
        True,
        "_scale",
        None,
        F32,
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    ),
    "transformers": (E4M3, False, "_scale_inv", None, F32, FP8),
    "Mistral": (E4M3, False, "_scale_inv", ".activation_scale", BF16, {**FP8, "activation_scheme": "static"}),
}


def save(folder: Path, name: str, kind: str = "llama") -> Path:
    dtype, channels, scale, given, stored, quantization = FORMATS[name]
    quantizer = partial(quantized, dtype=dtype, channels=channels, scale=scale, given=given, stored=stored)
    sizes = {**folders.SMALL, "attention_bias": True} if kind == "llama" else folders.DEEPSEEK_V3
    return folders.save(folder, kind, sizes, quantizer, quantization)


class Exact(nn.Module):
    """A linear layer of stored numbers, in float64."""

    def __init__(self, linear: nn.Linear, codes: Tensor, scale: Tensor, given: Tensor | None):
        super().__init__()
        self.codes, self.weight = codes.dtype, codes.double() * scale.double().reshape(-1, 1)
        self.given, self.bias = given, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        qmax = QMAX[self.codes]
        scale = self.given
        if scale is None:
            scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / qmax
        low = -128.0 if self.codes == INT8 else -qmax
        q = (x.float() / scale.float()).round() if self.codes == INT8 else x.float() / scale.float()
        rows = q.clamp(low, qmax).to(self.codes).double() * scale.double()
        y = (rows @ self.weight.t()).to(x.dtype)
        return y if self.bias is None else y + self.bias


def reference(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """The plain model of transformers with exact layers where the file has codes."""
    _, _, scale, given, _, _ = FORMATS[name]
    held = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.load_state_dict(
        {k: v for k, v in held.items() if v.dtype == BF16 and "scale" not in k}, strict=False
    )
    for layer, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and layer != "lm_head":
            inputs = held[layer + given] if given else None
            exact = Exact(module, held[f"{layer}.weight"], held[f"{layer}.weight{scale}"], inputs)
            model.set_submodule(layer, exact)
    return model


def logits(model: nn.Module) -> Tensor:
    return Logits(model)(IDS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_computes_its_stored_numbers(name, tmp_path):
    folder = save(tmp_path, name)
    stored = load_file(folder / "model.safetensors")
    model = lowering.from_pretrained(folder)
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, ScaledLinear)}
    assert len(layers) == 7
    for layer, module in layers.items():
        assert torch.equal(module.weight.view(INT8), stored[f"{layer}.weight"].view(INT8))
        assert torch.equal(
            module.weight_scale.flatten(), stored[f"{layer}.weight{FORMATS[name][2]}"].float().flatten()
        )
    # A float32 sum beside a float64 one: one rounding to bfloat16 hides nearly all of it.
    expected = logits(reference(folder, name, BF16))
    assert (logits(model) - expected).abs().max() <= 2**-8 * expected.abs().max()
    # Without it, what is left are codes that a sum's last bit decides.
    wide = logits(reference(folder, name, F32))
    assert (
        logits(lowering.from_pretrained(folder, dtype=F32)) - wide
    ).abs().max() <= 2**-10 * wide.abs().max()


def test_a_configuration_beside_of_modelopt(tmp_path):
    folder = save(tmp_path, "ModelOpt FP8")
    expected = logits(lowering.from_pretrained(folder))
    folders.edit(folder, quantization_config=None)
    beside = {
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    assert torch.equal(logits(lowering.from_pretrained(folder)), expected)


def test_an_input_scale_of_zero_is_refused(tmp_path):
    folder = save(tmp_path, "FP8 static")
    name = "model.layers.0.mlp.up_proj.input_scale"
    folders.rewrite(folder, lambda held: held.update({name: torch.zeros(1)}))
    with pytest.raises(
        lowering.CheckpointError, match=f"{name}: the scale at .0. is 0.0; expected .* above zero"
    ):
        lowering.from_pretrained(folder)


def test_codes_stay_when_a_model_is_cast(tmp_path):
    model = lowering.from_pretrained(save(tmp_path, "FP8 static")).float()
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.input_scale.dtype) == (E4M3, F32, F32)
    layer = lowering.from_pretrained(save(tmp_path, "INT8 W8A8")).to(BF16).model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (INT8, F32)


def test_special_values_of_a_given_scale():
    """A NaN stays, infinities saturate; an int8 of NaN is 0."""
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1e-9]])
    for dtype, expected in ((E4M3, [448.0, -448.0, 0.0]), (INT8, [127.0, -128.0, 0.0])):
        layer = lowering.nn.ScaledLinear(torch.ones(1, 4).to(dtype), torch.ones(1, 1), torch.ones(1))
        codes = layer.codes(x)[0].float()[0]
        assert codes[1:].tolist() == expected
        assert codes[0].isnan() if dtype == E4M3 else codes[0] == 0


class Several(nn.Module):
    """The norm and the MLP of one layer in several formats, so that they are one program."""

    def __init__(self, layers):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(layer.post_attention_layernorm, layer.mlp) for layer in layers
        )

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


@pytest.mark.slow
def test_a_program_computes_what_the_layers_do(tmp_path):
    """In float32, so that nothing but the order of sums differs."""
    names = ("FP8_DYNAMIC", "FP8 static", "INT8 W8A8")
    folder = [save(tmp_path / name, name) for name in names]
    model = Several(lowering.from_pretrained(path, dtype=F32).model.layers[0] for path in folder)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    compiled = lowering.compile(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert compiled.report.summary()["unfused"] == 0
    program = lowering.load(compiled.vmfb)
    for rows in (x, x[:1]):
        for name, found, expected in zip(names, program(rows), model(rows), strict=True):
            # Where a sum's last bit decides, a code of the down projection's input may be the next one.
            assert (found - expected).abs().max() <= 2**-6 * expected.abs().max(), name
