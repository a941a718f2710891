"""Shared by tests: a function as a model, what it is raised to and what becomes of its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from iree.compiler import ir
from torch import nn

from lowering.importing.importer import import_module
from lowering.passes.fuse import fuse
from lowering.passes.normalize import normalize
from lowering.passes.raise_ops import raise_function
from lowering.passes.sink_views import sink_views
from patterns import canonical, torch_ir
from patterns.row_fusion import Support
from patterns.sites import Ledger


class Function(nn.Module):
    """A function of tensors, with a weight of 256 elements as its first argument."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(256).to(dtype), requires_grad=False)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self.weight, *args)


def contracts(module: nn.Module, *args: torch.Tensor) -> list[Any]:
    """The contracts of the canonical operations ``module`` is raised to, in order."""
    context = ir.Context()
    program = import_module(module, args, context)
    readers = {
        canonical.NORM: canonical.norm_contract,
        canonical.GATED_ACTIVATION: canonical.gate_contract,
        canonical.GROUP_QUANT: canonical.quantization,
    }
    with context, ir.Location.unknown():
        function = program.main()
        normalize(function)
        raise_function(function, Ledger())
        ops = [op.operation for op in torch_ir.block_of(function).operations]
        return [readers[name](op) for op in ops if (name := torch_ir.op_name(op)) in readers]


def sites(
    module: nn.Module, *args: torch.Tensor, support: Support = lambda spec: None, **options: Any
) -> Ledger:
    """The ledger of ``module`` after all steps that need no kernel; by default there is one for each row."""
    context, ledger = ir.Context(), Ledger()
    program = import_module(module, args, context, **options)
    with context, ir.Location.unknown():
        function = program.main()
        normalize(function)
        raise_function(function, ledger)
        program.module.operation.verify()
        sink_views(function)
        fuse(function, ledger, support)
        program.module.operation.verify()
    return ledger


def integers(*shape: int) -> torch.Tensor:
    """Small integers: the sum of their squares is exact in any order, so results are equal bit for bit."""
    return torch.randint(-8, 9, shape).to(torch.bfloat16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN and -0 is not 0."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(width)
