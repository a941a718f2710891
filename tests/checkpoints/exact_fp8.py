"""transformers' own FP8 modules, computing on this machine: its Triton products replaced by float64 ones.

What is left of transformers is everything that a loader can get wrong: names, layouts, experts, routing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

__all__ = ["FP8Linear", "load", "product", "transformers"]


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    block: list[int],
    dtype: torch.dtype,
    activation_scale: None = None,
) -> Tensor:
    """x . weight^T in float64 from the stored numbers, x in groups of e4m3 as the formats say."""
    group = block[1]
    depth = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -depth % group)).unflatten(-1, (-1, group))
    x_scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    if scale.dtype == torch.float8_e8m0fnu:
        x_scale = torch.exp2(torch.ceil(torch.log2(x_scale)))
    codes = (groups / x_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    rows = (codes.double() * x_scale.double()).flatten(-2)[..., :depth]
    by_row = scale.double().repeat_interleave(block[0], 0)[: weight.shape[0]]
    columns = weight.double() * by_row.repeat_interleave(group, 1)[:, :depth]
    return (rows @ columns.t()).to(dtype)


def load(folder: Path, monkeypatch, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The model as transformers loads it where it has a GPU, in FP8 modules, with eager experts."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(finegrained_fp8, "is_deepgemm_loadable", lambda: False)
    kernels = finegrained_fp8.FineGrainedFP8(product, batched_matmul=None, grouped_matmul=None)
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", kernels)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)
