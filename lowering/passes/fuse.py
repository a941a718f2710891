"""Step 5, fuse: let each family give its operations to kernels, as far as the target has them."""

from __future__ import annotations

from collections.abc import Iterable

from iree.compiler import ir

from patterns import torch_ir
from patterns.operation import Support
from patterns.sites import Ledger

from ..families.base import Family
from ..families.registry import families


def fuse(
    function: ir.Operation, ledger: Ledger, support: Support, asked: Iterable[Family] | None = None
) -> None:
    """Fuse every site of ``function`` in place; ``support`` says why a spec has no kernel, or None.

    Every site's fate is in ``ledger``.  Block-scaled products are no sites; ``lay_out`` gives them kernels.
    """
    block = torch_ir.block_of(function)
    for family in families() if asked is None else asked:
        if family.patterns.fuse is not None:
            family.patterns.fuse(block, ledger, support)
    torch_ir.erase_dead(block)
