"""What is left without a kernel, spelled in plain torch operations."""

from __future__ import annotations

import torch
from iree.compiler import ir

from lowering.importing.importer import import_module
from lowering.passes.expand import Expander
from lowering.passes.normalize import normalize
from lowering.passes.raise_ops import raise_function
from patterns import torch_ir
from patterns.sites import Ledger


class Quantized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.lowering.group_quant(x + 1, 128)


def test_every_operation_is_of_the_models_line() -> None:
    """So that an error about one of them names what the user wrote, not the reference it was copied from."""
    context, ledger = ir.Context(), Ledger()
    program = import_module(Quantized(), (torch.randn(3, 256),), context)
    with context, ir.Location.unknown():
        function = program.main()
        normalize(function)
        raise_function(function, ledger)
        assert Expander().expand(function) == 1
        ops = [op.operation for op in torch_ir.block_of(function).operations]
        lines = {torch_ir.location(op) for op in ops if op.name.startswith("torch.aten.")}
    line = Quantized.forward.__code__.co_firstlineno + 1
    assert len(ops) > 10 and lines == {f"{__file__}:{line}"} == {ledger.records[0].location}
