"""Multiply whole rows by a weight where a model multiplies groups of them by the parts of it.

``(h.view(..., G, S) * w.view(G, S)).view(..., G * S)`` is ``h.view(..., G * S) * w``: so a norm of groups
(Falcon-H1) has the weight that every norm has.
"""

from __future__ import annotations

from iree.compiler import ir

from patterns import torch_ir, views

_MUL = "torch.aten.mul.Tensor"


def multiply_whole_rows(block: ir.Block) -> None:
    """Do so in place, wherever nothing else reads the product of groups."""
    for view in [op.operation for op in block.operations]:
        product = torch_ir.producer(view.operands[0]) if views.is_flat_view(view) else None
        if product is not None and product.name == _MUL and len(torch_ir.users(product.result)) == 1:
            _move(view, product)


def _move(view: ir.Operation, product: ir.Operation) -> None:
    groups, rows = torch_ir.tensor_type(product.result), torch_ir.tensor_type(view.result)
    if groups is None or rows is None or len(groups.shape) != len(rows.shape) + 1:
        return
    for weight, other in (product.operands, reversed(product.operands)):
        whole, type_ = _vector(weight, groups), torch_ir.tensor_type(other)
        # The sizes that a view says must be those of the product: the other one has them all.
        if whole is None or type_ is None or type_.shape != groups.shape:
            continue
        vector = torch_ir.tensor_type(whole)
        if vector is None or rows.shape[-1:] != vector.shape:
            continue
        with ir.InsertionPoint(view), view.location:
            regrouped = torch_ir.make(
                view.name,
                torch_ir.TensorType(rows.shape, type_.dtype),
                [other, *list(view.operands)[1:]],
            )
            result = torch_ir.make(_MUL, rows, [whole, regrouped])
        for value in (regrouped, result):
            torch_ir.set_example(value.owner.operation, [torch_ir.example_shape(view.result)])
        view.result.replace_all_uses_with(result)
        return


def _vector(weight: ir.Value, groups: torch_ir.TensorType) -> ir.Value | None:
    """The vector that ``weight`` is a view of, in the last two axes of ``groups``; None if it is none."""
    view, type_ = torch_ir.producer(weight), torch_ir.tensor_type(weight)
    if view is None or type_ is None or not views.is_flat_view(view) or type_.shape != groups.shape[-2:]:
        return None
    vector = torch_ir.tensor_type(view.operands[0])
    return view.operands[0] if vector is not None and len(vector.shape) == 1 else None
