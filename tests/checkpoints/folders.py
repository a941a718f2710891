"""Make checkpoints for tests: tiny models as transformers saves them, their weights then quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Quantizer = Callable[[Tensor], dict[str, Tensor]]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    **SMALL,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
LEFT = ("lm_head", "embed_tokens", "norm", "layernorm", ".gate.")
"""What checkpoints leave in 16 bits."""


def blocks(
    weight: Tensor, group: int, *, powers_of_two: bool = False, suffix: str = "_scale_inv"
) -> dict[str, Tensor]:
    """Quantize a weight [N, K] in blocks, the last of which may be short: codes and what multiplies them."""
    rows, depth = weight.shape
    padded = torch.nn.functional.pad(weight.double(), (0, -depth % group, 0, -rows % group))
    tiles = padded.unflatten(1, (-1, group)).unflatten(0, (-1, group))
    scale = (tiles.abs().amax((1, 3)) / 448).float()
    if powers_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (tiles / scale[:, None, :, None].double()).flatten(2).flatten(0, 1)[:rows, :depth]
    return {"": codes.to(torch.float8_e4m3fn).contiguous(), suffix: scale}


def save(
    folder: Path,
    kind: str,
    sizes: dict[str, Any],
    quantizer: Quantizer,
    quantization: dict[str, Any],
    *,
    left=LEFT,
) -> Path:
    """Save a random model of ``kind`` in ``folder``, its two-dimensional weights but ``left`` quantized."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) / 8)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    held = load_file(file)
    for name in [name for name in held if held[name].dim() > 1 and not any(part in name for part in left)]:
        front = name.removesuffix(".weight")
        for suffix, tensor in quantizer(held.pop(name).float()).items():
            held[front + suffix if suffix.startswith(".") else name + suffix] = tensor
    save_file(held, file, metadata={"format": "pt"})
    edit(folder, quantization_config=quantization)
    return folder


def save_blocks(
    folder: Path, kind: str, sizes: dict[str, Any], group: int = 32, *, powers_of_two: bool = False
) -> Path:
    """Save a folder of quant_method "fp8"."""
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [group, group],
    }
    if powers_of_two:
        quantization["scale_fmt"] = "ue8m0"
    return save(folder, kind, sizes, partial(blocks, group=group, powers_of_two=powers_of_two), quantization)


def edit(folder: Path, **values: Any) -> None:
    """Change entries of ``config.json``; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder of one file, in place."""
    file = folder / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(held)
    save_file(held, file, metadata={"format": "pt"})
