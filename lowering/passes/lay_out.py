"""Step 5, lay out: give each product a kernel, and what it reads the layout that the kernel reads.

A weight that depends on parameters alone is shuffled by an operation, which the next step, folding, does
once; the kernel that writes the scales of the activation writes them as the product reads them.  ``check``
says, before anything is dispatched, that every weight is in the layout its product reads it in.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from patterns import canonical, torch_ir, weight_layouts
from patterns.contracts import MatmulSpec
from patterns.matmul_fusion import Reads, fuse_product, why_misfit
from patterns.packed_matmul import PackedSpec
from patterns.sites import Ledger

from ..errors import CompileError
from ..families.matmul.family import scale_layouts
from ..families.matmul.family import weight_layouts as read_layouts
from ..families.registry import supported
from ..targets import Target

_OWN = (canonical.MATMUL, canonical.BLOCK_SCALED_MATMUL)
_PACKED = (canonical.PACKED, canonical.PACKED_MATMUL)


def reads_of(target: Target) -> Reads:
    """The layouts that the kernels of ``target`` read."""
    return Reads(target.name, read_layouts(target), scale_layouts(target), supported(target))


def lay_out(function: ir.Operation, ledger: Ledger, reads: Reads) -> None:
    """Give the products of ``function`` to kernels where there are any, in place.

    A product that has none is remarked in ``ledger``.  Raises CompileError, naming the parameter and the
    product, where operands do not fit each other, and where the model says a weight has a layout that the
    target has not, that what makes the weight does not give it, or that another product says it has not.
    """
    block = torch_ir.block_of(function)
    products = _products(block, _OWN)
    for product in products:
        if misfit := why_misfit(product):
            raise CompileError(
                f"{torch_ir.location(product)}: the operands of a product do not fit: {misfit}"
            )
    _note_what_is_said(products, reads)
    check(function)
    frozen = torch_ir.of_parameters(block)
    of_parameters = [torch_ir.producer(product.operands[1]) in frozen for product in products]
    for product, is_parameter in zip(products, of_parameters, strict=True):
        where = torch_ir.location(product)
        reason = fuse_product(product, reads, ledger, is_parameter=is_parameter)
        if reason is not None:
            ledger.remark("block_scaled_matmul", where, f"left to IREE: {reason}")
    torch_ir.erase_dead(block)


def check(function: ir.Operation) -> None:
    """Raise CompileError unless the layout every weight carries is the one that its product reads."""
    for product in _products(torch_ir.block_of(function), (*_OWN, *_PACKED)):
        layout, weight = _read(product), product.operands[1]
        carried = weight_layouts.carried(weight)
        mixed = weight_layouts.computed_from(weight) if carried == layout == "row" else None
        if mixed is not None:
            raise CompileError(
                f"{_place(product)}, which is computed from one in layout {mixed}, with bytes in another "
                "order: shuffle the result instead, with torch.ops.lowering.shuffle_weight"
            )
        if carried not in (layout, None):
            raise CompileError(
                f"{_place(product)} in layout {layout}, and it is in layout {carried}: say which it is with "
                "b_layout, or change it with torch.ops.lowering.shuffle_weight"
            )


def _note_what_is_said(products: list[ir.Operation], reads: Reads) -> None:
    """Write on each parameter the layout in which the model says it is stored."""
    said: dict[str, tuple[str, str]] = {}
    for product in products:
        layout, load = _read(product), weight_layouts.parameter(product.operands[1])
        if layout not in ("row", *reads.weights):
            raise CompileError(
                f"{_place(product)} in layout {layout}, which {reads.target} has not: give it in row, and "
                f"the compiler lays it out for its target ({' or '.join(reads.weights) or 'row'})"
            )
        if load is None:
            continue
        (name,), where = weight_layouts.names(product.operands[1]), torch_ir.location(product)
        other, at = said.setdefault(name, (layout, where))
        if other != layout:
            raise CompileError(
                f"{_place(product)} in layout {layout}, and the one at {at} reads it in layout {other}: a "
                "parameter has one layout"
            )
        weight_layouts.note(load, layout)


def _read(product: ir.Operation) -> str:
    """The layout in which ``product`` reads its weight."""
    if torch_ir.op_name(product) == canonical.MATMUL:
        return canonical.from_attribute(MatmulSpec, product.attributes["spec"]).b_layout
    if torch_ir.op_name(product) == canonical.PACKED:
        return canonical.from_attribute(PackedSpec, product.attributes["spec"]).b_layout
    if torch_ir.op_name(product) == canonical.PACKED_MATMUL:
        return "row"
    return canonical.product_contract(product).b_layout


def _products(block: ir.Block, names: Sequence[str]) -> list[ir.Operation]:
    return [op.operation for op in block.operations if torch_ir.op_name(op.operation) in names]


def _place(product: ir.Operation) -> str:
    """``model.py:7: the product reads its weight 'layers.0.gate'``"""
    names = weight_layouts.names(product.operands[1])
    weight = f"its weight {' and '.join(map(repr, names))}" if names else "its weight"
    return f"{torch_ir.location(product)}: the product reads {weight}"
