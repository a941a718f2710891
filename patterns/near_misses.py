"""What looks like a norm or a quantization and is none that a kernel computes, and why not.

Recognisers take what they can prove.  These look at what is left for the one operation that gives such a
spelling away (a reciprocal root of a mean of squares, a cast to 8 bits of a quotient, scores gathered by the
largest of their biased values) and say what would have to change; so nothing that looks like a site is passed
over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

from iree.compiler import ir

from . import group_quant, named_ops, rms_norm, torch_ir
from .contracts import LARGEST_FINITE, Quantization
from .match import ANY, Bindings, Const, Is, OneOf, Op, Pattern, Var, first_match
from .recogniser import NearMiss, Suspicion

_CAST = "torch.prims.convert_element_type"
_RESHAPES = ("torch.aten.view", "torch.aten.unsqueeze", "torch.aten.squeeze.dim", "torch.prims.squeeze")
_BOUNDS = tuple(
    f"torch.aten.{name}" for name in ("clamp", "clamp.Tensor", "clamp_min", "clamp_max", "maximum", "minimum")
)


class _Past(Pattern):
    """``inner``, seen through operations of the names given, along their first operand."""

    def __init__(self, inner: Pattern, *names: str):
        self.inner, self.names = inner, names

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        while (op := torch_ir.producer(value)) is not None and op.name in self.names:
            value = _computed(op)
        yield from self.inner.match(value, bound)


_SQUARE = OneOf(
    Op("torch.aten.pow.Tensor_Scalar", Var("h"), Is(2)), Op("torch.aten.mul.Tensor", Var("h"), Var("h"))
)
_MEAN_OF_SQUARES = _Past(
    OneOf(
        Op("torch.aten.mean.dim", _SQUARE, Const("axes"), ANY, ANY),
        Op("torch.aten.mean", _SQUARE, ANY),
    ),
    *("torch.aten.add.Scalar", "torch.aten.add.Tensor", _CAST, "torch.aten.expand", *_RESHAPES, *_BOUNDS),
)


class UnmatchedNorm:
    """A reciprocal root of a mean of squares that is part of no norm."""

    roots = ("torch.aten.rsqrt", "torch.aten.sqrt", "torch.aten.pow.Tensor_Scalar")

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        if not _divides(op):
            return None
        found = first_match(_MEAN_OF_SQUARES, op.operands[0])
        return NearMiss("rms_norm", _why_no_norm(op, found)) if found is not None else None


def _divides(root: ir.Operation) -> bool:
    """Whether ``root`` is a square root that something is divided by, in one spelling or another."""
    if root.name == "torch.aten.rsqrt":
        return True
    if root.name == "torch.aten.pow.Tensor_Scalar":
        return torch_ir.constant(root.operands[1]) == -0.5
    users = torch_ir.users(root.result)
    return any(
        user.name == "torch.aten.reciprocal"
        or (user.name == "torch.aten.div.Tensor" and user.operands[1] == root.result)
        for user in users
    )


def _why_no_norm(root: ir.Operation, found: Bindings) -> str:
    core = rms_norm.why_not_core({"axes": [], **found})
    if core is not None:
        return core
    if root.name != "torch.aten.rsqrt":
        return "it divides by a square root, which rounds otherwise than a product with torch.rsqrt: use that"
    if first_match(rms_norm.RSTD, root.result) is None:
        return "between the mean of squares and torch.rsqrt is more than the addition of a constant epsilon"
    products = [op for op in _readers(root.result) if op.name == "torch.aten.mul.Tensor"]
    products = [op for op in products if found["h"] in list(op.operands)]
    if not products:
        return "its reciprocal root is not multiplied with the tensor that the mean of squares was taken of"
    x, y = torch_ir.uncast(found["h"]), products[0].result
    readers = ", ".join(dict.fromkeys(_short(op) for op in torch_ir.users(y))) or "nothing"
    return (
        f"its value before rounding, {torch_ir.tensor_type(y)}, is read by {readers}; a kernel writes "
        f"{torch_ir.dtype_of(x)}, as it reads: round it once, before anything but a weight's product or a "
        "quantization reads it"
    )


def _readers(value: ir.Value) -> list[ir.Operation]:
    """What reads ``value``, seen through views."""
    found = []
    for op in torch_ir.users(value):
        found += _readers(op.result) if op.name in _RESHAPES else [op]
    return found


_QUOTIENTS = (
    "torch.aten.div.Tensor",
    "torch.aten.mul.Tensor",
    "torch.aten.div.Scalar",
    "torch.aten.mul.Scalar",
)
_LARGEST = tuple(
    f"torch.aten.{name}" for name in ("amax", "max.dim", "max", "linalg_vector_norm", "aminmax", "amin")
)
_IN_A_SCALE = (*_QUOTIENTS, *_BOUNDS, *_RESHAPES, _CAST, group_quant.ROUND, "torch.aten.reciprocal")


class UnmatchedQuantization:
    """A cast to eight bits of a quotient that is no group quantization."""

    roots = (_CAST,)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        source = torch_ir.dtype_of(op.operands[0])
        if torch_ir.dtype_of(op.result) not in LARGEST_FINITE or source is None or "float" not in source:
            return None
        quotient, stored = op.operands[0], 0
        while (maker := torch_ir.producer(quotient)) is not None and maker.name not in _QUOTIENTS:
            if maker.name not in (*_BOUNDS, *_RESHAPES, _CAST, group_quant.ROUND):
                return None
            quotient, stored = _computed(maker), stored + 1
        if maker is None or (torch_ir.dtype_of(op.result) == "int8" and not stored):
            return None  # a plain cast, or one of some product to whole numbers
        return NearMiss("group_quant", _why_no_quantization(op.result, maker))


def _computed(op: ir.Operation) -> ir.Value:
    """The operand of ``op`` that is no constant."""
    is_constant = torch_ir.constant(op.operands[0]) is not torch_ir.NOT_CONSTANT
    return op.operands[1] if is_constant else op.operands[0]


def _why_no_quantization(q: ir.Value, quotient: ir.Operation) -> str:
    found = group_quant.written_out(q)
    contract = group_quant.read_contract(found, q) if found is not None else None
    if isinstance(contract, str):
        return contract
    assert not isinstance(contract, Quantization), "a recogniser takes what a contract says"
    path = _path_to_largest(list(quotient.operands)[::-1])
    if path is None:
        return "its scale is not computed from the largest magnitude of a row or group of its values"
    if torch_ir.dtype_of(quotient.result) != "float32":
        dtype = torch_ir.dtype_of(quotient.result)
        return f"the quotient is taken in {dtype}; widen the tensor with .float() before"
    return _why_no_scale(path[:-1], path[-1], torch_ir.uncast(quotient.operands[0]))


def _why_no_scale(path: list[ir.Operation], largest: ir.Operation, x: ir.Value) -> str:
    """What is wrong with a scale computed along ``path`` from the reduction ``largest``."""
    if largest.name == "torch.aten.max":
        return "it has one scale for the whole tensor; kernels have one for each row or group of it"
    narrow = (op for op in path if op.name in (*_QUOTIENTS, *_BOUNDS))
    dtype = next((d for op in narrow if (d := torch_ir.dtype_of(op.result)) != "float32"), None)
    if dtype is not None:
        return f"its scale is computed in {dtype}; widen the largest magnitude with .float() first"
    other = next((op for op in path if op.name not in _IN_A_SCALE), None)
    if other is not None:
        return (
            f"{_short(other)} is part of its scale, which must be the largest magnitude over a constant, "
            "within constant bounds, or that rounded up to a power of two"
        )
    source = torch_ir.producer(largest.operands[0])
    magnitude = source is not None and source.name == "torch.aten.abs"
    if not magnitude and largest.name != "torch.aten.linalg_vector_norm":
        return "its scale is made of the largest value; take the largest magnitude, x.abs().amax(...)"
    of = source.operands[0] if source is not None and magnitude else largest.operands[0]
    if torch_ir.uncast(of) != x:
        return "its scale is the largest magnitude of another tensor, or of another view, than it divides"
    return "its scale is not the largest magnitude over one constant within constant bounds"


def _path_to_largest(values: list[ir.Value], depth: int = 16) -> list[ir.Operation] | None:
    """The operations from one of ``values`` up to the reduction that it was computed from."""
    for value in values:
        op = torch_ir.producer(value)
        if op is None or depth == 0:
            continue
        if op.name in _LARGEST:
            return [op]
        above = _path_to_largest(list(op.operands), depth - 1)
        if above is not None:
            return [op, *above]
    return None


def _short(op: ir.Operation) -> str:
    return torch_ir.op_name(op).removeprefix("torch.")


_SCORES = ("torch.aten.sigmoid", "torch.aten._softmax", "torch.aten.softmax.int")
_ROUTING = "write it like torch.ops.lowering.grouped_topk, or call that"


class UnmatchedRouting:
    """Scores gathered by the largest of their biased values that are part of no grouped top-k routing."""

    roots = ("torch.aten.gather",)

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        scores, chosen = _as_computed(op.operands[0]), torch_ir.producer(op.operands[2])
        if scores is None or scores.name not in _SCORES or chosen is None or chosen.name != "torch.aten.topk":
            return None
        if not _adds_to(scores, chosen.operands[0]):
            return None
        return NearMiss("grouped_topk", _why_no_routing(op, scores))


def _as_computed(value: ir.Value) -> ir.Operation | None:
    """What computed ``value``, seen through casts and views."""
    op = torch_ir.producer(value)
    while op is not None and op.name in (_CAST, *_RESHAPES):
        op = torch_ir.producer(op.operands[0])
    return op


def _adds_to(scores: ir.Operation, choices: ir.Value) -> bool:
    """Whether ``choices`` are ``scores`` and something added, some of them perhaps masked."""
    op = _as_computed(choices)
    if op is not None and op.name == "torch.aten.where.self":
        return any(_adds_to(scores, value) for value in list(op.operands)[1:])
    if op is None or op.name != "torch.aten.add.Tensor":
        return False
    return any(_as_computed(value) == scores for value in list(op.operands)[:2])


def _why_no_routing(gathered: ir.Operation, scores: ir.Operation) -> str:
    if scores.name != "torch.aten.sigmoid":
        return f"its scores are a softmax, and the routing kernel's are a sigmoid; {_ROUTING}"
    dtype = torch_ir.dtype_of(scores.result)
    if dtype != "float32":
        return f"its scores are rounded to {dtype} before the bias is added; widen the gating with .float()"
    if torch_ir.dtype_of(gathered.result) != "float32":
        return f"its weights are rounded to {torch_ir.dtype_of(gathered.result)}; gather float32 scores"
    return f"its groups, mask or top-k are not those of the routing kernel; {_ROUTING}"


SUSPICIONS: tuple[Suspicion, ...] = (
    UnmatchedNorm(),
    UnmatchedQuantization(),
    UnmatchedRouting(),
    *named_ops.SUSPICIONS,
)
