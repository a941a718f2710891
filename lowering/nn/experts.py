"""Compute mixtures of quantized experts: a layer for each where transformers has 3-D parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class QuantizedExperts(nn.Module):
    """y = sum over the chosen experts of weight * down(gate(up(x))), each expert of quantized layers.

    Stands where transformers has its experts: called with x [T, hidden], the experts chosen for each row
    [T, k] and their weights [T, k]; returns [T, hidden] in x's dtype, the sum in float32, as transformers'
    FP8Experts computes it.  Every expert computes every row, and the rows that chose it keep the result:
    right for any routing, and more work than the routing asks for.
    """

    def __init__(self, experts: nn.Module, up: Sequence[Sequence[nn.Module]], down: Sequence[nn.Module]):
        """Take the place of ``experts``, transformers' own, whose activation and gating stay.

        up: for each expert the layers whose results, one behind the other, are what is gated.
        """
        super().__init__()
        self.up: Any = nn.ModuleList(nn.ModuleList(layers) for layers in up)
        self.down = nn.ModuleList(down)
        gating: Any = copy.copy(experts)
        gating._parameters = {}
        # A method, and no module of this one: it has no weights.
        self._gated: Any = gating._apply_gate if getattr(experts, "has_gate", True) else gating.act_fn
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            chosen = top_k_index == number
            weight = torch.where(chosen, top_k_weights, 0.0).sum(-1, keepdim=True)
            y = down(self._gated(torch.cat([layer(hidden_states) for layer in up], dim=-1)))
            # Not by a weight of zero: what nobody asked for may be infinite.
            total = total + torch.where(chosen.any(-1, keepdim=True), y * weight.to(y.dtype), 0.0)
        return total.to(hidden_states.dtype)
