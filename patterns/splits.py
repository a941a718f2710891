"""Say which norms and activations have a kernel of their own, since a row kernel cannot do what follows.

Each half may well have a kernel, and still the chain is not one: the report says so, and what is in the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import RowSpec
from .sites import Ledger

# What gives every element of its result for one element of each operand, or of a row's one number.
_POINTWISE = frozenset(
    (
        "torch.prims.convert_element_type",
        *(
            f"torch.aten.{name}"
            for name in (
                *("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "add.Tensor", "add.Scalar"),
                *("sub.Tensor", "sub.Scalar", "rsub.Scalar", "neg", "abs", "exp", "relu"),
                *("clamp", "clamp.Tensor", "clamp_min", "clamp_max", "maximum", "minimum", "where.self"),
                *("pow.Tensor_Scalar", "reciprocal", "cat", "roll", "flip", "constant_pad_nd"),
            )
        ),
    )
)
_ACTIVATIONS = tuple(f"torch.aten.{name}" for name in ("silu", "gelu", "sigmoid", "tanh", "erf"))


def why_split(value: ir.Value) -> str | None:
    """Say why a quantization of ``value`` is in no norm's or activation's kernel; None if it may be."""
    nearest = None
    for op, between in _above(value):
        nearest = nearest or (None if views.is_view(op) else op)
        what = "activation" if op.name in _ACTIVATIONS else _made_by(op)
        if what == "activation" and between is not None:
            between = nearest  # the product of a gate is the kernel's; what follows it is not
        where = f"the {what} at {torch_ir.location(op)} is no part of this kernel"
        if what is not None and between is not None:
            step = torch_ir.op_name(between).removeprefix("torch.")
            return f"{where}: between them is {step}, which the row kernel does not do"
        if what == "activation":
            return f"{where}, which activates the one factor of a product"
    return None


def note_gated_norms(gate: ir.Operation, ledger: Ledger) -> None:
    """Refuse the norms whose values ``gate``, which is quantized, reads: they have kernels of their own."""
    for operand in gate.operands:
        norms = (op for op, _ in _above(operand) if _made_by(op) == "norm")
        for norm in norms:
            site = canonical.sites_of(norm)[0]
            if ledger.records[site].fused and not _spec(norm).quantizations:
                where = torch_ir.location(gate)
                ledger.refuse(
                    site,
                    f"the gate at {where} reads it: the row kernel multiplies what it normalises with an "
                    "activation where nothing else reads it and nothing is added before",
                )


def _above(value: ir.Value) -> Iterator[tuple[ir.Operation, ir.Operation | None]]:
    """Walk what ``value`` is computed of row by row, nearest first, each with the last step that reads it."""
    seen = set[ir.Operation]()
    pending: list[tuple[ir.Value, ir.Operation | None]] = [(value, None)]
    while pending:
        source, reader = pending.pop(0)
        op = torch_ir.producer(source)
        if op is None or op in seen:
            continue
        seen.add(op)
        yield op, reader
        if torch_ir.is_plain_add(op):
            continue  # a residual stream, whatever was added to it
        if op.name in _POINTWISE or views.is_view(op):
            step = reader if views.is_view(op) else op
            pending += [(operand, step) for operand in op.operands]


def _made_by(op: ir.Operation) -> str | None:
    """``norm`` or ``gate``, where a row kernel writes what one of them makes."""
    if torch_ir.op_name(op) != canonical.ROW:
        return None
    spec = _spec(op)
    return "norm" if spec.norm else "gate" if spec.gate else None


def _spec(row: ir.Operation) -> RowSpec:
    return canonical.from_attribute(RowSpec, row.attributes["spec"])
