"""Find what looks like a norm of rows and is none that a kernel computes, and say why not.

What gives one away is a reduction of squares, or of deviations from the mean, a root of which something is
divided by.  A sum of squares counts where a constant makes a mean of it; without, it is a vector's length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from iree.compiler import ir

from . import norms, torch_ir, views
from .match import Bindings, Is, OneOf, Op, Var, first_match, past_unit_axis, reduced_axes
from .recogniser import NearMiss

CAST = "torch.prims.convert_element_type"
RESHAPES = tuple(
    f"torch.{name}"
    for name in (
        *("aten.view", "aten.unsqueeze", "aten.squeeze.dim", "prims.squeeze", "aten.expand"),
        *("aten.flatten.using_ints", "aten.unflatten.int"),
    )
)
BOUNDS = tuple(
    f"torch.aten.{name}" for name in ("clamp", "clamp.Tensor", "clamp_min", "clamp_max", "maximum", "minimum")
)
FACTORS = tuple(f"torch.aten.{name}" for name in ("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar"))
SUMS = tuple(f"torch.aten.{name}" for name in ("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar"))

_SQUARE = OneOf(
    Op("torch.aten.pow.Tensor_Scalar", Var("h"), Is(2)), Op("torch.aten.mul.Tensor", Var("h"), Var("h"))
)
_MEANS = ("torch.aten.mean.dim", "torch.aten.mean")
_TOTALS = ("torch.aten.sum.dim_IntList", "torch.aten.sum")
_LENGTH = "torch.aten.linalg_vector_norm"
_SPREADS = ("torch.aten.var.correction", "torch.aten.var_mean.correction")
_ROOTS = ("torch.aten.rsqrt", "torch.aten.sqrt", "torch.aten.pow.Tensor_Scalar")
_RECIPROCAL = "torch.aten.reciprocal"


@dataclass
class _Way:
    """Hold what lies between a reduction and what it is multiplied with or divides.

    ``ends``: the products and quotients with tensors; ``passed``: what lies before them; ``scaled``: a
    constant factor was met; ``divides``: a root of the reduction is turned over, or divided by.
    """

    ends: list[ir.Operation] = field(default_factory=list)
    passed: list[ir.Operation] = field(default_factory=list)
    scaled: bool = False
    root: ir.Operation | None = None
    divides: bool = False

    def follow(self, value: ir.Value) -> None:
        """Look at all readers of ``value``, and theirs, up to the products with tensors."""
        for op in torch_ir.users(value):
            turned = op.name in (_RECIPROCAL, "torch.aten.rsqrt") or _exponent(op) == -0.5
            self.divides |= turned or (op.name == "torch.aten.div.Tensor" and op.operands[1] == value)
            if op.name in _ROOTS and _exponent(op) in (None, 0.5, -0.5):
                self.root = op
            elif op.name in FACTORS and _is_product_of_tensors(op):
                self.ends.append(op)
                self.scaled |= any(_has_constant(user) for user in torch_ir.users(op.result))
                continue
            elif op.name in FACTORS:
                self.scaled = True
            elif op.name not in (_RECIPROCAL, CAST, *BOUNDS, *SUMS) and not views.is_view(op):
                continue
            self.passed.append(op)
            self.follow(op.result)


def _exponent(op: ir.Operation) -> object:
    """Give the exponent of ``op``; None if it is no power."""
    return torch_ir.constant(op.operands[1]) if op.name == "torch.aten.pow.Tensor_Scalar" else None


def _has_constant(op: ir.Operation) -> bool:
    return op.name in FACTORS and not _is_product_of_tensors(op)


def _is_product_of_tensors(op: ir.Operation) -> bool:
    return all(torch_ir.constant(operand) is torch_ir.NOT_CONSTANT for operand in op.operands)


class UnmatchedNorm:
    """A reduction of squares, a root of which something is divided by, that is part of no norm."""

    roots = (*_MEANS, *_TOTALS, _LENGTH, *_SPREADS)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        found = _squares(op)
        if found is None:
            return None
        way = _Way()
        for result in list(op.results)[:1]:
            way.follow(result)
        is_mean = op.name not in (*_TOTALS, _LENGTH)
        has_root = way.root is not None or op.name == _LENGTH
        if not (has_root and way.divides and (is_mean or way.scaled)):
            return None
        centred = op.name in _SPREADS or first_match(norms.CENTRED, torch_ir.widened_from(found["h"]))
        return NearMiss("layer_norm" if centred else "rms_norm", _why_no_norm(op, found, way))


def _squares(reduction: ir.Operation) -> Bindings | None:
    """Find, as h, what ``reduction`` takes the squares of; None if it takes none."""
    if reduction.name in _SPREADS:
        return {"h": reduction.operands[0]}
    if reduction.name == _LENGTH:
        return {"h": reduction.operands[0]} if torch_ir.constant(reduction.operands[1]) == 2 else None
    squares = reduction.operands[0]
    while (op := torch_ir.producer(squares)) is not None and op.name == CAST:
        squares = op.operands[0]
    return first_match(_SQUARE, squares)


def _why_no_norm(reduction: ir.Operation, found: Bindings, way: _Way) -> str:
    reason = _why_no_mean(reduction, found["h"])
    if reason is not None:
        return reason
    root = way.root
    if root is None:
        return "it divides by torch.linalg.vector_norm; take the mean of squares and torch.rsqrt"
    if root.name == "torch.aten.sqrt" or _exponent(root) == 0.5:
        divided = [op for op in way.ends if op.name == "torch.aten.div.Tensor"]
        if divided:
            return _DIVIDED
    h = torch_ir.widened_from(found["h"])
    ends = [op for op in way.ends if h in map(torch_ir.widened_from, op.operands)]
    if reduction.name in _SPREADS:
        return _NO_DEVIATIONS
    if not ends:
        return "its reciprocal root is not multiplied with the tensor that the mean of squares was taken of"
    return _why_not_raised(h, ends[0], way)


def _why_no_mean(reduction: ir.Operation, h: ir.Value) -> str | None:
    """Say why ``reduction`` is no statistic of the rows of ``h`` that a kernel takes."""
    type_ = torch_ir.tensor_type(h)
    if reduction.name in _SPREADS and torch_ir.constant(reduction.operands[2]) != 0:
        return "its variance is divided by less than the size of a row: take .var(-1, unbiased=False)"
    if type_ is None or not type_.shape:
        return "the normed tensor has no axes, or is of unknown rank"
    if {type_.dtype, torch_ir.dtype_of(reduction.operands[0])} != {"float32"}:
        return f"the mean of squares is taken in {type_.dtype}; convert the tensor with .float() before"
    axes = reduced_axes(reduction)
    if axes != [len(type_.shape) - 1]:
        return f"the mean of squares is over axes {axes} of {len(type_.shape)}; a kernel norms the last axis"
    return None


_NO_DEVIATIONS = (
    "what is multiplied with its reciprocal root is not the tensor less its mean, in float32, of .mean(-1, "
    "keepdim=True) and .var(-1, unbiased=False, keepdim=True)"
)
_DIVIDED = "it divides by a square root, which rounds otherwise than a product with torch.rsqrt: use that"
SPREAD = "is spread along another axis than it was taken over: keep that axis with keepdim=True"


def _why_not_raised(h: ir.Value, product: ir.Operation, way: _Way) -> str:
    """Say why the product of ``h`` and what looks like its reciprocal root was not raised."""
    factor = next((value for value in product.operands if torch_ir.widened_from(value) != h), h)
    found = first_match(norms.RSTD, factor)
    narrow = (dtype for op in way.passed if (dtype := torch_ir.dtype_of(op.result)) != "float32")
    if dtype := next(narrow, None):
        return f"its statistic is rounded to {dtype}; keep it in float32 until the product with it is taken"
    if any(views.is_view(op) and past_unit_axis(op.result) is None for op in way.passed):
        return f"its statistic {SPREAD}"
    if found is None:
        return "between the mean of squares and torch.rsqrt is more than the addition of a constant epsilon"
    no_mean = norms.why_not_mean(found)
    if no_mean is not None:
        return no_mean
    if first_match(norms.NORMED, product.result) is None:
        return f"its statistic {SPREAD}"
    y = product.result
    readers = ", ".join(dict.fromkeys(short(op) for op in torch_ir.users(y))) or "nothing"
    return (
        f"its value before rounding, {torch_ir.tensor_type(y)}, is read by {readers}; a kernel writes "
        f"{torch_ir.dtype_of(h)}, as it reads: round it once, before anything but a weight's product or a "
        "quantization reads it"
    )


def short(op: ir.Operation) -> str:
    """The operation's name without its dialect."""
    return torch_ir.op_name(op).removeprefix("torch.")


SUSPICIONS = (UnmatchedNorm(),)
