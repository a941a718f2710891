"""Join products that read the same tensor, as q, k and v or gate and up do, into one over all their columns.

The weights, scales and biases are put behind each other, which folding does once; what each product gave is a
slice of the one result.  A column's sum is what it was: nothing but the number of products changes.  It is
only done where one kernel computes all of it, and where no weight is then there twice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from . import canonical, linear_fusion, matmul_fusion, packed_matmul, torch_ir, views, weight_layouts
from .contracts import scale_kind
from .gated_activation import halves_of
from .hoist import hoist
from .matmul_fusion import Reads
from .residuals import add_behind
from .sites import Ledger
from .torch_ir import TensorType

# The numbers of a product's operands; scales of a quantized weight.
_WEIGHT, _SCALE = 1, 3


@dataclass(frozen=True)
class Form:
    """Describe the products of one operation.

    shared
        The numbers of the operands that siblings have in common; all others have a row for each column of the
        weight, or, as scales of blocks do, for several.
    has_kernel
        Whether a kernel computes such a product with another number of columns, and scales of so many rows.
    """

    shared: tuple[int, ...]
    has_kernel: Callable[[ir.Operation, int, int], bool]


Group = list[ir.Operation]


def forms(reads: Reads) -> dict[str, Form]:
    """The forms of all products, by the name of their operation, where kernels read what ``reads`` says."""

    def scaled(op: ir.Operation, columns: int, scales: int) -> bool:
        return matmul_fusion.has_kernel(op, reads, columns, scales)

    def packed(op: ir.Operation, columns: int, scales: int) -> bool:
        return packed_matmul.has_kernel(op, reads.support, columns)

    def plain(op: ir.Operation, columns: int, scales: int) -> bool:
        return linear_fusion.has_kernel(op, reads.support, columns)

    return {
        canonical.BLOCK_SCALED_MATMUL: Form((0, 2), scaled),
        canonical.PACKED_MATMUL: Form((0,), packed),
        linear_fusion.LINEAR: Form((0,), plain),
    }


def join_siblings(
    block: ir.Block, ledger: Ledger, reads: Reads, is_free: Callable[[Collection[str]], bool]
) -> None:
    """Join the products of ``block`` that are siblings, in place; each made is remarked in ``ledger``.

    A quantization that nothing reads any more stays: it is a site, and equal to the one that is read.

    is_free: whether weights of these names are nobody else's, so that they need not be kept besides.
    """
    known = forms(reads)
    groups = _groups(block, known)
    for group in _unshared(block, groups, is_free):
        form = known[torch_ir.op_name(group[0])]
        reason = _why_apart(group, form)
        if reason is None:
            _join(group, form, ledger)
        else:
            text = f"{len(group)} products of one tensor stay apart: {reason}"
            ledger.remark("siblings", torch_ir.location(group[0]), text)
    for op in [op.operation for op in block.operations]:
        if torch_ir.op_name(op) == canonical.GATED_ACTIVATION:
            _read_halves(op, ledger)


# -- which products are siblings -------------------------------------------------------------------


def _groups(block: ir.Block, known: Mapping[str, Form]) -> list[Group]:
    """The products of each tensor that differ in nothing but their columns, two or more of them."""
    found: dict[tuple[object, ...], Group] = defaultdict(list)
    for op in [op.operation for op in block.operations]:
        form = known.get(torch_ir.op_name(op))
        if form is not None and _can_be_joined(op, form):
            found[_key(op, form)].append(op)
    return [sorted(group, key=_half) for group in found.values() if len(group) > 1]


def _can_be_joined(op: ir.Operation, form: Form) -> bool:
    """Tell whether a kernel computes the product, and a slice can stand for its result without a copy."""
    result = op.results[0]
    weight, type_ = torch_ir.tensor_type(op.operands[_WEIGHT]), torch_ir.tensor_type(result)
    if weight is None or len(weight.shape) != 2 or not all(weight.shape) or type_ is None:
        return False
    if not type_.shape or type_.shape[-1] != weight.shape[0]:
        return False
    if add_behind(result) is not None or _is_returned(result):
        return False
    return form.has_kernel(op, _columns(op), sum(_rows([op], _SCALE) or ()))


def _is_returned(value: ir.Value) -> bool:
    return any(
        user.name == "func.return" or (views.is_view(user) and _is_returned(user.result))
        for user in torch_ir.users(value)
    )


def _key(op: ir.Operation, form: Form) -> tuple[object, ...]:
    """Say what siblings agree in: all but the rows of their weights.  A gate and its up have none besides."""
    result = torch_ir.tensor_type(op.results[0])
    assert result is not None
    own = [operand for number, operand in enumerate(op.operands) if number not in form.shared]
    types = [torch_ir.tensor_type(operand) for operand in own]
    rests = [type_ and (type_.dtype, type_.shape[1:]) for type_ in types]
    contract = str(op.attributes["contract"]) if "contract" in op.attributes else ""
    gate = _gate(op)
    shared = tuple(_same(op.operands[number]) for number in form.shared)
    return (torch_ir.op_name(op), shared, contract, result.dtype, result.shape[:-1], tuple(rests), gate)


def _same(value: ir.Value) -> object:
    """A key that is equal for equal values, also where each product has a quantization of its own."""
    op = torch_ir.producer(value)
    if op is None or not (views.is_view(op) or torch_ir.op_name(op) == canonical.GROUP_QUANT):
        return value
    contract = str(op.attributes["contract"]) if "contract" in op.attributes else ""
    number = ir.OpResult(value).result_number
    return (torch_ir.op_name(op), contract, number, str(value.type), tuple(map(_same, op.operands)))


def _gate(op: ir.Operation) -> ir.Operation | None:
    """The gated activation that alone reads the product, one of its two tensors."""
    users = torch_ir.users(op.results[0])
    alone = len(users) == 1 and torch_ir.op_name(users[0]) == canonical.GATED_ACTIVATION
    return users[0] if alone and len(users[0].operands) == 2 else None


def _half(op: ir.Operation) -> int:
    gate = _gate(op)
    return 0 if gate is None else list(gate.operands).index(op.results[0])


def _unshared(
    block: ir.Block, groups: Sequence[Group], is_free: Callable[[Collection[str]], bool]
) -> list[Group]:
    """The groups of products whose weights are parameters that all their readers join in the same way."""
    frozen = torch_ir.of_parameters(block)
    loads: dict[str, set[ir.Operation]] = defaultdict(set)
    for op in frozen:
        if op.name == "util.global.load":
            loads[ir.FlatSymbolRefAttr(op.attributes["global"]).value].add(op)
    left = [[op for op in group if torch_ir.producer(op.operands[_WEIGHT]) in frozen] for group in groups]
    while True:
        weights = {op: tuple(each.operands[_WEIGHT] for each in group) for group in left for op in group}
        kept = [[op for op in group if _is_joined(op, weights, frozen, loads)] for group in left]
        kept = [group for group in kept if len(group) > 1]
        if kept == left:
            return [group for group in kept if is_free(_names(group))]
        left = kept


def _names(group: Group) -> set[str]:
    return {name for op in group for name in weight_layouts.names(op.operands[_WEIGHT])}


def _is_joined(
    op: ir.Operation,
    weights: Mapping[ir.Operation, tuple[ir.Value, ...]],
    frozen: Collection[ir.Operation],
    loads: Mapping[str, set[ir.Operation]],
) -> bool:
    """Tell whether all that reads the weight of ``op`` are products that are joined with the same ones."""
    if weights[op].count(op.operands[_WEIGHT]) > 1:
        return False
    above = _above(op.operands[_WEIGHT], frozen)
    users = {use.owner.operation for each in above for result in each.results for use in result.uses}
    if any(found & above and not found <= above for found in loads.values()):
        return False
    return all(weights.get(user) == weights[op] for user in users - above)


def _above(value: ir.Value, frozen: Collection[ir.Operation]) -> set[ir.Operation]:
    """What ``value`` is computed of, parameters included, constants not."""
    found: set[ir.Operation] = set()
    pending = [value]
    while pending:
        op = torch_ir.producer(pending.pop())
        if op is not None and op in frozen and op not in found:
            found.add(op)
            pending += op.operands
    return found


# -- joining them ----------------------------------------------------------------------------------


def _why_apart(group: Group, form: Form) -> str | None:
    """Say why no product can take the place of ``group``; None if one can."""
    rows = [_rows(group, number) for number in _own(group[0], form)]
    columns = sum(_columns(op) for op in group)
    if None in rows:
        return "a block of their scales would reach over the end of a weight"
    scales = sum(_rows(group, _SCALE) or ())
    if not all(form.has_kernel(op, columns, scales) for op in group):
        return f"there is no kernel of one of {columns} columns"
    if not all(hoist(op.operands[number], group[0]) for op in group[1:] for number in _own(op, form)):
        return "a weight is computed from what the first of them gives"
    return None


def _own(op: ir.Operation, form: Form) -> list[int]:
    """The numbers of the operands that have rows for the columns of ``op``."""
    optional = [number for number in range(len(op.operands)) if number not in form.shared]
    return [number for number in optional if torch_ir.tensor_type(op.operands[number]) is not None]


def _columns(op: ir.Operation) -> int:
    result = torch_ir.tensor_type(op.results[0])
    assert result is not None and result.shape[-1] is not None
    return result.shape[-1]


def _rows(group: Group, number: int) -> list[int] | None:
    """How many rows of the joined operand ``number`` are each product's; None where a block would be cut."""
    types = [torch_ir.tensor_type(op.operands[number]) for op in group if number < len(op.operands)]
    rows = [type_.shape[0] for type_ in types if type_ is not None and type_.shape[0] is not None]
    if torch_ir.op_name(group[0]) != canonical.BLOCK_SCALED_MATMUL or number != _SCALE:
        return rows
    weight = torch_ir.tensor_type(group[0].operands[_WEIGHT])
    assert weight is not None and weight.shape[1] is not None
    if any(type_ is None or len(type_.shape) != 2 for type_ in types):
        return None
    columns, depth = [_columns(op) for op in group], weight.shape[1]
    kinds = [scale_kind(type_.shape, n, depth) for type_, n in zip(types, columns, strict=True) if type_]
    groups = (types[0].shape[1] if types[0] is not None else None) or 1
    if all(kind == "rows" for kind in kinds):
        return rows
    if all(kind == "blocks" for kind in kinds) and not any(n % (depth // groups) for n in columns[:-1]):
        return rows
    one_each = groups == 1 and all(n in (1, count) for n, count in zip(rows, columns, strict=True))
    return columns if one_each else None


def _join(group: Group, form: Form, ledger: Ledger) -> None:
    """Replace the products of ``group`` by one, and what each gave by its part of the result."""
    first, columns = group[0], [_columns(op) for op in group]
    result, example = torch_ir.tensor_type(first.results[0]), torch_ir.example_shape(first.results[0])
    assert result is not None
    operands = list(first.operands)
    with ir.InsertionPoint(first), first.location:
        for number in _own(first, form):
            rows = _rows(group, number)
            assert rows is not None
            operands[number] = _stacked([op.operands[number] for op in group], rows)
        whole = _product(group, operands, result.with_last(sum(columns)))
        if example is not None:
            torch_ir.set_example(whole.owner.operation, [(*example[:-1], sum(columns))])
    start = 0
    for op, count in zip(group, columns, strict=True):
        for view in [user for user in torch_ir.users(op.results[0]) if _heads(user)]:
            _cut_heads(view, whole, start, math.gcd(*columns))
        with ir.InsertionPoint(first), first.location:
            part = _part(whole, -1, start, count, torch_ir.example_shape(op.results[0]))
        op.results[0].replace_all_uses_with(part)
        start += count
    text = f"{len(group)} products of one tensor are one, of {' + '.join(map(str, columns))} columns"
    ledger.remark("siblings", torch_ir.location(first), text)
    for op in group:
        op.erase()


def _stacked(parts: Sequence[ir.Value], rows: Sequence[int]) -> ir.Value:
    """``parts`` behind each other along their first axis; one of a single row may stand for several."""
    found = []
    for part, count in zip(parts, rows, strict=True):
        type_ = torch_ir.tensor_type(part)
        assert type_ is not None
        if type_.shape[0] != count:
            sizes = torch_ir.make_int_list([torch_ir.make_int(count), torch_ir.make_int(-1)])
            wanted = replace(type_, shape=(count, *type_.shape[1:]))
            part = torch_ir.make("torch.aten.expand", wanted, [part, sizes, torch_ir.make_bool(False)])
        found.append(part)
    type_ = torch_ir.tensor_type(found[0])
    assert type_ is not None
    tensors = ir.Operation.create(
        "torch.prim.ListConstruct", results=[ir.Type.parse("!torch.list<vtensor>")], operands=found
    ).result
    joined = replace(type_, shape=(sum(rows), *type_.shape[1:]))
    return torch_ir.make("torch.aten.cat", joined, [tensors, torch_ir.make_int(0)])


def _product(group: Group, operands: Sequence[ir.Value], result: TensorType) -> ir.Value:
    """The product of ``operands``, which stands for the sites of all of ``group``."""
    first = group[0]
    if first.name != "torch.operator":
        return torch_ir.make(first.name, result, operands)
    names = ("contract", canonical.SITE)
    attributes = {name: first.attributes[name] for name in names if name in first.attributes}
    if canonical.SITE in attributes:
        attributes[canonical.SITES] = ir.ArrayAttr.get([op.attributes[canonical.SITE] for op in group])
    return canonical.create(torch_ir.op_name(first), operands, [result], **attributes).result


def _part(whole: ir.Value, axis: int, start: int, count: int, example: Sequence[int] | None) -> ir.Value:
    """What ``whole`` has along ``axis`` from ``start`` on."""
    type_ = torch_ir.tensor_type(whole)
    assert type_ is not None
    shape, axis = list(type_.shape), axis % len(type_.shape)
    shape[axis] = count
    bounds = [torch_ir.make_int(n) for n in (axis, start, start + count, 1)]
    part = torch_ir.make("torch.aten.slice.Tensor", replace(type_, shape=tuple(shape)), [whole, *bounds])
    torch_ir.set_example(part.owner.operation, [example])
    return part


def _heads(view: ir.Operation) -> tuple[int, int] | None:
    """How many heads ``view`` makes of the last axis, and the size of one; None if it does not."""
    if view.name != "torch.aten.view":
        return None
    before, after = torch_ir.tensor_type(view.operands[0]), torch_ir.tensor_type(view.result)
    if before is None or after is None or len(after.shape) < 2 or None in after.shape[-2:]:
        return None
    count, size = after.shape[-2:]
    return (count, size) if count and size and count * size == before.shape[-1] else None


def _cut_heads(view: ir.Operation, whole: ir.Value, start: int, common: int) -> None:
    """Let ``view``, of the columns from ``start`` on, take its heads from those of ``whole``.

    A slice of rows that are next to each other is read where it is by more of what IREE makes than one of
    columns that are regrouped afterwards.
    """
    (count, size), type_ = _heads(view) or (0, 1), torch_ir.tensor_type(view.result)
    columns, sizes = torch_ir.tensor_type(whole), torch_ir.producer(view.operands[1])
    if type_ is None or columns is None or sizes is None or common % size:
        return
    total = (columns.shape[-1] or 0) // size
    with ir.InsertionPoint(view), view.location:
        *leading, _, last = sizes.operands
        wanted = torch_ir.make_int_list([*leading, torch_ir.make_int(total), last])
        shape = (*type_.shape[:-2], total, size)
        heads = torch_ir.make("torch.aten.view", replace(type_, shape=shape), [whole, wanted])
        example = torch_ir.example_shape(view.result)
        if example is not None:
            torch_ir.set_example(heads.owner.operation, [(*example[:-2], total, size)])
        part = _part(heads, -2, start // size, count, example)
    view.result.replace_all_uses_with(part)
    view.erase()


def _read_halves(gate: ir.Operation, ledger: Ledger) -> None:
    """Let a gated activation whose tensors are now halves of one read that one."""
    contract = canonical.gate_contract(gate)
    whole = None if contract.packed else halves_of(*gate.operands)
    if whole is None:
        return
    result, packed = torch_ir.tensor_type(gate.results[0]), replace(contract, packed=True)
    assert result is not None
    kept = {name: gate.attributes[name] for name in gate.attributes if name not in ("name", "contract")}
    with ir.InsertionPoint(gate), gate.location:
        made = canonical.create(
            canonical.GATED_ACTIVATION, [whole], [result], contract=canonical.to_attribute(packed), **kept
        )
    ledger.records[canonical.site_of(gate)].contract = packed
    gate.results[0].replace_all_uses_with(made.result)
    gate.erase()
