"""Look once, when compiling, at the values of the scales of quantized weights.

A NaN, an infinity or a negative number among them is a damaged checkpoint or one that was quantized wrongly;
the program would compute NaN for a block of outputs, and say nothing.  A zero is what a block of zeros has (a
padded vocabulary, a pruned expert): any number times zero, as long as it is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from iree.compiler import ir

from patterns import canonical, torch_ir, weight_layouts

from ..errors import CompileError
from ..importing.importer import Program
from ..weights.recipes import Call, Recipe, Source

_WEIGHT = 1  # which operand of a product it is
# The scale's, by the product's name.
_SCALES = {
    canonical.MATMUL: 3,
    canonical.BLOCK_SCALED_MATMUL: 3,
    canonical.PACKED: 2,
    canonical.PACKED_MATMUL: 2,
}
_AT_ONCE = 1 << 24  # codes that are looked at together


def check_scales(program: Program) -> None:
    """Raise CompileError if a scale of a weight makes no numbers of its codes, naming it and an element.

    Only scales that are parameters, folded ones among them; one is held in memory at a time, and the weight
    of one that has a zero.
    """
    seen: set[str] = set()
    for op in [op.operation for op in torch_ir.block_of(program.main()).operations]:
        number = _SCALES.get(torch_ir.op_name(op))
        if number is None:
            continue
        name = _name(op.operands[number])
        if name in program.parameters and name not in seen:
            seen.add(name)
            where = torch_ir.location(op)
            has_zeros = [_check(part, scale, where) for part, scale in _parts(program, name)]
            codes = _name(op.operands[_WEIGHT])
            if any(has_zeros) and codes in program.parameters:
                _check_codes(name, codes, _value(program, codes), where)


def _name(value: ir.Value) -> str:
    """The parameter that ``value`` is; empty if it is none."""
    load = weight_layouts.parameter(value)
    return ir.FlatSymbolRefAttr(load.attributes["global"]).value if load is not None else ""


def _value(program: Program, name: str) -> torch.Tensor:
    stored = program.parameters[name]
    return stored.evaluate() if isinstance(stored, Recipe) else stored


def _parts(program: Program, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The scales ``name``; of joined ones each parameter's, by its own name."""
    stored = program.parameters[name]
    joined = stored.origin if isinstance(stored, Recipe) else None
    if not isinstance(joined, Call) or joined.op != torch.ops.aten.cat.default:
        yield name, _value(program, name)
        return
    for part in joined.operands:
        origin = part.origin
        if isinstance(origin, Source):
            yield origin.name or name, origin.tensor
        else:
            yield name, part.evaluate()


def _check(name: str, scale: torch.Tensor, where: str) -> bool:
    """Refuse what no scale is; whether there is a zero among ``scale``."""
    good = scale.isfinite() & (scale >= 0)
    if good.all():
        return bool((scale == 0).any())
    first = torch.nonzero(~good)[0].tolist()
    value = scale[tuple(first)].item()
    raise CompileError(
        f"{where}: the scale {name!r} of a product's weight is {value} at {first}; {int((~good).sum())} of "
        f"its {scale.numel()} elements are negative or no numbers: quantize the weight again"
    )


def _check_codes(scale: str, name: str, codes: torch.Tensor, where: str) -> None:
    """That there is nothing among ``codes`` that times a ``scale`` of zero is not zero."""
    flat = codes.flatten()
    if not all(part.float().isfinite().all() for part in flat.split(_AT_ONCE)):
        raise CompileError(
            f"{where}: the scale {scale!r} of a product's weight has zeros, and the codes {name!r} hold NaN "
            "or infinities, which times zero are NaN: quantize the weight again"
        )
