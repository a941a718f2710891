"""Refuse mixtures of experts whose quantized form there is no module for."""

from __future__ import annotations

from torch import nn

from ..errors import CheckpointError


def check_experts(name: str, experts: nn.Module) -> None:
    """Refuse experts that compute what QuantizedExperts does not."""
    for attribute in ("has_bias", "is_transposed", "has_post_expert_norm"):
        if getattr(experts, attribute, False):
            raise CheckpointError(
                f"{name} ({type(experts).__name__}): there is no layer for quantized experts with {attribute}"
            )
    if not (hasattr(experts, "_apply_gate") and hasattr(experts, "act_fn")):
        raise CheckpointError(f"{name} ({type(experts).__name__}) is no module of experts that is known")
