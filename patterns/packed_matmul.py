"""Raise the product with a weight of packed integers, and give it to a kernel: weights of 4 and 8 bits alone.

The activation stays as it is.  How many bits a code has, how many share a scale and whether there are zero
points are values of one contract.  A weight that depends on parameters alone is laid out for the kernel by an
operation, which folding does once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir, weight_layouts
from .contracts import WeightLayout, stored_rows
from .operation import Operation, PatternFamily, Support, Types
from .recogniser import Raised
from .residuals import replace_product, residual_types
from .sites import Ledger
from .torch_ir import TensorType
from .well_typed import FLOATS

CALL = "torch.lowering.packed_matmul"
BITS = (4, 8)
# In the order in which they are tried: what a GPU reads, what a CPU reads.
_LAYOUTS: tuple[WeightLayout, ...] = ("shuffled_16x16", "row")


@dataclass(frozen=True)
class PackedMatmul:
    """The product of floats a [.., K] and a weight [N, K] of integers, unpacked for it.

        w[n, k] = round_a(round_s((code[n, k] - zero[n, g]) * scale[n, g]))
        out[m, n] = round_a(sum over k of a[m, k] * w[n, k] + bias[n])

    g is the group of k, whose elements share a scale.  round_s rounds to the dtype of the scales, round_a to
    that of a; the sum is one of float32 in an order of the kernel's own, rounded once.  A code is one of 0 to
    2^bits - 1; without ``zeros`` its zero is 2^(bits - 1).

    Sources: compressed-tensors pack-quantized, GPTQ and AWQ as their libraries dequantize them.
    """

    bits: int
    zeros: bool = False


@dataclass(frozen=True)
class PackedSpec:
    """One such product: what a kernel reads and writes.

    Reads a [T, depth] in ``dtype``, the codes as bytes, uint8 [columns, depth * bits / 8] in ``b_layout``, of
    each byte the lowest bits first, scales [depth/group, columns] in ``scale_dtype``, then zero points, uint8
    of the same shape, if it has ``zeros``, then bias [columns] in ``dtype`` if it has one.  Writes out
    [T, columns] in ``dtype``.  A ``residual`` is one of ``MatmulSpec``.
    """

    columns: int
    depth: int
    group: int
    bits: int
    dtype: str
    scale_dtype: str
    zeros: bool = False
    bias: bool = False
    b_layout: WeightLayout = "row"
    residual: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of a row of the weight."""
        return self.depth * self.bits // 8

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# -- raising ---------------------------------------------------------------------------------------


class PackedProduct:
    """``torch.ops.lowering.packed_matmul(a, codes, scale, zero, bias, bits=4)``."""

    roots = (CALL,)

    def recognise(self, op: ir.Operation) -> Raised | None:
        a, codes, scale, zero, bias, bits = op.operands
        value = torch_ir.constant(bits)
        if not isinstance(value, int):
            return None
        optional = [operand for operand in (zero, bias) if torch_ir.tensor_type(operand) is not None]
        contract = PackedMatmul(value, torch_ir.tensor_type(zero) is not None)
        return Raised(canonical.PACKED_MATMUL, contract, [a, codes, scale, *optional], list(op.results))


def _why_no_product(product: PackedMatmul, operands: Types, results: Types) -> str | None:
    """a, codes, scale, [zero], [bias] -> out."""
    types = [type_ for type_ in (*operands, *results) if type_ is not None]
    fewest = 3 + product.zeros
    if len(results) != 1 or len(types) != len(operands) + 1 or len(operands) not in (fewest, fewest + 1):
        return f"a product has {fewest} tensors as operands, or a bias besides, and one result"
    a, codes, scale, *rest = types
    out, zero = rest[-1], rest[0] if product.zeros else None
    bias = rest[product.zeros] if len(operands) > fewest else None
    fits = (
        product.bits in BITS
        and a.dtype in FLOATS
        and scale.dtype in FLOATS
        and codes.dtype == "uint8"
        and len(codes.shape) == len(scale.shape) == 2
        and (zero is None or zero == TensorType(scale.shape, "uint8"))
        and (bias is None or bias == TensorType(codes.shape[:1], a.dtype))
        and bool(a.shape)
        and out == TensorType((*a.shape[:-1], codes.shape[0]), a.dtype)
    )
    return None if fits else f"it takes {', '.join(map(str, operands))} to {out}"


# -- fusing ----------------------------------------------------------------------------------------


def fuse_packed(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Give every such product a kernel where the target has one; the others say why not."""
    products = [
        op.operation for op in block.operations if torch_ir.op_name(op.operation) == canonical.PACKED_MATMUL
    ]
    frozen = torch_ir.of_parameters(block) if products else set()
    for op in products:
        sites, spec = _sites(op), _spec(op)
        of_parameters = torch_ir.producer(op.operands[1]) in frozen
        reason = spec if isinstance(spec, str) else _fuse(op, spec, support, of_parameters)
        for site in sites:
            if reason is None:
                ledger.fuse(site, "packed_matmul")
            else:
                ledger.refuse(site, f"{reason} It is unpacked at every call, and multiplied by IREE.")


def has_kernel(op: ir.Operation, support: Support, columns: int) -> bool:
    """Tell whether a kernel computes ``op``, of parameters, with ``columns`` columns."""
    spec = _spec(op)
    if isinstance(spec, str):
        return False
    return any(support(replace(spec, columns=columns, b_layout=layout)) is None for layout in _LAYOUTS)


def _sites(op: ir.Operation) -> list[int]:
    """The sites that ``op`` is: of several products where it is joined of them."""
    return canonical.sites_of(op) if canonical.SITES in op.attributes else [canonical.site_of(op)]


def _fuse(op: ir.Operation, spec: PackedSpec, support: Support, of_parameters: bool) -> str | None:
    reason = None
    for layout in _LAYOUTS:
        wanted = replace(spec, b_layout=layout)
        reason = support(wanted)
        if reason is None:
            if layout != "row" and not of_parameters:
                return "Its weight is no parameter, which could be laid out for the kernel when compiling."
            _replace(op, wanted, support)
            return None
    return reason


def _spec(op: ir.Operation) -> PackedSpec | str:
    """Read what a product computes; a sentence if it is none or its sizes are not known."""
    product = canonical.from_attribute(PackedMatmul, op.attributes["contract"])
    a, codes, scale = (torch_ir.tensor_type(value) for value in list(op.operands)[:3])
    assert a is not None and codes is not None and scale is not None
    depth, columns, groups = a.shape[-1], codes.shape[0], scale.shape[1]
    if not depth or not columns or not groups or codes.shape[1] is None:
        return "A size of its weight or scales is unknown until run time; a kernel is made for one size."
    bias = len(op.operands) > 3 + product.zeros
    return PackedSpec(
        columns, depth, depth // groups, product.bits, a.dtype, scale.dtype, product.zeros, bias
    )


def _replace(op: ir.Operation, spec: PackedSpec, support: Support) -> None:
    operands = list(op.operands)
    with ir.InsertionPoint(op), op.location:
        if spec.b_layout != "row":
            operands[1] = weight_layouts.shuffle(operands[1], spec.b_layout)
        for number in range(2, 3 + spec.zeros):
            operands[number] = _transposed(operands[number])
    sites = [ir.IntegerAttr.get(ir.IntegerType.get_signless(64), site) for site in _sites(op)]
    replace_product(op, canonical.PACKED, spec, operands, support, sites)


def _transposed(value: ir.Value) -> ir.Value:
    """A matrix with its axes exchanged, at the current insertion point."""
    type_ = torch_ir.tensor_type(value)
    assert type_ is not None
    operands = [value, torch_ir.make_int(0), torch_ir.make_int(1)]
    return torch_ir.make("torch.aten.transpose.int", replace(type_, shape=type_.shape[::-1]), operands)


def _why_no_kernel(spec: PackedSpec, operands: Types, results: Types) -> str | None:
    rows, groups = stored_rows(spec.columns, spec.b_layout), spec.depth // spec.group
    scales = (groups, spec.columns)
    given = [
        TensorType((rows, spec.row_bytes), "uint8"),
        TensorType(scales, spec.scale_dtype),
        *([TensorType(scales, "uint8")] if spec.zeros else []),
        *([TensorType((spec.columns,), spec.dtype)] if spec.bias else []),
        *residual_types(spec, results),
    ]
    a, out = (operands or [None])[0], (results or [None])[0]
    if a is None or out is None or list(operands[1:]) != given or len(results) != 1:
        return f"it takes {', '.join(map(str, operands))}, and not {', '.join(map(str, given))}"
    fits = a == a.with_last(spec.depth, spec.dtype) and out == a.with_last(spec.columns)
    return None if fits else f"it takes {a} to {out}, and computes {spec.columns} columns from {spec.depth}"


def _site(product: PackedMatmul) -> str:
    return "packed_matmul"


FAMILY = PatternFamily(
    operations=(
        Operation(canonical.PACKED_MATMUL, PackedMatmul, _why_no_product, site=_site),
        Operation(canonical.PACKED, PackedSpec, _why_no_kernel, is_kernel=True),
    ),
    recognisers=(PackedProduct(),),
    fuse=fuse_packed,
)
