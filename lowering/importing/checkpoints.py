"""Say what a model no longer shows of the checkpoint it was loaded from."""

from __future__ import annotations

import torch

from patterns.sites import Remark


def dequantized(module: torch.nn.Module) -> tuple[Remark, ...]:
    """A remark on every model of ``module`` whose quantized weights became floats when it was loaded.

    Transformers does that where it has no kernel for them, as without a GPU; what it leaves of its quantizer
    is ``is_quantized``, which a model that was never quantized has not.
    """
    found = (name for name, part in module.named_modules() if vars(part).get("is_quantized") is False)
    return tuple(Remark("checkpoint", "unknown", _text(name, module.get_submodule(name))) for name in found)


def _text(name: str, model: torch.nn.Module) -> str:
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    named = f"{name or 'the model'} ({type(model).__name__})"
    return (
        f"{named} was loaded from a quantized checkpoint, and its weights were dequantized: "
        f"what is compiled holds {', '.join(dtypes)}, and its products quantize nothing; "
        "lowering.quantize(model) makes layers of codes and scales of it"
    )
