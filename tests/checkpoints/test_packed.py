"""Weights of 4 and 8 bits: packed here as each format says it, loaded, and compared bit for bit."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lowering
from lowering.checkpoints.causal_lm import Logits
from lowering.checkpoints.packed import PackedLinear
from lowering.errors import CheckpointError

from . import folders, test_row_scaled

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: Tensor, axis: int, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Put codes [R, C] into words along ``axis``; ``order``: the element that each place of a word holds."""
    codes, count = codes.movedim(axis, -1), 32 // bits
    codes = nn.functional.pad(codes, (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
    codes = codes[..., list(order or range(count))].long()
    words = sum(codes[..., place] << (bits * place) for place in range(count))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, axis).contiguous()


def integers(weight: Tensor, bits: int, group: int, *, zeros: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K] from 0 on, zero points and scales [N, K/g], and the values in the dtype of the scales."""
    groups, top = weight.unflatten(1, (-1, group)), (1 << bits) - 1
    if zeros:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).round().clamp(1, top)
    else:
        scale = (groups.abs().amax(-1) / (top // 2)).half()
        zero = torch.full_like(scale, 1 << (bits - 1)).float()
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    values = (codes - zero[..., None]).half() * scale[..., None]
    return codes.flatten(1).int(), zero.int(), scale, values.flatten(1)


def compressed(weight: Tensor, *, bits: int, zeros: bool) -> dict[str, Tensor]:
    codes, zero, scale, _ = integers(weight, bits, GROUP, zeros=zeros)
    held = {"_packed": pack(codes, 1, bits), "_scale": scale, "_shape": torch.tensor(weight.shape)}
    return {**held, **({"_zero_point": pack(zero, 0, bits)} if zeros else {})}


def gptq(weight: Tensor, *, bits: int, above: int, order: bool) -> dict[str, Tensor]:
    index = torch.arange(weight.shape[1]) // GROUP
    if order:  # features are grouped by another order than their own
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
        weight = weight[:, index.argsort(stable=True)]
    codes, zero, scale, _ = integers(weight, bits, GROUP, zeros=True)
    if order:
        codes = codes[:, index.argsort(stable=True).argsort()]
    return {
        ".qweight": pack(codes.t(), 0, bits),
        ".qzeros": pack(zero.t() - above, 1, bits),
        ".scales": scale.t().contiguous(),
        ".g_idx": index.int(),
    }


def awq(weight: Tensor) -> dict[str, Tensor]:
    codes, zero, scale, _ = integers(weight, 4, GROUP, zeros=True)
    return {
        ".qweight": pack(codes.t(), 1, 4, AWQ_ORDER),
        ".qzeros": pack(zero.t(), 1, 4, AWQ_ORDER),
        ".scales": scale.t().contiguous(),
    }


def grouped(bits: int, *, symmetric: bool) -> dict:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group",
        "group_size": GROUP,
        "symmetric": symmetric,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
# How a weight is written, what config.json says, bits, zero points.
FORMATS = {
    "W4A16": (partial(compressed, bits=4, zeros=False), grouped(4, symmetric=True), 4, False),
    "W4A16_ASYM": (partial(compressed, bits=4, zeros=True), grouped(4, symmetric=False), 4, True),
    "W8A16": (partial(compressed, bits=8, zeros=False), grouped(8, symmetric=True), 8, False),
    "GPTQ": (partial(gptq, bits=4, above=1, order=False), GPTQ, 4, True),
    "GPTQ of 8 bits": (partial(gptq, bits=8, above=1, order=False), {**GPTQ, "bits": 8}, 8, True),
    "GPTQ v2": (
        partial(gptq, bits=4, above=0, order=False),
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        4,
        True,
    ),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, 4, True),
}


def save(folder: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """The folder, and the values that its codes stand for, by layer."""
    quantizer, quantization, bits, zeros = FORMATS[name]
    values = []

    def keep(weight: Tensor) -> dict[str, Tensor]:
        values.append(integers(weight, bits, GROUP, zeros=zeros)[3])
        return quantizer(weight)

    folders.save(folder, "llama", {**folders.SMALL, "attention_bias": True}, keep, quantization)
    held = load_file(folder / "model.safetensors")
    names = [n.removesuffix(end) for n in held for end in (".weight_packed", ".qweight") if n.endswith(end)]
    assert len(names) == len(values)
    return folder, values


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_computes_with_its_values(name, tmp_path):
    folder, values = save(tmp_path, name)
    model = lowering.from_pretrained(folder, dtype=torch.float16)
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == len(values) == 7
    left = {tuple(v.flatten().tolist()) for v in values}
    for layer in layers.values():
        assert (layer.out_features, layer.in_features) == tuple(layer.values().shape)
        left.remove(tuple(layer.values().flatten().tolist()))
    # The plain model with these very values is the same function.
    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("llama", **{**folders.SMALL, "attention_bias": True}),
        dtype=torch.float16,
    ).eval()
    held = {k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))}
    plain.load_state_dict({**held, **{f"{n}.weight": layer.values() for n, layer in layers.items()}})
    assert torch.equal(Logits(model)(IDS), Logits(plain)(IDS))


def test_two_formats_in_one_model(tmp_path):
    """Attention in FP8 per token, the MLP in 4 bits, each as it would be alone."""
    packed, _ = save(tmp_path / "packed", "W4A16")
    rows = test_row_scaled.save(tmp_path / "rows", "FP8_DYNAMIC")
    of_rows = load_file(rows / "model.safetensors")

    def replace(held):
        for name in [name for name in held if "self_attn" in name]:
            del held[name]
        held.update({name: tensor for name, tensor in of_rows.items() if "self_attn" in name})

    expected = (
        lowering.from_pretrained(packed).model.layers[0],
        lowering.from_pretrained(rows).model.layers[0],
    )
    (mlp,) = FORMATS["W4A16"][1]["config_groups"].values()
    (attention,) = test_row_scaled.FORMATS["FP8_DYNAMIC"][5]["config_groups"].values()
    quantization = {
        **FORMATS["W4A16"][1],
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {**mlp, "format": "pack-quantized"},
            "group_1": {**attention, "format": "float-quantized", "targets": ["re:.*self_attn.*"]},
        },
    }
    folders.rewrite(packed, replace)
    folders.edit(packed, quantization_config=quantization)
    found = lowering.from_pretrained(packed).model.layers[0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(found.mlp(x), expected[0].mlp(x))
    assert torch.equal(found.self_attn.q_proj(x), expected[1].self_attn.q_proj(x))


def test_an_order_of_features(tmp_path):
    """Act-order: each feature names its group."""
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    parts = gptq(weight, bits=4, above=1, order=True)
    layer = lowering.checkpoints.schemes.gptq(4, GROUP, above=1).layer(parts, None)
    index = parts[".g_idx"].long()
    scale = parts[".scales"].t()[:, index].float()
    # Half a step, and the rounding of the scale to float16.
    assert ((layer.values().float() - weight).abs() <= scale * 0.51).all()
    x = torch.randn(3, 128)
    expected = nn.functional.linear(x, layer.values().float())
    # x is gathered group by group: a float32 sum of 128 products in another order.
    assert (layer(x) - expected).abs().max() <= 128 * 2**-24 * (
        x.abs() @ layer.values().float().abs().t()
    ).max()


def test_groups_of_different_sizes(tmp_path):
    """Then each feature has a scale of its own, which no kernel takes."""
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    parts = gptq(weight, bits=4, above=1, order=True)
    parts[".g_idx"][5] = (parts[".g_idx"][5] + 1) % 4
    layer = lowering.checkpoints.schemes.gptq(4, GROUP, above=1).layer(parts, None)
    index = parts[".g_idx"].long()
    codes = (parts[".qweight"].unsqueeze(1) >> torch.arange(0, 32, 4).view(1, -1, 1)) & 15
    zeros = (parts[".qzeros"].unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    scales = parts[".scales"][index]
    expected = (codes.flatten(0, 1) - (zeros.flatten(1) + 1)[index]).half() * scales
    assert torch.equal(layer.values(), expected.t())
    x = torch.randn(3, 128).half()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.values()))
    (site,) = lowering.explain(layer, (x,), target="cpu").sites
    assert "groups of multiples of 32, not of 1." in site.reason


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_against_compressed_tensors(bits, zeros):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    parts = compressed(weight, bits=bits, zeros=zeros)
    layer = lowering.checkpoints.schemes.packed_integers(bits, GROUP, zeros=zeros).layer(parts, None)
    (group,) = grouped(bits, symmetric=not zeros)["config_groups"].values()
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {f"weight{name}": tensor for name, tensor in parts.items()}
    expected = library.decompress(state, QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(layer.values(), expected)


@pytest.mark.slow
def test_a_program_unpacks_what_the_layer_does(tmp_path):
    class Several(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return tuple(layer(x) for layer in self.layers)

    models = [lowering.from_pretrained(save(tmp_path / n, n)[0], dtype=torch.float32) for n in FORMATS]
    module = Several(model.model.layers[0].self_attn.q_proj for model in models)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = lowering.load(lowering.compile(module, (x,)).vmfb)(x)
    for name, y, expected in zip(FORMATS, found, module(x), strict=True):
        # The weights are equal; a float32 sum of 64 products in another order.
        assert (y - expected).abs().max() <= 64 * 2**-24 * math.sqrt(64) * expected.abs().max(), name


def test_bad_folders(tmp_path):
    folder, _ = save(tmp_path / "awq", "AWQ")
    name = "model.layers.0.mlp.up_proj.qzeros"
    folders.rewrite(folder, lambda held: held.update({name: held[name][:, :-1].contiguous()}))
    with pytest.raises(
        CheckpointError, match=rf"{name} is int32 .2, 11.; AWQ int4.*: expected int32 .2, 12."
    ):
        lowering.from_pretrained(folder)
    folders.rewrite(folder, lambda held: held.pop(name))
    with pytest.raises(CheckpointError, match=f"has no {name} beside it"):
        lowering.from_pretrained(folder)
    folders.edit(folder, quantization_config={**FORMATS["AWQ"][1], "group_size": 40})
    with pytest.raises(CheckpointError, match=r"the weight has \d+ columns, expected a multiple of 40"):
        lowering.from_pretrained(folder)

    folder, _ = save(tmp_path / "gptq", "GPTQ")
    index = "model.layers.0.mlp.up_proj.g_idx"
    folders.rewrite(folder, lambda held: held[index].add_(7))
    with pytest.raises(CheckpointError, match=r"up_proj.qweight: features of groups 7 to 8, of 2"):
        lowering.from_pretrained(folder)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "ModelOpt FP8", "GPTQ", "W4A16"])
def test_experts_are_layers_of_their_format(name, tmp_path):
    """Each expert has the codes of its own tensors; how they are combined does not depend on the format."""
    if name in FORMATS:
        quantizer, quantization, codes, attribute = *FORMATS[name][:2], ".qweight", "words"
        codes = ".weight_packed" if name == "W4A16" else codes
        folder = folders.save(tmp_path, "deepseek_v3", folders.DEEPSEEK_V3, quantizer, quantization)
    else:
        folder, codes, attribute = test_row_scaled.save(tmp_path, name, "deepseek_v3"), ".weight", "weight"
    stored = load_file(folder / "model.safetensors")
    model = lowering.from_pretrained(folder)
    experts = model.model.layers[1].mlp.experts
    for number in range(4):
        layers = (*experts.up[number], experts.down[number])
        for which, layer in zip(("gate_proj", "up_proj", "down_proj"), layers, strict=True):
            expected = stored[f"model.layers.1.mlp.experts.{number}.{which}{codes}"]
            assert torch.equal(getattr(layer, attribute).view(torch.int8), expected.view(torch.int8))
    assert Logits(model)(IDS).isfinite().all()
