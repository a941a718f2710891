"""Group quantization written out, raised to ``vmfuse.group_quant``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import LARGEST_FINITE, Division, Quantization
from .match import ANY, Bindings, Const, Exact, Is, Named, OneOf, Op, Pattern, Var, first_match
from .recogniser import Raised, WithoutLastAxis

# The serving stacks have groups of up to this many elements; a longer last axis is quantized as a row.
_LONGEST_GROUP = 128
_LEAST_NORMAL = 2.0**-126


class _Bounded(Pattern):
    """``inner`` after any number of constant bounds, and of operations that commute with them.

    ``low`` and ``high`` remember the bounds under two names; without one they are infinite.
    """

    _clamp = (Var("inner"), Const("low"), Const("high"))
    _step = OneOf(
        Op("torch.aten.clamp", *_clamp),
        Op("torch.aten.clamp.Tensor", *_clamp),
        Op("torch.aten.clamp_min", Var("inner"), Const("low")),
        Op("torch.aten.clamp_max", Var("inner"), Const("high")),
        Op("torch.aten.maximum", Var("inner"), Const("low"), commutative=True),
        Op("torch.aten.minimum", Var("inner"), Const("high"), commutative=True),
    )

    def __init__(self, inner: Pattern, low: str, high: str, through: tuple[str, ...] = ()):
        self.inner, self.low, self.high, self.through = inner, low, high, through

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        op = torch_ir.producer(value)
        if op is not None and op.name in self.through:
            for found in self.match(op.operands[0], bound):
                yield {**found, op.name: value}
            return
        step = first_match(self._step, value) if torch_ir.dtype_of(value) == "float32" else None
        if step is None:
            for found in self.inner.match(value, bound):
                yield {**found, self.low: -math.inf, self.high: math.inf}
            return
        low, high = (_number(step.get(name), other) for name, other in _INFINITE.items())
        for found in self.match(step["inner"], bound):
            bounds = {name: min(max(found[name], low), high) for name in (self.low, self.high)}
            yield {**found, **bounds}


_INFINITE = {"low": -math.inf, "high": math.inf}


def _number(given: object, otherwise: float) -> float:
    return float(given) if isinstance(given, (int, float)) else otherwise


class _Aside(Pattern):
    """``inner``, seen through views that add or drop a last axis of one and casts that widen."""

    def __init__(self, inner: Pattern):
        self.inner = inner

    def match(self, value: ir.Value, bound: Bindings) -> Iterator[Bindings]:
        while (source := _past_unit_axis(value)) is not None:
            value = source
        yield from self.inner.match(value, bound)


def _past_unit_axis(value: ir.Value) -> ir.Value | None:
    op = torch_ir.producer(value)
    if op is None:
        return None
    if torch_ir.uncast(value) != value:
        return torch_ir.uncast(value)
    if not views.is_flat_view(op):
        return None
    before, after = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(value)
    if before is None or after is None or before.shape.count(None) > 1:
        return None
    return op.operands[0] if (*before.shape, 1) == after.shape or before.shape == (*after.shape, 1) else None


def _f32(name: str, *operands: Pattern, commutative: bool = False) -> Op:
    return Op(name, *operands, commutative=commutative, dtype="float32")


_X = Exact("x")
_MAGNITUDE = _Aside(Op("torch.aten.abs", _X))
_LARGEST = OneOf(
    Op("torch.aten.amax", _MAGNITUDE, Const("axes"), ANY),
    Op("torch.aten.max.dim", _MAGNITUDE, Const("axes"), ANY),
    Op("torch.aten.linalg_vector_norm", _X, Is(math.inf), Const("axes"), ANY, ANY),
)
_AMAX = _Aside(_Bounded(_Aside(_LARGEST), "amax_floor", "amax_ceiling"))
_LINEAR = OneOf(
    _f32("torch.aten.div.Scalar", _AMAX, Const("qmax")),
    _f32("torch.aten.div.Tensor", _AMAX, Const("qmax")),
    _f32("torch.aten.mul.Scalar", _AMAX, Const("inverse_qmax")),
    _f32("torch.aten.mul.Tensor", _AMAX, Const("inverse_qmax"), commutative=True),
)
_FLOORED = _Aside(_Bounded(_Aside(_LINEAR), "scale_floor", "scale_ceiling"))


def _maybe(name: str, inner: Pattern) -> OneOf:
    return OneOf(Op(name, inner), inner)


# 2^ceil(log2(scale)), and the same from the bits of the float: DeepGEMM has had both.
_EXPONENT = Op("torch.aten.ceil", Op("torch.aten.log2", _maybe("torch.aten.abs", _FLOORED)))
_BITS = Op("torch.aten.view.dtype", _maybe("torch.aten.abs", _FLOORED), ANY, capture="bits", dtype="int32")
_MANTISSA = Op("torch.aten.bitwise_and.Scalar", Var("bits"), Is(0x7FFFFF))
_BIASED = Op(
    "torch.aten.add.Tensor",
    Op("torch.aten.bitwise_and.Scalar", Op("torch.aten.__rshift__.Scalar", _BITS, Is(23)), Is(0xFF)),
    Op(
        "torch.prims.convert_element_type",
        OneOf(
            Op("torch.prims.convert_element_type", _MANTISSA, ANY, dtype="bool"),
            Op("torch.aten.ne.Scalar", _MANTISSA, Is(0)),
        ),
        ANY,
    ),
    Is(1),
)
_POWER = OneOf(
    _f32("torch.aten.exp2", _EXPONENT),
    _f32("torch.aten.pow.Scalar", Is(2), _EXPONENT),
    _f32(
        "torch.aten.view.dtype",
        Op("torch.aten.__lshift__.Scalar", Op("torch.aten.clamp", _BIASED, Is(1), Is(254)), Is(23)),
        ANY,
    ),
)
_SCALE = _Aside(Named("scale", OneOf(Named("power", _POWER), _FLOORED.inner)))


def _times_one(a: Pattern) -> Pattern:
    """How PyTorch traces 1.0 / a, behind the reciprocal."""
    return OneOf(Op("torch.aten.mul.Scalar", a, Is(1)), Op("torch.aten.mul.Tensor", a, Is(1)), a)


_INVERSE = _Aside(_times_one(Op("torch.aten.reciprocal", _SCALE, capture="inverse")))
_QUOTIENT = OneOf(
    _f32("torch.aten.div.Tensor", _X, _SCALE),
    _f32("torch.aten.mul.Tensor", _X, _INVERSE, commutative=True),
)
ROUND = "torch.aten.round"
_QUANTIZED = Op("torch.prims.convert_element_type", _Bounded(_QUOTIENT, "low", "high", through=(ROUND,)), ANY)


class DecomposedGroupQuant:
    """Group quantization written out: abs, amax, bounds, division, bounds, cast; a last axis is a group.

    The largest magnitude may be taken with amax, max or the infinity norm, with or without the reduced
    axis; bounds are clamps, minima or maxima; the scale may be rounded up to a power of two; and
    the values rounded before or after they are bounded.  The reshape into groups before it and back
    after it are views like any other.
    """

    roots = ("torch.prims.convert_element_type",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        if torch_ir.dtype_of(op.result) not in LARGEST_FINITE:
            return None
        found = first_match(_QUANTIZED, op.result)
        contract = read_contract(found, op.result) if found is not None else None
        if found is None or not isinstance(contract, Quantization):
            return None
        q, scale = torch_ir.tensor_type(op.result), torch_ir.tensor_type(found["scale"])
        assert q is not None and scale is not None
        whole = len(scale.shape) == len(q.shape)
        scales = found["scale"] if whole else WithoutLastAxis(found["scale"])
        return Raised(canonical.GROUP_QUANT, contract, [found["x"]], [op.result, scales])


def written_out(value: ir.Value) -> Bindings | None:
    """The parts of a group quantization whose q is ``value``, whether they fit together or not."""
    return first_match(_QUANTIZED, value)


def read_contract(found: Bindings, q: ir.Value) -> Quantization | str:
    """What was written, or the sentence that says why no contract does."""
    type_, x = torch_ir.tensor_type(q), torch_ir.tensor_type(found["x"])
    if type_ is None or x is None or not type_.shape or type_.shape[-1] is None:
        return "the size of the last axis, which holds the groups, is unknown until run time"
    axes = found["axes"] if isinstance(found["axes"], list) else [found["axes"]]
    if [axis % len(x.shape) for axis in axes] != [len(x.shape) - 1]:
        return f"the largest magnitude is taken over axes {axes}; the groups of a kernel lie in the last one"
    limit = _limit(found, LARGEST_FINITE[type_.dtype])
    if limit is None:
        return (
            "the largest magnitude is multiplied by a number that is 1 over no bound of "
            f"{type_.dtype}: {found['inverse_qmax']}"
        )
    contract = Quantization(
        group=type_.shape[-1] if _is_a_group(found["x"], type_.shape[-1]) else None,
        dtype=type_.dtype,
        scale="ue8m0" if "power" in found else "float32",
        amax_floor=_shortest(max(found["amax_floor"], 0.0)),
        amax_ceiling=_shortest(found["amax_ceiling"]) if found["amax_ceiling"] < math.inf else None,
        scale_floor=_shortest(max(found["scale_floor"], 0.0)),
        scale_division="true" if "qmax" in found else "reciprocal",
        quotient=_quotient(found),
        limit=None if limit == LARGEST_FINITE[type_.dtype] else limit,
    )
    return next(_objections(found, contract), contract)


def _is_a_group(x: ir.Value, size: int) -> bool:
    """Whether the last axis of ``x`` is part of a row; otherwise it is one."""
    view = torch_ir.producer(x)
    if view is None or not views.is_flat_view(view) or size > _LONGEST_GROUP:
        return False
    before = torch_ir.tensor_type(view.operands[0])
    return before is None or before.shape[-1:] != (size,)


def _limit(found: Bindings, largest: float) -> float | None:
    """The number that the largest magnitude was divided by."""
    if "qmax" in found:
        return float(found["qmax"])
    inverse = torch_ir.to_float32(found["inverse_qmax"])
    candidates = (found["high"], largest, float(round(1 / inverse)) if inverse > 0 else 0.0)
    fitting = (c for c in candidates if 0 < c < math.inf and torch_ir.to_float32(1 / c) == inverse)
    return next(fitting, None)


def _quotient(found: Bindings) -> Division:
    # Dividing by a power of two and multiplying with its reciprocal are one.
    return "reciprocal" if "inverse" in found and "power" not in found else "true"


def _shortest(value: float) -> float:
    """The shortest decimal of the float32 that ``value`` is in the computation, so that equals are equal."""
    rounded = torch_ir.to_float32(value)
    texts = (f"{rounded:.{digits}g}" for digits in range(1, 10))
    return next(float(text) for text in texts if torch_ir.to_float32(float(text)) == rounded)


def _objections(found: Bindings, contract: Quantization) -> Iterator[str]:
    """Why what was written is not ``contract`` after all."""
    limit, low, high = contract.qmax, found["low"], found["high"]
    whole_numbers, rounded = contract.dtype == "int8", ROUND in found
    if not 0 < limit <= LARGEST_FINITE[contract.dtype]:
        yield f"its scale is made for values up to {limit:g}, and {contract.dtype} holds no such"
    if found["scale_ceiling"] < math.inf:
        yield "its scale has an upper bound; bound the largest magnitude instead"
    if contract.amax_ceiling is not None and whole_numbers:
        yield "its largest magnitude has an upper bound, which only 8-bit floats may have"
    if whole_numbers and not rounded:
        yield "the cast to int8 cuts off what is behind the point; round before it"
    if rounded and not whole_numbers:
        yield f"its values are rounded to whole numbers before the cast to {contract.dtype} rounds them"
    if whole_numbers and limit != int(limit):
        yield f"its values are whole numbers, and its scale is made for values up to {limit:g}"
    if low > -limit or high < limit:
        yield (
            f"its scale is made for values up to {limit:g}, and they are bounded to [{low:g}, {high:g}]; "
            "use one number for both"
        )
    normal = max(contract.amax_floor / limit, contract.scale_floor) >= _LEAST_NORMAL
    if contract.scale == "ue8m0" and not normal:
        yield "the power of two of a row of zeros is zero here; bound the largest magnitude from below"
    if (low, high) != (-limit, limit) and not (normal and contract.amax_ceiling is None):
        yield f"where the scale is bounded, or vanishes, values may exceed {limit:g}; clamp them to it"


RECOGNISERS = (DecomposedGroupQuant(),)
