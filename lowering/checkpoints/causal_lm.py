"""Make of a checkpoint's folder what the command line compiles: token ids in, logits out."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .decoder import export_decoder
from .pretrained import from_pretrained

_BATCH, _TOKENS = 2, 16


class Logits(nn.Module):
    """Call a causal language model without its cache: ids [batch, tokens] in, logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def causal_lm(path: str | os.PathLike[str]) -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    """The model of a folder, example ids, and both their sizes left open.

    Raises CheckpointError for a folder that is no causal language model's or cannot be loaded.
    """
    model = _loaded(path)
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    tokens = torch.export.Dim("tokens", max=longest) if longest else torch.export.Dim("tokens")
    ids = torch.arange(_BATCH * min(_TOKENS, longest or _TOKENS)) % config.vocab_size
    return Logits(model), (ids.view(_BATCH, -1),), {"ids": {0: torch.export.Dim("batch"), 1: tokens}}


def decoder(
    path: str | os.PathLike[str], **sizes: int
) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], Any]]:
    """The functions of a folder's model with a cache; ``sizes`` as ``export_decoder`` has them.

    Raises CheckpointError for a folder that is no causal language model's or cannot be loaded, UsageError for
    sizes or a cache that ``export_decoder`` refuses.
    """
    return export_decoder(_loaded(path), **sizes)


def _loaded(path: str | os.PathLike[str]) -> nn.Module:
    model = from_pretrained(path)
    if not type(model).__name__.endswith("ForCausalLM"):
        raise CheckpointError(
            f"{path} holds a {type(model).__name__}; hf: compiles causal language models, "
            "others are loaded by lowering.from_pretrained in a file of your own, file.py:callable"
        )
    return model
