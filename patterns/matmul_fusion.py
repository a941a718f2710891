"""A block-scaled product becomes ``vmfuse.matmul``, a kernel's operation, where the target has a kernel.

Nothing fuses into it and it is no site of the report: where there is no kernel, it is lowered as the plain
operations it stands for.
"""

from __future__ import annotations

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import MatmulSpec
from .row_fusion import Support


def fuse_product(op: ir.Operation, support: Support) -> None:
    """Replace a ``vmfuse.block_scaled_matmul`` by a ``vmfuse.matmul`` if ``support`` has no objection."""
    spec = _spec(op)
    if spec is None or support(spec) is not None:
        return
    result = torch_ir.tensor_type(op.results[0])
    assert result is not None
    attributes = {"spec": canonical.to_attribute(spec), canonical.SITES: ir.ArrayAttr.get([])}
    with ir.InsertionPoint(op), op.location:
        product = canonical.create(canonical.MATMUL, list(op.operands), [result], **attributes)
        torch_ir.set_example(product, [torch_ir.example_shape(op.results[0])])
    op.results[0].replace_all_uses_with(product.results[0])
    op.erase()


def _spec(op: ir.Operation) -> MatmulSpec | None:
    """What the product computes; None if its sizes are not known or do not fit each other."""
    a, b, a_scale, b_scale, out = (torch_ir.tensor_type(value) for value in (*op.operands, *op.results))
    if not (a and b and a_scale and b_scale and out) or not (a.shape and a_scale.shape) or len(b.shape) != 2:
        return None
    columns, depth = b.shape
    groups = a_scale.shape[-1]
    if columns is None or not depth or not groups or a.shape[-1] != depth or depth % groups:
        return None
    group = depth // groups
    if b_scale.shape != (-(-columns // group), groups):
        return None
    return MatmulSpec(columns, depth, group, a.dtype, b.dtype, out.dtype)
