"""Fuse rows: a producer takes all its quantizations, and the add before it, into one row kernel.

It starts at the producer (a norm, or any tensor that is quantized) and looks at everything that
reads it, so fan-out, equal quantizations and readers of the unquantized value need no patterns of
their own.  Whatever is left out is refused in the ledger with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from iree.compiler import ir

from . import canonical, splits, torch_ir, views
from .contracts import GatedActivation, Norm, Quantization, RowSpec
from .hoist import hoist
from .operation import Operation, Support, Types
from .sites import Ledger
from .torch_ir import TensorType
from .well_typed import is_given_scale
from .windows import wider

_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Inputs:
    """Hold what a row kernel reads, in the order of its operands, and where it must stand.

    ``sum`` is the eager value the kernel can write back instead (an absorbed add's, or the second
    result of an add_rms_norm).  ``gated`` is the norm whose value is the other factor of a gate: then x is
    what it norms, and ``up`` the gate.  So it is with ``gate_first``, where the product is what is normed.
    """

    x: ir.Value
    before: ir.Operation
    norm: Norm | None = None
    gate: GatedActivation | None = None
    up: ir.Value | None = None
    residual: ir.Value | None = None
    weight: ir.Value | None = None
    bias: ir.Value | None = None
    sum: ir.Value | None = None
    gated: ir.Operation | None = None
    gate_first: bool = False

    def operands(self) -> list[ir.Value]:
        return [v for v in (self.x, self.up, self.residual, self.weight, self.bias) if v is not None]


def fuse_rows(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Fuse every producer with what quantizes it, then the quantizations of any other tensor."""
    for producer in _ops(block, *canonical.PRODUCERS):
        fuse_producer(producer, ledger, support)
    values = dict.fromkeys(quant.operands[0] for quant in _ops(block, canonical.GROUP_QUANT))
    for value in reversed(values):  # scales that are quantized in turn are replaced with what makes them
        fuse_plain(value, ledger, support)


def _ops(block: ir.Block, *names: str) -> list[ir.Operation]:
    return [op.operation for op in block.operations if torch_ir.op_name(op.operation) in names]


def fuse_producer(producer: ir.Operation, ledger: Ledger, support: Support, *, alone: bool = False) -> None:
    """Fuse a norm or gated activation with all quantizations of its result, or refuse it with a reason.

    alone: a norm that a gate reads, and that has no kernel with it.
    """
    if not alone and _is_gated(producer, support):
        return  # by what reads it, whose turn comes later
    value = producer.results[0]
    quants = [op for op in torch_ir.users(value) if torch_ir.op_name(op) == canonical.GROUP_QUANT]
    refusal = _why_no_row(value)
    if refusal is None:
        inputs = _absorb_norm(_absorb_add(_producer_inputs(producer)), producer, support)
        refusal = support(_spec(inputs, value, [], writes_y=True))
    if refusal is not None:
        _refuse_producer(producer, quants, refusal, ledger)
        return
    known = _known(quants, inputs.before)
    _mark_blocked([op for op in quants if op not in known], views.SCALE_COMES_LATER)
    quants = _supported(known, inputs, value, ledger, support)
    others = [op for op in torch_ir.users(value) if op not in quants]
    first, *more = _batches(quants, inputs, value, support)
    spec = _spec(inputs, value, first, writes_y=bool(others) or not quants)
    refusal = _why_not_written(value, spec) or support(spec)
    if refusal is not None:
        _refuse_producer(producer, quants, refusal, ledger)
        if inputs.gated is not None:
            fuse_producer(inputs.gated, ledger, support, alone=True)
        return
    if inputs.gate is not None and not inputs.gate_first:
        splits.note_gated_norms(producer, ledger)
    again = replace(inputs, sum=None)
    for batch in more:  # each reads the row again, which costs no more than to read y
        _replace(again, value, _spec(again, value, batch), [], batch, ledger)
    norm = [] if inputs.gated is None else [inputs.gated]
    _replace(inputs, value, spec, [*norm, producer], first, ledger)


def fuse_plain(value: ir.Value, ledger: Ledger, support: Support) -> None:
    """Fuse all quantizations of a tensor that nothing here produces, or refuse each with a reason."""
    quants = [op for op in torch_ir.users(value) if torch_ir.op_name(op) == canonical.GROUP_QUANT]
    refusal = _why_no_row(value)
    if refusal is not None:
        _refuse(quants, refusal, ledger)
        return
    quants = _supported(quants, Inputs(value, before=quants[0]), value, ledger, support)
    _mark_blocked(quants, splits.why_split(value))
    while quants:  # scales that are given may be known only after others are made
        inputs = Inputs(value, before=quants[0])
        known = _known(quants, quants[0])
        quants = [op for op in quants if op not in known]
        for batch in _batches(known, inputs, value, support):
            inputs = Inputs(value, before=batch[0])
            _replace(inputs, value, _spec(inputs, value, batch), [], batch, ledger)


def _why_no_row(value: ir.Value) -> str | None:
    type_ = torch_ir.tensor_type(value)
    if type_ is None or not type_.shape:
        return "the tensor's rank is unknown or zero"
    if type_.shape[-1] is None:
        return "the size of the last axis is unknown until run time; a kernel is made for one size"
    if type_.dtype not in _FLOATS:
        return f"{type_.dtype} rows have no kernel; {', '.join(_FLOATS)} have"
    return None


def _why_not_written(value: ir.Value, spec: RowSpec) -> str | None:
    type_ = torch_ir.tensor_type(value)
    if not spec.writes_y or type_ is None or type_.dtype == spec.y_dtype:
        return None
    return f"something reads its {type_.dtype} value, and the row kernel writes {spec.y_dtype}, as it reads"


def _producer_inputs(producer: ir.Operation) -> Inputs:
    x, *rest = list(producer.operands)
    if torch_ir.op_name(producer) == canonical.GATED_ACTIVATION:
        return Inputs(x, producer, gate=canonical.gate_contract(producer), up=rest[0] if rest else None)
    contract = canonical.norm_contract(producer)
    gate = rest.pop(0) if contract.gate else None
    residual = rest.pop(0) if contract.residual else None
    bias = rest.pop() if contract.bias else None
    weight = rest.pop(0) if rest else None
    total = producer.results[1] if contract.residual else None
    return Inputs(
        *(x, producer, replace(contract, gate=None), contract.gate, gate, residual, weight, bias, total),
        gate_first=gate is not None,
    )


def _absorb_add(inputs: Inputs) -> Inputs:
    """Let the kernel do the eager ``x + residual`` before the norm, when nothing forbids it.

    The kernel stands where the norm stood, or where the add stood if the sum is read before the
    norm; there the weight must be known already, or the add stays outside.
    """
    add = torch_ir.producer(inputs.x)
    if inputs.norm is None or inputs.norm.residual is not None or inputs.gate_first:
        return inputs
    if add is None or not torch_ir.is_plain_add(add):
        return inputs
    before = inputs.before
    early = [op for op in torch_ir.users(add.result) if op != before and op.is_before_in_block(before)]
    if early:
        vectors = [vector for vector in (inputs.weight, inputs.bias) if vector is not None]
        if not all(torch_ir.dominates(vector, add) for vector in vectors):
            return inputs
        before = add
    x, residual, _ = list(add.operands)
    # In float32 there is nothing to round: one contract, and so one kernel, for both.
    rounded = torch_ir.tensor_type(x) and torch_ir.tensor_type(x).dtype != "float32"  # type: ignore[union-attr]
    norm = replace(inputs.norm, residual="rounded" if rounded else "exact")
    return replace(inputs, norm=norm, x=x, residual=residual, sum=add.result, before=before)


def _known(quants: list[ir.Operation], place: ir.Operation) -> list[ir.Operation]:
    """The quantizations whose scale, where it is given, can be known where ``place`` stands."""
    givens = [(op, canonical.given_scale(op)) for op in quants]
    return [op for op, given in givens if given is None or hoist(given, place)]


def _batches(
    quants: list[ir.Operation], inputs: Inputs, value: ir.Value, support: Support
) -> list[list[ir.Operation]]:
    """Share ``quants``, each of which has a kernel, among as few kernels as have one; at least one batch."""
    batches: list[list[ir.Operation]] = [[]]
    for group in _distinct(quants).values():
        together = [*batches[-1], *group]
        if batches[-1] and support(_spec(inputs, value, together, writes_y=False)) is not None:
            batches.append(group)
        else:
            batches[-1] = together
    return batches


def _absorb_norm(inputs: Inputs, gate: ir.Operation, support: Support) -> Inputs:
    """Let the kernel of a gate norm what it is multiplied with, where nothing else reads that."""
    norm = None if inputs.up is None or inputs.gate_first else torch_ir.producer(inputs.up)
    if norm is None or torch_ir.op_name(norm) != canonical.NORM or not _is_gated(norm, support):
        return inputs
    made = _producer_inputs(norm)
    return replace(
        inputs, x=made.x, up=inputs.x, norm=made.norm, weight=made.weight, bias=made.bias, gated=norm
    )


def _is_gated(norm: ir.Operation, support: Support) -> bool:
    """Tell whether a kernel norms and gates: ``norm`` has one reader, a gate, as the other factor."""
    value, users = norm.results[0], torch_ir.users(norm.results[0])
    if torch_ir.op_name(norm) != canonical.NORM or len(users) != 1 or _why_no_row(value) is not None:
        return False
    gate, inputs = users[0], _producer_inputs(norm)
    other = list(gate.operands)[1:]
    if (
        torch_ir.op_name(gate) != canonical.GATED_ACTIVATION
        or other != [value]
        or inputs.residual is not None
        or inputs.gate_first
    ):
        return False
    both = replace(inputs, up=gate.operands[0], gate=canonical.gate_contract(gate))
    return value.type == inputs.x.type and support(_spec(both, value, [], writes_y=True)) is None


def _supported(
    quants: list[ir.Operation], inputs: Inputs, value: ir.Value, ledger: Ledger, support: Support
) -> list[ir.Operation]:
    """The quantizations that have a kernel with this producer; the others are refused."""
    kept = []
    for quant in quants:
        reason = support(_spec(inputs, value, [quant], writes_y=True))
        if reason is None:
            kept.append(quant)
        else:
            _refuse([quant], reason, ledger)
    return kept


def _spec(inputs: Inputs, value: ir.Value, quants: list[ir.Operation], *, writes_y: bool = False) -> RowSpec:
    gate = torch_ir.dtype_of(inputs.up) if inputs.up is not None and inputs.gate_first else None
    type_, source = torch_ir.tensor_type(value), torch_ir.tensor_type(inputs.x)
    weight, bias = (
        torch_ir.tensor_type(vector) if vector is not None else None
        for vector in (inputs.weight, inputs.bias)
    )
    assert type_ is not None and type_.shape[-1] is not None and source is not None
    return RowSpec(
        hidden=type_.shape[-1],
        dtype=source.dtype,
        norm=inputs.norm,
        gate=inputs.gate,
        weight_dtype=weight.dtype if weight else None,
        bias_dtype=bias.dtype if bias else None,
        gate_first=inputs.gate_first,
        gate_dtype=None if gate in (None, source.dtype) else gate,
        writes_sum=inputs.sum is not None and _read_besides_norm(inputs),
        writes_y=writes_y and inputs.before not in quants,
        quantizations=tuple(quantization for quantization, _ in _distinct(quants)),
    )


def _read_besides_norm(inputs: Inputs) -> bool:
    assert inputs.sum is not None
    uses = len(torch_ir.users(inputs.sum))
    absorbed = torch_ir.op_name(torch_ir.producer(inputs.sum)) != canonical.NORM  # type: ignore[arg-type]
    return uses > (1 if absorbed else 0)


def _distinct(
    quants: Iterable[ir.Operation],
) -> dict[tuple[Quantization, ir.Value | None], list[ir.Operation]]:
    """Sort by what they compute: equal quantizations of one tensor, by equal given scales, are one output."""
    sorted_: dict[tuple[Quantization, ir.Value | None], list[ir.Operation]] = {}
    for op in quants:
        sorted_.setdefault((canonical.quantization(op), canonical.given_scale(op)), []).append(op)
    return sorted_


def _replace(
    inputs: Inputs,
    value: ir.Value,
    spec: RowSpec,
    producers: list[ir.Operation],
    quants: list[ir.Operation],
    ledger: Ledger,
) -> None:
    inputs, spec = _in_place(inputs, spec)
    distinct, replaced = _distinct(quants), [*producers, *quants]
    row = _create(inputs, value, spec, [given for _, given in distinct if given is not None], replaced)
    results = iter(row.results)
    if spec.writes_sum:
        assert inputs.sum is not None
        inputs.sum.replace_all_uses_with(next(results))
    if spec.writes_y:
        value.replace_all_uses_with(next(results))
    for equal in distinct.values():
        made = [next(results) for _ in equal[0].results]
        for quant in equal:
            for old, new in zip(quant.results, made, strict=True):
                old.replace_all_uses_with(new)
    _record(replaced, pattern_name(spec), ledger)
    add = torch_ir.producer(inputs.sum) if inputs.sum is not None else None
    if add is not None and add not in producers:
        ledger.absorb(canonical.site_of(replaced[0]), inputs.norm, canonical.cost(add))
        replaced.insert(0, add)
    for op in reversed(replaced):
        op.erase()


def _in_place(inputs: Inputs, spec: RowSpec) -> tuple[Inputs, RowSpec]:
    """The same rows, read where they lie in wider tensors."""
    x = wider(inputs.x)
    inputs, spec = replace(inputs, x=x.tensor), replace(spec, x_window=x.window)
    for name, value in (("up", inputs.up), ("residual", inputs.residual)):
        if value is not None:
            other = wider(value)
            inputs, spec = replace(inputs, **{name: other.tensor}), replace(spec, other_window=other.window)
    return inputs, spec


def _create(
    inputs: Inputs, value: ir.Value, spec: RowSpec, givens: list[ir.Value], sites: list[ir.Operation]
) -> ir.Operation:
    y = torch_ir.tensor_type(value)
    assert y is not None
    type_ = replace(y, dtype=spec.y_dtype)  # y may go on unrounded; what is written is rounded
    results = [replace(y, dtype=spec.dtype)] * spec.writes_sum + [type_] * spec.writes_y
    for quantization in spec.quantizations:
        results += canonical.quantized_types(type_, quantization)
    numbers = [canonical.to_attribute(canonical.site_of(op)) for op in sites]
    with ir.InsertionPoint(inputs.before), sites[0].location:
        row = canonical.create(
            canonical.ROW,
            [*inputs.operands(), *givens],
            results,
            spec=canonical.to_attribute(spec),
            sites=ir.ArrayAttr.get(numbers),
        )
        torch_ir.set_example(row, [torch_ir.example_shape(value)] * len(results))
    return row


def pattern_name(spec: RowSpec) -> str:
    """Name a fused site for the report, e.g. ``add_norm_quant``."""
    gate = f"{spec.gate.activation}_mul" if spec.gate else ""
    parts = [
        gate if spec.gate_first else "",
        "add" if spec.norm and spec.norm.residual else "",
        "norm" if spec.norm else "",
        "" if spec.gate_first else gate,
        "quant" if spec.quantizations else "",
    ]
    return "_".join(part for part in parts if part)


def _record(ops: list[ir.Operation], pattern: str, ledger: Ledger) -> None:
    for op in ops:
        site = canonical.site_of(op)
        if canonical.BLOCKED in op.attributes:
            # It has a kernel of its own, but not its norm's.
            ledger.refuse(site, ir.StringAttr(op.attributes[canonical.BLOCKED]).value)
        else:
            ledger.fuse(site, pattern)


def _refuse_producer(
    producer: ir.Operation, quants: Iterable[ir.Operation], reason: str, ledger: Ledger
) -> None:
    """Refuse a producer; its quantizations may still get a kernel of their own, but keep the reason."""
    _refuse([producer], reason, ledger)
    _mark_blocked(quants, f"what it quantizes did not fuse: {reason}")


def _mark_blocked(quants: Iterable[ir.Operation], reason: str | None) -> None:
    """Let ``quants`` keep ``reason``, if there is one, although they get a kernel."""
    for quant in quants:
        if reason is not None and canonical.BLOCKED not in quant.attributes:
            quant.attributes[canonical.BLOCKED] = ir.StringAttr.get(reason)


def _refuse(ops: Iterable[ir.Operation], reason: str, ledger: Ledger) -> None:
    for op in ops:
        ledger.refuse(canonical.site_of(op), reason)


def _why_no_kernel(spec: RowSpec, operands: Types, results: Types) -> str | None:
    """x, [up], [residual], [weight], [bias], scale* -> [sum], [y], (q, [scale])*; inputs may be windows."""
    inputs = ["x"] + ["up"] * bool(spec.gate and not spec.gate.packed)
    inputs += ["residual"] * bool(spec.norm and spec.norm.residual)
    read = [(spec.pitch(name), spec.dtype_of(name)) for name in inputs]
    read += [(spec.hidden, dtype) for dtype in (spec.weight_dtype, spec.bias_dtype) if dtype is not None]
    x = (operands or [None])[0]
    rows = TensorType((*x.shape[:-1], spec.hidden), spec.dtype) if x is not None else None
    tensors, scales = operands[: len(read)], operands[len(read) :]
    given = [(type_.shape[-1], type_.dtype) if type_ and type_.shape else None for type_ in tensors]
    if rows is None or given != read:
        return f"it reads {given}, and its kernel {read}"
    if len(scales) != spec.given_scales or not all(map(is_given_scale, scales)):
        return f"it is given the scales {list(map(str, scales))}, and its kernel reads {spec.given_scales}"
    written = [rows] * spec.writes_sum + [replace(rows, dtype=spec.y_dtype)] * spec.writes_y
    for quantization in spec.quantizations:
        written += canonical.quantized_types(rows, quantization)
    return (
        None
        if list(results) == written
        else f"it writes {list(map(str, results))}, not {list(map(str, written))}"
    )


OPERATION = Operation(canonical.ROW, RowSpec, _why_no_kernel, is_kernel=True)
