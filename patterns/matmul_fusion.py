"""Make a block-scaled product a ``vmfuse.matmul``, in layouts that the product's kernel reads.

Nothing fuses into it and it is no site of the report.  A weight that depends on parameters alone is shuffled
to the kernel's layout by an operation, which folding then does once; scales that only products read are
written by their kernel the way the product's kernel reads them.  Where there is no kernel, the product is
lowered as the plain operations it stands for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from . import canonical, torch_ir, views, weight_layouts
from .contracts import MatmulSpec, Quantization, RowSpec, ScaleLayout, WeightLayout, scale_kind
from .operation import Operation, Support, Types
from .residuals import replace_product, residual_types
from .sites import Ledger


@dataclass(frozen=True)
class Reads:
    """The layouts that the product kernel of ``target`` may read, the fastest first.

    ``support`` says why there is no kernel for a spec, or None.
    """

    target: str
    weights: Sequence[WeightLayout]
    scales: Sequence[ScaleLayout]
    support: Support


@dataclass(frozen=True)
class _Scale:
    """A scale that a row kernel writes: of quantization ``number`` of ``row``.

    ``is_free``: only products read it, and its layout is still to be chosen.
    """

    row: ir.Operation
    spec: RowSpec
    number: int
    is_free: bool

    @property
    def quantization(self) -> Quantization:
        return self.spec.quantizations[self.number]


def fuse_product(op: ir.Operation, reads: Reads, ledger: Ledger, *, is_parameter: bool) -> str | None:
    """Replace a ``vmfuse.block_scaled_matmul`` by a ``vmfuse.matmul``, or say why it has no kernel.

    ``is_parameter``: b depends on parameters alone.  A product without a kernel reads its weight in ``row``.
    """
    spec, scale = _spec(op), _scale(op.operands[2])
    refusals = [spec] if isinstance(spec, str) else []
    for wanted in () if isinstance(spec, str) else _candidates(op, spec, scale, reads, is_parameter):
        row = None if scale is None else _written_as(scale, wanted.a_scale_layout)
        refusal = reads.support(wanted) or (row and reads.support(row))
        if refusal is None:
            _write_scale(scale, row, ledger)
            _replace(op, wanted, reads.support)
            return None
        refusals.append(refusal)
    _read_in_rows(op)
    could = not (is_parameter or isinstance(spec, str)) and _would_do_shuffled(spec, reads)
    return refusals[0] + (" It is no parameter, which could be shuffled when compiling." if could else "")


def has_kernel(op: ir.Operation, reads: Reads, columns: int, scales: int) -> bool:
    """Tell whether a kernel computes ``op``, of parameters, with so many columns and rows of scales."""
    spec = _spec(op)
    if isinstance(spec, str) or spec.b_layout != "row":
        return False
    kind = scale_kind((scales, spec.depth // spec.group), columns, spec.depth)
    if kind is None:
        return False
    wider = replace(spec, columns=columns, b_scales=kind)
    layouts = itertools.product(reads.weights or ["row"], ["row"] if spec.whole else {*reads.scales, "row"})
    return any(
        reads.support(replace(wider, b_layout=weight, a_scale_layout=scale)) is None
        for weight, scale in layouts
    )


def why_misfit(op: ir.Operation) -> str | None:
    """Which operand of a ``vmfuse.block_scaled_matmul`` does not fit, as far as sizes are known."""
    a, b, a_scale, b_scale, *bias = (torch_ir.tensor_type(value) for value in op.operands)
    if not (a and b and a_scale and b_scale) or not (a.shape and a_scale.shape) or len(b.shape) != 2:
        return None
    (columns, depth), groups = b.shape, a_scale.shape[-1]
    if depth is None or groups is None:
        return None
    if a.shape[-1] not in (None, depth):
        return f"{_named(op, 1)} is {b}, and it multiplies rows of {a.shape[-1]} elements"
    if not groups or depth % groups:
        return f"{_named(op, 1)} is {b}, and {groups} scales do not divide its rows of {depth} elements"
    group = depth // groups
    fits = columns is None or (
        b_scale.shape[-1:] == (groups,) and scale_kind(b_scale.shape, columns, depth) is not None
    )
    if not fits or b_scale.dtype != "float32":
        wanted = torch_ir.TensorType((columns and -(-columns // group), groups), "float32")
        return f"{_named(op, 3)} is {b_scale}, and {_named(op, 1)}, {b} in blocks of {group}, needs {wanted}"
    out = torch_ir.tensor_type(op.results[0])
    if bias and out is not None and columns and bias[0] != torch_ir.TensorType((columns,), out.dtype):
        return f"{_named(op, 4)} is {bias[0]}, and a result {out} needs {out.dtype}[{columns}]"
    return None


def _named(op: ir.Operation, number: int) -> str:
    """``its scales 'gate.scale'``"""
    what = {1: "its weight", 3: "the weight's scale", 4: "its bias"}[number]
    names = weight_layouts.names(op.operands[number])
    return f"{what} {' and '.join(map(repr, names))}" if names else what


def _spec(op: ir.Operation) -> MatmulSpec | str:
    """Read what a product whose operands fit each other computes; a sentence if its sizes are not known."""
    a, b, a_scale, b_scale, *rest = (torch_ir.tensor_type(value) for value in (*op.operands, *op.results))
    out = rest[-1]
    if not (a and b and a_scale and b_scale and out) or not (a.shape and a_scale.shape) or len(b.shape) != 2:
        return "The rank of an operand is not known."
    columns, depth, groups = *b.shape, a_scale.shape[-1]
    if columns is None or not depth or not groups or a.shape[-1] != depth or None in b_scale.shape:
        return "A size of its weight or scales is unknown until run time; a kernel is made for one size."
    product, kind = canonical.product_contract(op), scale_kind(b_scale.shape, columns, depth)
    if kind is None:
        return f"The scales of its weight, {b_scale}, are of no kind that a kernel knows."
    return MatmulSpec(
        columns,
        depth,
        depth // groups,
        a.dtype,
        b.dtype,
        out.dtype,
        bias=len(rest) == 2,
        b_layout=product.b_layout,
        a_scales="one" if a_scale.shape == (1,) and len(a.shape) > 1 else "rows",
        b_scales=kind,
        bias_rounding=product.bias_rounding,
    )


def _candidates(
    op: ir.Operation, spec: MatmulSpec, scale: _Scale | None, reads: Reads, is_parameter: bool
) -> Iterator[MatmulSpec]:
    """The ways in which the product may read its operands, the best first; at least one."""
    is_transposed = views.transposed(op.operands[2]) is not None
    given = spec.b_layout != "row" or not is_parameter
    for weight in [spec.b_layout] if given else reads.weights or ["row"]:
        for layout in _scale_layouts(scale, reads, is_transposed) if not spec.whole else _whole(scale):
            yield replace(spec, b_layout=weight, a_scale_layout=layout)


def _would_do_shuffled(spec: MatmulSpec, reads: Reads) -> bool:
    return any(reads.support(replace(spec, b_layout=layout)) is None for layout in reads.weights)


def _scale_layouts(scale: _Scale | None, reads: Reads, is_transposed: bool) -> list[ScaleLayout]:
    """List how the scales of a may lie when the product reads them, the best first.

    What no row kernel writes is a tensor of the program: in rows, or in columns where it is a transpose.  The
    layout that the model asked for stays if the kernel reads it, and so does one that something else reads.
    """
    if scale is None:
        return ["column", "row"] if is_transposed else ["row"]
    order: list[ScaleLayout] = []
    if scale.quantization.layout != "row" or not scale.is_free:
        order.append(scale.quantization.layout)
    if scale.is_free:
        order += reads.scales
    return list(dict.fromkeys([*order, "row"]))


def _whole(scale: _Scale | None) -> list[ScaleLayout]:
    """One scale in a row lies the same in every layout."""
    return ["row"] if scale is None or scale.is_free else [scale.quantization.layout]


def _written_as(scale: _Scale, layout: ScaleLayout) -> RowSpec:
    """Change what the row kernel does to write its scale in ``layout``, as the product reads it."""
    quantizations = list(scale.spec.quantizations)
    if scale.is_free:
        quantizations[scale.number] = replace(quantizations[scale.number], layout=layout)
    return replace(scale.spec, quantizations=tuple(quantizations))


def _write_scale(scale: _Scale | None, row: RowSpec | None, ledger: Ledger) -> None:
    """Let the kernel that writes ``scale`` be the one of ``row``."""
    if scale is None or row is None:
        return
    for site in canonical.sites_of(scale.row):
        if ledger.records[site].contract == scale.quantization:
            ledger.records[site].contract = row.quantizations[scale.number]
    scale.row.attributes["spec"] = canonical.to_attribute(row)


def _replace(op: ir.Operation, wanted: MatmulSpec, support: Support) -> None:
    operands = list(op.operands)
    if wanted.b_layout != canonical.product_contract(op).b_layout:
        with ir.InsertionPoint(op), op.location:
            operands[1] = weight_layouts.shuffle(operands[1], wanted.b_layout)
    replace_product(op, canonical.MATMUL, wanted, operands, support)


def _read_in_rows(op: ir.Operation) -> None:
    """Let a product without a kernel read its weight as it was before it was shuffled."""
    contract = canonical.product_contract(op)
    if contract.b_layout != "row":
        with ir.InsertionPoint(op), op.location:
            op.operands[1] = weight_layouts.unshuffle(op.operands[1], contract.b_layout)
        op.attributes["contract"] = canonical.to_attribute(replace(contract, b_layout="row"))


def _scale(value: ir.Value) -> _Scale | None:
    """The quantization whose scale ``value`` is, if a row kernel writes it."""
    source = views.same_rows(value)
    row = torch_ir.producer(source)
    if row is None or torch_ir.op_name(row) != canonical.ROW:
        return None
    spec = canonical.from_attribute(RowSpec, row.attributes["spec"])
    number = spec.scale_of(ir.OpResult(source).result_number)
    return None if number is None else _Scale(row, spec, number, _is_free(source))


def _is_free(scale: ir.Value) -> bool:
    """Tell whether products alone read ``scale``, as scales of a, and none of them has a kernel yet."""
    return all(
        (views.keeps_rows(user) and _is_free(user.result))
        or (torch_ir.op_name(user) == canonical.BLOCK_SCALED_MATMUL and _reads_as_scale(user, scale))
        for user in torch_ir.users(scale)
    )


def _reads_as_scale(product: ir.Operation, scale: ir.Value) -> bool:
    return [number for number, operand in enumerate(product.operands) if operand == scale] == [2]


def _why_no_kernel(spec: MatmulSpec, operands: Types, results: Types) -> str | None:
    """a, b, a_scale, b_scale, [bias], [residual] -> out; b has its layout's rows."""
    count = 4 + spec.bias + spec.residual
    if len(operands) != count or len(results) != 1 or None in (*operands, *results):
        return f"a product has {count} tensors as operands and one result"
    a, b, a_scale, b_scale, *added = (type_ for type_ in operands if type_ is not None)
    (out,) = (type_ for type_ in results if type_ is not None)
    dtypes = [type_.dtype for type_ in (a, b, a_scale, b_scale, *added, out)]
    given = [spec.a_dtype, spec.b_dtype, "float32", "float32", *[spec.dtype] * len(added), spec.dtype]
    if added[spec.bias :] != residual_types(spec, results):
        return f"its residual is {added[-1]}, and it writes {out}"
    if dtypes != given:
        return f"its tensors are of {', '.join(dtypes)}, and not of {', '.join(given)}"
    if (a.shape[-1:], out.shape) != ((spec.depth,), (*a.shape[:-1], spec.columns)) or len(b.shape) != 2:
        return f"it takes {a} and {b} to {out}, and computes {spec.columns} columns from {spec.depth}"
    return None


OPERATION = Operation(canonical.MATMUL, MatmulSpec, _why_no_kernel, is_kernel=True)
