"""Raise an exact product of int8 that is scaled afterwards: (torch._int_mm * a_scale) * b_scale.

In this order and in float32, as the kernel multiplies: another one rounds otherwise, and stays as it is.
"""

from __future__ import annotations

from iree.compiler import ir

from . import canonical, torch_ir, views
from .block_scaled_matmul import read_besides
from .contracts import BlockScaledMatmul
from .recogniser import Raised
from .torch_ir import TensorType

_PRODUCT = "torch.aten._int_mm"
_TIMES = "torch.aten.mul.Tensor"
_CAST = "torch.prims.convert_element_type"


class IntegerProduct:
    """``(torch._int_mm(a, w.t()) * a_scale) * b_scale``, and a rounding to 16 bits behind it or none."""

    roots = (_TIMES, _CAST)

    def recognise(self, op: ir.Operation) -> Raised | None:
        out = torch_ir.tensor_type(op.results[0])
        if out is None or out.dtype not in (("bfloat16", "float16") if op.name == _CAST else ("float32",)):
            return None
        end = torch_ir.producer(op.operands[0]) if op.name == _CAST else op
        for scaled, b_scale in _factors(end):
            for product, a_scale in _factors(torch_ir.producer(scaled)):
                source = torch_ir.producer(product)
                if source is None or source.name != _PRODUCT or read_besides(op, source):
                    continue
                weight = views.transposed(source.operands[1])
                columns = None if weight is None else _of_channels(op, b_scale, out.shape[-1])
                rows = torch_ir.tensor_type(a_scale)
                if weight is None or columns is None or rows != TensorType((out.shape[0], 1), "float32"):
                    continue
                operands = [source.operands[0], weight, a_scale, columns]
                return Raised(canonical.BLOCK_SCALED_MATMUL, BlockScaledMatmul(), operands, [op.results[0]])
        return None


def _factors(op: ir.Operation | None) -> list[tuple[ir.Value, ir.Value]]:
    """The operands of a float32 product of numbers, either first."""
    if op is None or op.name != _TIMES or torch_ir.dtype_of(op.results[0]) != "float32":
        return []
    first, second = op.operands
    return [(first, second), (second, first)]


def _of_channels(op: ir.Operation, scale: ir.Value, columns: int | None) -> ir.Value | None:
    """``scale`` [N] or [1, N] as [N, 1], before ``op``; None if it is no such scale."""
    type_ = torch_ir.tensor_type(scale)
    if type_ is None or columns is None or type_.dtype != "float32":
        return None
    if type_.shape not in ((columns,), (1, columns)):
        return None
    column = TensorType((columns, 1), "float32")
    with ir.InsertionPoint(op), op.location:
        if len(type_.shape) == 1:
            return torch_ir.make("torch.aten.unsqueeze", column, [scale, torch_ir.make_int(1)])
        axes = [torch_ir.make_int(0), torch_ir.make_int(1)]
        return torch_ir.make("torch.aten.transpose.int", column, [scale, *axes])


RECOGNISERS = (IntegerProduct(),)
