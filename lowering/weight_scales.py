"""The values of the scales of quantized weights, looked at once, when compiling.

A NaN or a zero among them is a damaged checkpoint or one that was quantized wrongly; the program would
compute NaN or nothing for a block of outputs, and say nothing.
"""

from __future__ import annotations

import torch
from iree.compiler import ir

from patterns import canonical, torch_ir, weight_layouts

from .errors import CompileError
from .importer import Program
from .recipes import Recipe

_SCALE = 3  # which operand of a product it is


def check_scales(program: Program) -> None:
    """Raise CompileError if a scale of a weight is no positive number, naming the parameter and the element.

    Only scales that are parameters, folded ones among them; one is held in memory at a time.
    """
    seen: set[str] = set()
    for op in [op.operation for op in torch_ir.block_of(program.main()).operations]:
        if torch_ir.op_name(op) not in (canonical.MATMUL, canonical.BLOCK_SCALED_MATMUL):
            continue
        load = weight_layouts.parameter(op.operands[_SCALE])
        name = ir.FlatSymbolRefAttr(load.attributes["global"]).value if load is not None else ""
        if name in program.parameters and name not in seen:
            seen.add(name)
            stored = program.parameters[name]
            _check(name, stored.evaluate() if isinstance(stored, Recipe) else stored, torch_ir.location(op))


def _check(name: str, scale: torch.Tensor, where: str) -> None:
    good = scale.isfinite() & (scale > 0)
    if good.all():
        return
    first = torch.nonzero(~good)[0].tolist()
    value = scale[tuple(first)].item()
    raise CompileError(
        f"{where}: the scale {name!r} of a product's weight is {value} at {first}; {int((~good).sum())} of "
        f"its {scale.numel()} elements are no positive numbers: quantize the weight again, "
        "a block of zeros with any scale but zero"
    )
