"""Step 3, raise: make every recognised spelling a canonical op and a site in the ledger.

What looks like a site and was not recognised becomes one too, unfused, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from iree.compiler import ir

from patterns import canonical, torch_ir
from patterns.recogniser import NearMiss, Raised, Recogniser, Suspicion, WithoutLastAxis
from patterns.sites import Ledger
from patterns.torch_ir import TensorType

from ..families.registry import families, operation_named, operation_of


def recognisers() -> tuple[Recogniser, ...]:
    """Collect the recognisers of all families."""
    return tuple(recogniser for family in families() for recogniser in family.patterns.recognisers)


def raise_function(function: ir.Operation, ledger: Ledger, asked: Iterable[Recogniser] | None = None) -> None:
    """Replace every spelling a recogniser knows, in place, and open a site for it in ``ledger``.

    What depends on parameters alone is computed when compiling, and is no site.
    """
    by_root: dict[str, list[Recogniser]] = defaultdict(list)
    for recogniser in recognisers() if asked is None else asked:
        for root in recogniser.roots:
            by_root[root].append(recogniser)
    block = torch_ir.block_of(function)
    computed_once = torch_ir.of_parameters(block)
    # Last operations first: the product with the weight must be tried before the norm inside it.
    for op in reversed([op.operation for op in block.operations if op.operation not in computed_once]):
        raised = None if torch_ir.is_left_over(op) else _recognise(op, by_root, ledger)
        if raised is not None:
            inside = _inside(raised)
            with ir.InsertionPoint(_first(op, raised)), (raised.place or op).location:
                _create(raised)
            torch_ir.mark_raised(inside)
    torch_ir.erase_dead(block)
    _open_sites(block, ledger)


def _recognise(
    op: ir.Operation, by_root: Mapping[str, Sequence[Recogniser]], ledger: Ledger
) -> Raised | None:
    for recogniser in by_root.get(torch_ir.op_name(op), ()):
        raised = ledger.timing.of(_name(recogniser)).call(recogniser.recognise, op)
        if raised is not None and _is_well_typed(raised):
            return raised
    return None


def _is_well_typed(raised: Raised) -> bool:
    """Tell whether ``raised``, and what is nested in it, has the types that its operation speaks of."""
    operation = operation_named(raised.op)
    operands = [_type_of(operand) for operand in raised.operands]
    results = [_type(result) for result in raised.results if result is not None]
    nested = (operand for operand in raised.operands if isinstance(operand, Raised))
    fits = operation is None or operation.why_not(raised.contract, operands, results) is None
    return fits and all(map(_is_well_typed, nested))


def _type_of(operand: ir.Value | Raised) -> TensorType | None:
    if not isinstance(operand, Raised):
        return torch_ir.tensor_type(operand)
    first = operand.results[0]
    return None if first is None else _type(first)


def _name(recogniser: Recogniser) -> str:
    """Name a recogniser, for its time: its class, and its row where it is one of a table."""
    row = getattr(recogniser, "name", None)
    return f"{type(recogniser).__name__} {row}" if row else type(recogniser).__name__


def _inside(raised: Raised) -> list[ir.Operation]:
    """The operations that ``raised`` stands for: what computes its results from its operands, in order."""
    ends = _tensors(raised)
    above: set[ir.Operation] = set()
    values = _replaced(raised)
    while values:
        op = torch_ir.producer(values.pop())
        if op is not None and op not in above:
            above.add(op)
            values += [operand for operand in op.operands if operand not in ends]
    inside: set[ir.Operation] = set()
    values = ends
    while values:
        new = {use.owner.operation for use in values.pop().uses} & above - inside
        inside |= new
        values += [result for op in new for result in op.results]
    return torch_ir.in_block_order(inside)


def _tensors(raised: Raised) -> list[ir.Value]:
    """The operands of ``raised``, and of what is nested in it."""
    operands = [_tensors(item) if isinstance(item, Raised) else [item] for item in raised.operands]
    return [value for values in operands for value in values]


def _replaced(raised: Raised) -> list[ir.Value]:
    """The values that results replace."""
    olds = [result.value if isinstance(result, WithoutLastAxis) else result for result in raised.results]
    return [old for old in olds if isinstance(old, ir.Value)]


def _first(op: ir.Operation, raised: Raised) -> ir.Operation:
    """The first of ``op`` and what makes the values to be replaced: readers of a scale may come before q."""
    first = op
    for value in _replaced(raised):
        maker = torch_ir.producer(value)
        if maker is not None and maker != first and maker.is_before_in_block(first):
            first = maker
    return first


def _create(raised: Raised) -> ir.Operation:
    """Make the canonical op, and those nested in it, here; what they replace is replaced."""
    operands = [_create(item).results[0] if isinstance(item, Raised) else item for item in raised.operands]
    results = [result for result in raised.results if result is not None]
    attributes = {}
    if raised.contract is not None:
        attributes["contract"] = canonical.to_attribute(raised.contract)
    new = canonical.create(raised.op, operands, [_type(result) for result in results], **attributes)
    torch_ir.set_example(new, [_example(result) for result in results])
    for old, value in zip(results, new.results, strict=True):
        if isinstance(old, WithoutLastAxis):
            old.value.replace_all_uses_with(_without_last_axis(value, old.value))
        elif not isinstance(old, TensorType):
            old.replace_all_uses_with(value)
    return new


def _type(result: ir.Value | WithoutLastAxis | TensorType) -> TensorType:
    if isinstance(result, TensorType):
        return result
    type_ = torch_ir.tensor_type(result.value if isinstance(result, WithoutLastAxis) else result)
    assert type_ is not None
    return TensorType((*type_.shape, 1), type_.dtype) if isinstance(result, WithoutLastAxis) else type_


def _example(result: ir.Value | WithoutLastAxis | TensorType) -> Sequence[int] | None:
    if isinstance(result, TensorType):
        return None
    if isinstance(result, WithoutLastAxis):
        shape = torch_ir.example_shape(result.value)
        return None if shape is None else (*shape, 1)
    return torch_ir.example_shape(result)


def _without_last_axis(value: ir.Value, old: ir.Value) -> ir.Value:
    type_ = torch_ir.tensor_type(old)
    assert type_ is not None
    dropped = torch_ir.make("torch.aten.squeeze.dim", type_, [value, torch_ir.make_int(len(type_.shape))])
    torch_ir.set_example(dropped.owner.operation, [torch_ir.example_shape(old)])
    return dropped


def _open_sites(block: ir.Block, ledger: Ledger) -> None:
    """Number the sites in the order of the program, now that spellings inside others are gone.

    What looks like a site and was taken by no recogniser is one that says why it did not fuse.
    """
    computed_once = torch_ir.of_parameters(block)
    for op in [op.operation for op in block.operations if op.operation not in computed_once]:
        operation = operation_of(op)
        if operation is not None and operation.site is not None:
            contract = operation.value(op)
            name = operation.site(contract)
            number = ledger.add(name, torch_ir.location(op), contract, canonical.cost(op))
        elif torch_ir.unmark_raised(op) or (near := _near_miss(op)) is None:
            continue
        elif near.is_site:
            number = ledger.add(near.op, torch_ir.location(op), before=canonical.cost(op))
            ledger.refuse(number, near.reason)
        else:
            ledger.remark(near.op, torch_ir.location(op), near.reason)
            continue
        op.attributes[canonical.SITE] = canonical.to_attribute(number)


def _near_miss(op: ir.Operation) -> NearMiss | None:
    looks = (suspicion.why_not(op) for suspicion in _suspicions().get(torch_ir.op_name(op), ()))
    return next((near for near in looks if near is not None), None)


@cache
def _suspicions() -> dict[str, list[Suspicion]]:
    by_root: dict[str, list[Suspicion]] = defaultdict(list)
    for family in families():
        for suspicion in family.patterns.suspicions:
            for root in suspicion.roots:
                by_root[root].append(suspicion)
    return by_root
