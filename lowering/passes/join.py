"""Step 5, before anything fuses: make the products that read the same tensor one, over all their weights.

Which products those are, and what becomes of them, is in ``patterns.siblings``.  Here is what only a whole
program knows: which weights it holds, and which of them its other functions read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from iree.compiler import ir

from patterns import torch_ir
from patterns.matmul_fusion import Reads
from patterns.siblings import join_siblings
from patterns.sites import Ledger

from ..importing.importer import Program


def join(program: Program, others: Sequence[Program], ledger: Ledger, reads: Reads) -> None:
    """Join the products of ``program`` in place, unless another function needs one of the weights by itself.

    others: the program's other functions.  One that reads all weights of a group joins them as well.
    """
    read = [_parameters(other.main()) for other in others]

    def is_free(names: Collection[str]) -> bool:
        stored = all(isinstance(program.parameters.get(name), torch.Tensor) for name in names)
        return stored and all(not found.intersection(names) or found.issuperset(names) for found in read)

    join_siblings(torch_ir.block_of(program.main()), ledger, reads, is_free)


def _parameters(function: ir.Operation) -> set[str]:
    """The names of what ``function`` loads."""
    loads = [op.operation for op in torch_ir.block_of(function).operations if op.operation.name == _LOAD]
    return {ir.FlatSymbolRefAttr(load.attributes["global"]).value for load in loads}


_LOAD = "util.global.load"
