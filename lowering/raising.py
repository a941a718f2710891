"""Step 3, raise: every recognised spelling becomes a canonical op and a site in the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from iree.compiler import ir

from patterns import canonical, gated_activation, group_quant, named_ops, rms_norm, torch_ir
from patterns.recogniser import Raised, Recogniser
from patterns.sites import Ledger
from patterns.torch_ir import TensorType

RECOGNISERS: tuple[Recogniser, ...] = (
    *named_ops.RECOGNISERS,
    *rms_norm.RECOGNISERS,
    *gated_activation.RECOGNISERS,
    *group_quant.RECOGNISERS,
)


def raise_function(
    function: ir.Operation, ledger: Ledger, recognisers: Iterable[Recogniser] = RECOGNISERS
) -> None:
    """Replace every spelling a recogniser knows, in place, and open a site for it in ``ledger``."""
    by_root: dict[str, list[Recogniser]] = defaultdict(list)
    for recogniser in recognisers:
        for root in recogniser.roots:
            by_root[root].append(recogniser)
    block = torch_ir.block_of(function)
    # Last operations first: the product with the weight must be tried before the norm inside it.
    for op in reversed([op.operation for op in block.operations]):
        for recogniser in by_root.get(torch_ir.op_name(op), ()):
            raised = ledger.timing.of(_name(recogniser)).call(recogniser.recognise, op)
            if raised is not None:
                _create(op, raised)
                break
    torch_ir.erase_dead(block)
    _open_sites(block, ledger)


def _name(recogniser: Recogniser) -> str:
    """What a recogniser is called beside its time: its class, and its row where it is one of a table."""
    row = getattr(recogniser, "name", None)
    return f"{type(recogniser).__name__} {row}" if row else type(recogniser).__name__


def _create(op: ir.Operation, raised: Raised) -> ir.Operation:
    """Make the canonical op, and those nested in it, before ``op``; what they replace is replaced."""
    operands = [_create(op, v).results[0] if isinstance(v, Raised) else v for v in raised.operands]
    results = [value for value in raised.results if value is not None]
    types = [v if isinstance(v, TensorType) else torch_ir.tensor_type(v) for v in results]
    attributes = {}
    if raised.contract is not None:
        attributes["contract"] = canonical.to_attribute(raised.contract)
    with ir.InsertionPoint(op), op.location:
        new = canonical.create(raised.op, operands, [t for t in types if t is not None], **attributes)
    shapes = [None if isinstance(v, TensorType) else torch_ir.example_shape(v) for v in results]
    torch_ir.set_example(new, shapes)
    for old, value in zip(results, new.results, strict=True):
        if not isinstance(old, TensorType):
            old.replace_all_uses_with(value)
    return new


def _open_sites(block: ir.Block, ledger: Ledger) -> None:
    """Number the sites in the order of the program, now that spellings inside others are gone."""
    for op in [op.operation for op in block.operations]:
        name = canonical.site_name(op)
        if name is not None:
            number = ledger.add(name, torch_ir.location(op), canonical.contract(op), canonical.cost(op))
            op.attributes[canonical.SITE] = canonical.to_attribute(number)
