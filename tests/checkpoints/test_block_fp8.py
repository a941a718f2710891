"""Block FP8 in folders and in memory, beside transformers' own modules on the same stored numbers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowering
from lowering.checkpoints.causal_lm import Logits
from lowering.cli.compile import main as compile_to_vmfb
from lowering.nn import BlockScaledLinear
from tests.gfx950 import test_hip_programs

from . import exact_fp8, folders

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MIXTURE = {**folders.SMALL, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "llama": ("llama", folders.SMALL, False),
    # No size is a multiple of the 32 of a block.
    "ragged": ("llama", {**folders.SMALL, "hidden_size": 72, "intermediate_size": 80}, False),
    "powers": ("llama", folders.SMALL, True),
    "biases": ("qwen2", folders.SMALL, False),
    "deepseek_v3": ("deepseek_v3", folders.DEEPSEEK_V3, False),
    "mixtral": ("mixtral", MIXTURE, False),
}


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return Logits(model)(ids)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_computes_what_transformers_computes(name, tmp_path, monkeypatch):
    kind, sizes, powers = KINDS[name]
    folder = folders.save_blocks(tmp_path, kind, sizes, powers_of_two=powers)
    model = lowering.from_pretrained(folder)
    expected = exact_fp8.load(folder, monkeypatch)
    # transformers takes scales that are powers of two for float32 ones where they are stored so.
    if powers:
        for layer in expected.modules():
            if isinstance(layer, exact_fp8.FP8Linear):
                layer.weight_scale_inv = nn.Parameter(layer.weight_scale_inv.to(torch.float8_e8m0fnu), False)
    # Products differ by the order of a float32 sum, 2^-20 of them; a rounding to bfloat16 hides nearly all.
    assert (logits(model) - logits(expected)).abs().max() <= 2**-8 * logits(expected).abs().max()
    assert torch.equal(logits(lowering.adopt(expected)), logits(model))
    assert not any(isinstance(layer, exact_fp8.FP8Linear) for layer in expected.modules())


def test_codes_and_scales_are_those_of_the_file(tmp_path):
    folder = folders.save_blocks(tmp_path, "llama", {**folders.SMALL, "hidden_size": 72})
    stored = load_file(folder / "model.safetensors")
    model = lowering.from_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BlockScaledLinear)}
    assert len(layers) == 7 and type(model.lm_head) is nn.Linear
    for name, layer in layers.items():
        codes = layer.weight[:, : layer.in_features].view(torch.uint8)
        assert torch.equal(codes, stored[f"{name}.weight"].view(torch.uint8))
        assert not layer.weight[:, layer.in_features :].view(torch.uint8).any()
        assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale_inv"])


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_of_narrow_types_keep_their_values(dtype, tmp_path):
    folder = folders.save_blocks(tmp_path, "llama", folders.SMALL, powers_of_two=True)
    expected = logits(lowering.from_pretrained(folder))

    def narrow(held):
        held.update({n: t.to(dtype) for n, t in held.items() if n.endswith("_scale_inv")})

    folders.rewrite(folder, narrow)
    assert torch.equal(logits(lowering.from_pretrained(folder)), expected)


def test_compressed_tensors_blocks_are_the_same_layer(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    folders.save_blocks(one, "llama", folders.SMALL)
    scheme = {
        "targets": ["Linear"],
        "weights": {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [32, 32]},
        "input_activations": {
            **{"type": "float", "num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": True},
        },
    }
    folders.save(
        other,
        "llama",
        folders.SMALL,
        lambda weight: folders.blocks(weight, 32, suffix="_scale"),
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head", "re:.*embed.*"],
            "config_groups": {"group_0": scheme},
        },
    )
    assert torch.equal(logits(lowering.from_pretrained(other)), logits(lowering.from_pretrained(one)))


def test_layers_that_are_left_out_stay_as_they_are(tmp_path):
    left = (*folders.LEFT, "down_proj")
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"],
    }
    folders.save(tmp_path, "llama", folders.SMALL, lambda w: folders.blocks(w, 32), quantization, left=left)
    mlp = lowering.from_pretrained(tmp_path).model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear and isinstance(mlp.up_proj, BlockScaledLinear)


def test_experts_that_are_stored_as_one_tensor(tmp_path):
    """As transformers holds them, which some checkpoints store."""
    folder = folders.save_blocks(tmp_path, "deepseek_v3", folders.DEEPSEEK_V3)
    expected = logits(lowering.from_pretrained(folder))

    def stack(held):
        base = "model.layers.1.mlp.experts"
        for suffix in ("", "_scale_inv"):
            parts = {
                which: torch.stack([held.pop(f"{base}.{e}.{which}.weight{suffix}") for e in range(4)])
                for which in ("gate_proj", "up_proj", "down_proj")
            }
            held[f"{base}.gate_up_proj{suffix}"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
            held[f"{base}.down_proj{suffix}"] = parts["down_proj"]

    folders.rewrite(folder, stack)
    assert torch.equal(logits(lowering.from_pretrained(folder)), expected)


def test_tied_weights_and_a_folder_without_quantization(tmp_path):
    folder = folders.save_blocks(tmp_path, "llama", {**folders.SMALL, "tie_word_embeddings": True})
    model = lowering.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    plain = folders.save(
        tmp_path / "plain", "deepseek_v3", folders.DEEPSEEK_V3, lambda w: {"": w.bfloat16()}, None
    )
    expected = exact_fp8.transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    model = lowering.from_pretrained(plain)
    assert torch.equal(logits(model), logits(expected))
    assert dict(model.state_dict()).keys() == dict(expected.state_dict()).keys()


def test_loading_copies_no_weight(tmp_path):
    """What is mapped takes no memory of Python's or torch's allocators; the largest tensor is 0.5 MB."""
    sizes = {**folders.SMALL, "hidden_size": 256, "intermediate_size": 2048}
    folder = folders.save_blocks(tmp_path, "llama", sizes)
    model = lowering.from_pretrained(folder)
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split() for line in lines if str(folder) in line]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    large = [t for t in (*model.parameters(), *model.buffers()) if t.nbytes > 2048]
    assert len(large) >= 9
    for tensor in large:
        assert any(low <= tensor.data_ptr() < high for low, high in ranges)


def test_compile_adopts_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    folder = folders.save_blocks(tmp_path, "llama", folders.SMALL)
    model = Logits(exact_fp8.load(folder, monkeypatch))
    kinds = [type(layer) for layer in model.modules()]
    report = lowering.explain(model, (IDS,))
    assert [type(layer) for layer in model.modules()] == kinds and exact_fp8.FP8Linear in kinds
    # As many as layers were adopted.
    assert sum(site.op == "group_quant" for site in report.sites) == 7
    assert report.summary()["unfused"] == 0


def test_the_layer_moves_and_copies_like_any_other(tmp_path):
    folder = folders.save_blocks(tmp_path, "deepseek_v3", folders.DEEPSEEK_V3)
    model = lowering.from_pretrained(folder)
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    assert (logits(other.float()) - expected).abs().max() < 2**-4 * expected.abs().max()


@pytest.mark.slow
def test_a_deepseek_folder_becomes_a_program(tmp_path, capsys):
    sizes = {**folders.DEEPSEEK_V3, "n_routed_experts": 2, "n_group": 1, "num_experts_per_tok": 1}
    folder = folders.save_blocks(tmp_path, "deepseek_v3", sizes)
    vmfb = tmp_path / "m.vmfb"
    assert compile_to_vmfb([f"hf:{folder}", "-o", str(vmfb), "--require-fused"]) == 0, capsys.readouterr().err
    program, model = lowering.load(vmfb), lowering.from_pretrained(folder)
    for shape in ((2, 9), (1, 1), (3, 5)):
        ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(shape[1]))
        y, expected = program(ids), logits(model, ids)
        # Where a sum's last bit decides a rounding to bfloat16, a code behind it may be the next, 2^-3 of it.
        assert (y - expected).abs().max() <= 2**-4 * expected.abs().max()


_LARGE = {
    **folders.DEEPSEEK_V3,
    **{"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128},
    **{"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
    **{"n_routed_experts": 2, "n_group": 1, "num_experts_per_tok": 1},
}


FEW = torch.tensor([[5, 60, 7, 31]])


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> Logits:
    folder = folders.save_blocks(tmp_path_factory.mktemp("large"), "deepseek_v3", _LARGE, 128)
    return Logits(lowering.from_pretrained(folder))


@pytest.fixture(scope="module")
def large(large_model) -> torch.export.ExportedProgram:
    return torch.export.export(large_model, (FEW,), strict=False)


@pytest.mark.parametrize("target", ["h200", "b200"])
def test_a_deepseek_folder_becomes_kernels_of_a_gpu(target, large):
    """Blocks of 128, of which each chip has its kernels: every product is one of them."""
    report = lowering.explain(large, target=target)
    assert report.summary()["unfused"] == 0 and {remark.op for remark in report.remarks} == {"siblings"}


@pytest.mark.slow
def test_a_deepseek_folder_becomes_a_program_of_gfx950(large, large_model, tmp_path):
    """Which is executed, all that IREE generates for it too, on the stand-in of the HIP library."""
    compiled = lowering.compile(large, target="gfx950")
    assert compiled.report.summary()["unfused"] == 0
    assert {remark.op for remark in compiled.report.remarks} == {"siblings"}
    assert len(compiled.dispatched.launches) >= compiled.report.summary()["dispatches"] > 30
    compiled.save(program := tmp_path / "m.vmfb")
    ((y,),) = test_hip_programs.run(program, [(FEW,)])
    expected = large_model(FEW)
    # As on the CPU: the last bit of a sum may move a code by 2^-3 of it.
    assert (y - expected).abs().max() <= 2**-4 * expected.abs().max()
