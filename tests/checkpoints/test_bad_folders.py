"""Checkpoints that cannot be loaded: one error that names the file, the tensor and what was expected."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowering
from lowering.cli.compile import main as compile_to_vmfb
from lowering.errors import CheckpointError

from . import folders

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return folders.save_blocks(tmp_path_factory.mktemp("good"), "llama", folders.SMALL)


@pytest.fixture
def folder(good, tmp_path) -> Path:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        lowering.from_pretrained(folder)
    return str(caught.value)


def _put(name, tensor, held):
    held[name] = tensor


def _scale(value, held):
    held[f"{UP}_scale_inv"][1, 0] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop(f"{UP}_scale_inv"), [f"{UP} has no {UP}_scale_inv", "[3, 2]"]),
        (lambda held: held.pop(UP), ["no tensor for", UP]),
        (lambda held: held.pop("model.norm.weight"), ["no tensor for model.norm.weight"]),
        (
            partial(_put, f"{UP}_scale_inv", torch.ones(3, 1)),
            [f"{UP}_scale_inv is float32 [3, 1]", "expected float32 or", "[3, 2]"],
        ),
        (
            partial(_put, f"{UP}_scale_inv", torch.ones(3, 2, dtype=torch.int32)),
            [f"{UP}_scale_inv is int32 [3, 2]", "expected float32 or"],
        ),
        (
            partial(_put, UP, torch.ones(96, 32).to(torch.float8_e4m3fn)),
            [f"{UP} is float8_e4m3fn [96, 32]", "expected float8_e4m3fn [96, 64]"],
        ),
        (
            partial(_put, UP, torch.ones(96, 64).to(torch.float8_e5m2)),
            [f"{UP} is float8_e5m2 [96, 64]", "expected float8_e4m3fn"],
        ),
        (partial(_scale, float("nan")), [f"{UP}_scale_inv: the scale at [1, 0] is nan"]),
        (partial(_scale, float("inf")), ["is inf"]),
        (partial(_scale, -1.0), ["is -1.0", "not negative"]),
        (
            partial(_put, "model.norm.weight", torch.ones(3)),
            ["model.norm.weight is float32 [3]", "is bfloat16 [64]"],
        ),
        (
            partial(_put, "model.norm.weight", torch.ones(64, dtype=torch.int8)),
            ["model.norm.weight is int8 [64]", "is bfloat16 [64]"],
        ),
        (
            partial(_put, "lm_head.weight", torch.ones(64, 64).to(torch.float8_e4m3fn)),
            ["lm_head.weight has no lm_head.weight_scale_inv"],
        ),
        (
            lambda held: held.update(
                {
                    "model.embed_tokens.weight" + s: t
                    for s, t in folders.blocks(torch.ones(64, 64), 32).items()
                }
            ),
            [
                "model.embed_tokens.weight is quantized",
                "a parameter of Embedding",
                "expected the weight of an",
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no such tensor")
def test_tensors_that_do_not_fit(change, words, folder):
    folders.rewrite(folder, change)
    said = message(folder)
    assert all(word in said for word in [str(folder), *words]), said


def test_a_quantized_layer_that_the_configuration_leaves_out(folder):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    folders.edit(folder, quantization_config={**quantization, "modules_to_not_convert": ["up_proj"]})
    assert f"{UP} is quantized (float8_e4m3fn [96, 64]), but config.json leaves it out" in message(folder)
    folders.edit(folder, quantization_config=None)
    assert "is quantized" in message(folder) and "nothing says how" in message(folder)


def test_experts_in_two_formats(tmp_path):
    folder = folders.save_blocks(tmp_path, "deepseek_v3", folders.DEEPSEEK_V3)

    def widen(held):
        held.pop("model.layers.1.mlp.experts.2.up_proj.weight_scale_inv")
        held["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)

    folders.rewrite(folder, widen)
    said = message(folder)
    assert "gate_up_proj of expert 2 is not quantized and others are" in said


def test_a_tensor_that_the_model_has_not_is_named(folder):
    folders.rewrite(folder, partial(_put, "model.layers.7.mlp.up_proj.bias", torch.ones(96)))
    with pytest.warns(
        UserWarning, match=r"layers\.7\.mlp\.up_proj\.bias: LlamaForCausalLM has no such tensor"
    ):
        lowering.from_pretrained(folder)


# Files ------------------------------------------------------------------------------------------


def _shard(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: held[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(folder):
    expected = lowering.from_pretrained(folder).state_dict()
    _shard(folder)
    found = lowering.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{UP}"', '"model.other.weight"'))
    assert "no tensor model.other.weight, which model.safetensors.index.json says is there" in message(folder)
    (folder / "b.safetensors").unlink()
    assert "1 of the 2 files that model.safetensors.index.json names are missing: b.safetensors" in message(
        folder
    )
    index.write_text("{")
    assert f"{index} cannot be read as JSON" in message(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda b: b[:-10], "the download stopped"),
        (lambda b: b[:100], "ends within its header"),
        (lambda b: b[:4], "is no safetensors file"),
        (lambda b: b + b"more", "something was appended"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda b: b"<html>not found</html>", "is no safetensors file"),
        (lambda b: (8).to_bytes(8, "little") + b"[1, 2]  ", "its header cannot be read"),
    ],
)
def test_damaged_files(content, words, folder):
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    said = message(folder)
    assert words in said and str(file) in said


def test_folders_that_are_none(folder, tmp_path):
    assert "does not exist; expected a folder with config.json" in message(tmp_path / "absent")
    assert "is a file" in message(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no safetensors file (there is pytorch_model.bin; convert it" in message(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in message(folder)


def test_models_that_transformers_has_not(folder):
    folders.edit(folder, architectures=["StrangerForCausalLM"], model_type="stranger")
    assert "makes no model of it" in message(folder) and "stranger" in message(folder)


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'vmfuse[checkpoints]'" in message(folder)


def test_the_command_line(folder, tmp_path, capsys):
    vmfb = tmp_path / "m.vmfb"
    assert compile_to_vmfb([f"hf:{tmp_path}/absent", "-o", str(vmfb)]) == 2
    assert "absent is no folder; hf: takes a checkpoint's folder on this machine" in capsys.readouterr().err
    folders.rewrite(folder, lambda held: held.pop(UP))
    assert compile_to_vmfb([f"hf:{folder}", "-o", str(vmfb)]) == 2
    assert UP in capsys.readouterr().err
    assert not vmfb.exists()


# Formats ----------------------------------------------------------------------------------------

_FLOAT8 = {"type": "float", "num_bits": 8}
_INT3 = {"type": "int", "num_bits": 3, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of 4 bits, version gemv"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, "blocks of 128 x 64, which are not square"),
        ({"quant_method": "fp8", "weight_block_size": [32, 32], "expert_dtype": "fp4"}, "experts in fp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT3}},
            },
            "compressed-tensors pack-quantized (weights int3 per group, activations as they are)",
        ),
    ],
)
def test_formats_without_a_layer_are_refused_by_name(quantization, words, folder):
    folders.edit(folder, quantization_config=quantization)
    said = message(folder)
    assert f"is quantized as {words}" in said or words in said
    assert "there is no layer yet" in said and "lowering.quantize(model)" in said and "config.json" in said


def test_formats_that_nobody_knows(folder):
    folders.edit(folder, quantization_config={"quant_method": "abacus"})
    assert "quant_method 'abacus' is unknown; those that are read: awq, compressed-tensors" in message(folder)
    folders.edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32]})
    assert "a block has two positive sizes" in message(folder)
    folders.edit(
        folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "x"}
    )
    assert "scale_fmt 'x' is neither" in message(folder)


def test_a_configuration_beside_is_read(folder):
    folders.edit(folder, quantization_config=None)
    beside = {"quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    assert "hf_quant_config.json: the checkpoint is quantized as ModelOpt NVFP4" in message(folder)


# In memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block_size": (32, 64)}, "blocks of 32 x 64"),
        ({"block_size": (32, 32), "activation_scheme": "static"}, "static activations"),
    ],
)
def test_layers_in_memory_without_a_counterpart(arguments, words):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = nn.Sequential(nn.Linear(64, 64), FP8Linear(64, 64, **arguments))
    with pytest.raises(CheckpointError, match=f"1 is a FP8Linear.*{words}"):
        lowering.adopt(model)
    assert type(model[1]) is FP8Linear
    with pytest.raises(CheckpointError, match=words):
        lowering.compile(model, (torch.ones(2, 64),))
