"""Group quantization written out, raised to ``vmfuse.group_quant``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import LARGEST_FINITE, Quantization, Quotient, ScaleDivision, static_quantization
from .match import (
    ANY,
    Aside,
    Bindings,
    Const,
    Exact,
    Is,
    Named,
    One,
    OneOf,
    Op,
    Pattern,
    Statistic,
    Var,
    f32,
    first_match,
    past_unit_axis,
    times_one,
)
from .operation import Operation
from .recogniser import Raised, WithoutLastAxis
from .well_typed import why_no_quantization

OPERATION = Operation(
    canonical.GROUP_QUANT, Quantization, why_no_quantization, site=lambda quantization: "group_quant"
)

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
        if math.isnan(low) or math.isnan(high):
            return
        for found in self.match(step["inner"], bound):
            bounds = {name: min(max(found[name], low), high) for name in (self.low, self.high)}
            yield {**found, **bounds}


_INFINITE = {"low": -math.inf, "high": math.inf}


def _number(given: object, otherwise: float) -> float:
    return float(given) if isinstance(given, (int, float)) else otherwise


_X = Exact("x")
_MAGNITUDE = Aside(Op("torch.aten.abs", _X))
_LARGEST = OneOf(
    Statistic("amax", _MAGNITUDE),
    Statistic("max.dim", _MAGNITUDE),
    Statistic("linalg_vector_norm", _X, Is(math.inf)),
)
_AMAX = Named("amax", Aside(_Bounded(Aside(_LARGEST), "amax_floor", "amax_ceiling")))
_LINEAR = OneOf(
    f32("div.Scalar", _AMAX, Const("qmax")),
    f32("div.Tensor", _AMAX, Const("qmax")),
    f32("mul.Scalar", _AMAX, Const("inverse_qmax")),
    f32("mul.Tensor", _AMAX, Const("inverse_qmax"), commutative=True),
)
_FLOORED = Aside(_Bounded(Aside(_LINEAR), "scale_floor", "scale_ceiling"))


_CAST = "torch.prims.convert_element_type"


def _i32(name: str, *operands: Pattern, capture: str | None = None) -> Op:
    return Op(f"torch.aten.{name}", *operands, capture=capture, dtype="int32")


def _with_number(names: tuple[str, str], inner: Pattern, number: int) -> OneOf:
    """An operation of integers with a number, given as a number or as a tensor that is one."""
    return OneOf(*(_i32(name, inner, Is(number)) for name in names))


_AND = ("bitwise_and.Scalar", "bitwise_and.Tensor")
_RIGHT = ("__rshift__.Scalar", "bitwise_right_shift.Tensor")
_LEFT = ("__lshift__.Scalar", "bitwise_left_shift.Tensor")


def _maybe(name: str, inner: Pattern) -> OneOf:
    return OneOf(Op(name, inner), inner)


# 2^ceil(log2(scale)), and the same from the bits of the float: DeepGEMM has had both.  Of infinity the
# first is infinite, the second bounded.
_EXPONENT = f32("ceil", f32("log2", _maybe("torch.aten.abs", _FLOORED)))
_BITS = _i32("view.dtype", _maybe("torch.aten.abs", _FLOORED), ANY, capture="bits")
_MANTISSA = _with_number(_AND, Var("bits"), 0x7FFFFF)
_BIASED = _i32(
    "add.Tensor",
    _with_number(_AND, _with_number(_RIGHT, _BITS, 23), 0xFF),
    Op(
        _CAST,
        OneOf(
            Op(_CAST, _MANTISSA, ANY, dtype="bool"),
            Op("torch.aten.ne.Scalar", _MANTISSA, Is(0)),
        ),
        ANY,
        dtype="int32",
    ),
    Is(1),
)
_POWER = OneOf(
    Named("infinite", OneOf(f32("exp2", _EXPONENT), f32("pow.Scalar", Is(2), _EXPONENT))),
    f32(
        "view.dtype",
        _with_number(_LEFT, _i32("clamp", _BIASED, Is(1), Is(254)), 23),
        ANY,
    ),
)
_SCALE = Aside(Named("scale", OneOf(Named("power", _POWER), _FLOORED.inner)))


_INVERSE = Aside(times_one(f32("reciprocal", _SCALE, capture="inverse")))
# The inverse of a scale, from the largest magnitude itself.  PyTorch divides a number by a tensor in two
# steps.
_TURNED = Aside(times_one(f32("reciprocal", _AMAX)))
_INVERTED = OneOf(
    Named("inverted", f32("div.Tensor", Const("qmax"), _AMAX)),
    Named("inverted_twice", f32("mul.Scalar", _TURNED, Const("qmax"))),
    Named("inverted_twice", f32("mul.Tensor", _TURNED, Const("qmax"), commutative=True)),
)
_QUOTIENT = OneOf(
    f32("div.Tensor", _X, _SCALE),
    f32("mul.Tensor", _X, _INVERSE, commutative=True),
    f32("mul.Tensor", _X, Aside(_INVERTED), commutative=True),
)
ROUND = "torch.aten.round"
_QUANTIZED = Op(_CAST, _Bounded(_QUOTIENT, "low", "high", through=(ROUND,)), ANY)
_GIVEN = One("given")
_BY_GIVEN = OneOf(
    f32("div.Tensor", _X, _GIVEN),
    f32("mul.Tensor", _X, Aside(times_one(f32("reciprocal", _GIVEN, capture="inverse"))), commutative=True),
    Named("product", f32("mul.Tensor", _X, _GIVEN, commutative=True)),
)
_STATIC = Op(_CAST, _Bounded(_BY_GIVEN, "low", "high", through=(ROUND,)), ANY)


class DecomposedGroupQuant:
    """Group quantization written out: abs, amax, bounds, division, bounds, cast; a last axis is a group.

    The scale may be given instead, as a tensor of one number, or 1 over it.
    The largest magnitude may be taken with amax, max or the infinity norm, with or without the reduced
    axis; bounds are clamps, minima or maxima; the scale may be rounded up to a power of two; and
    the values rounded before or after they are bounded.  The reshape into groups before it and back
    after it are views like any other.
    """

    roots = (_CAST,)

    def recognise(self, op: ir.Operation) -> Raised | None:
        if torch_ir.dtype_of(op.result) not in LARGEST_FINITE:
            return None
        return self._dynamic(op) or self._static(op)

    def _static(self, op: ir.Operation) -> Raised | None:
        found = by_given_scale(op.result)
        contract = read_static_contract(found, op.result) if found is not None else None
        if found is None or not isinstance(contract, Quantization):
            return None
        return Raised(canonical.GROUP_QUANT, contract, [found["x"], found["given"]], [op.result])

    def _dynamic(self, op: ir.Operation) -> Raised | None:
        found = first_match(_QUANTIZED, op.result)
        contract = read_contract(found, op.result) if found is not None else None
        if found is None or not isinstance(contract, Quantization):
            return None
        q, value = torch_ir.tensor_type(op.result), _scale(found)[1]
        assert q is not None
        scale = torch_ir.tensor_type(value) if value is not None else q.with_last(1, "float32")
        assert scale is not None
        whole = value is None or len(scale.shape) == len(q.shape)
        scales = (value or scale) if whole else WithoutLastAxis(value)
        return Raised(canonical.GROUP_QUANT, contract, [found["x"]], [op.result, scales])


def written_out(value: ir.Value) -> Bindings | None:
    """The parts of a group quantization whose q is ``value``, whether they fit together or not."""
    return first_match(_QUANTIZED, value)


def by_given_scale(value: ir.Value) -> Bindings | None:
    """The parts of a quantization of ``value`` by one given scale, whether they fit together or not."""
    return first_match(_STATIC, value)


def read_static_contract(found: Bindings, q: ir.Value) -> Quantization | str:
    """Read the contract of a quantization by a given scale, or say in a sentence why no contract says it."""
    dtype, low, high = torch_ir.dtype_of(q) or "", float(found["low"]), float(found["high"])
    largest, whole_numbers = LARGEST_FINITE[dtype], dtype == "int8"
    smallest = -128.0 if whole_numbers else -largest
    if not (0 < high <= largest and smallest <= low < 0):
        return f"its values are not clamped to what {dtype} holds: use .clamp({smallest:g}, {largest:g})"
    if whole_numbers != (ROUND in found) or (whole_numbers and (low != int(low) or high != int(high))):
        return _why_not_rounded(dtype)
    quotient = "reciprocal" if "inverse" in found else "inverse" if "product" in found else "true"
    return static_quantization(dtype, quotient, high, low)


def _why_not_rounded(dtype: str) -> str:
    if dtype == "int8":
        return "the cast to int8 cuts off what is behind the point; round before it, within whole numbers"
    return f"its values are rounded to whole numbers before the cast to {dtype} rounds them"


def read_contract(found: Bindings, q: ir.Value) -> Quantization | str:
    """Read the contract that was written, or say in a sentence why no contract says it."""
    found = {"scale_floor": -math.inf, "scale_ceiling": math.inf, **found}
    type_, x = torch_ir.tensor_type(q), torch_ir.tensor_type(found["x"])
    if type_ is None or x is None or not type_.shape or type_.shape[-1] is None:
        return "the size of the last axis, which holds the groups, is unknown until run time"
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
        scale_division=_scale(found)[0],
        quotient=_quotient(found),
        limit=None if limit == LARGEST_FINITE[type_.dtype] else limit,
        infinite="infinite" in found and found["amax_ceiling"] == math.inf,
        inverse="reciprocal" if "inverted_twice" in found else "true",
    )
    return next(_objections(found, contract), contract)


_ONE_OVER = f32("reciprocal", Var("of"))


def _scale(found: Bindings) -> tuple[ScaleDivision, ir.Value | None]:
    """How the scale is divided, and the value that is; None where only its inverse is written down."""
    if "scale" in found:
        return "true" if "qmax" in found else "reciprocal", found["scale"]
    inverse = found["inverted"] if "inverted" in found else found["inverted_twice"]
    turned = (op.result for op in _readers(inverse) if first_match(_ONE_OVER, op.result) is not None)
    if (value := next(turned, None)) is not None:
        return "inverse", value
    qmax = float(found["qmax"])
    for op in _readers(found["amax"]):
        linear = first_match(_LINEAR, op.result) or {}
        if linear.get("qmax") == qmax:
            return "true", op.result
        if "inverse_qmax" in linear and _limit({**linear, "high": qmax}, qmax) == qmax:
            return "reciprocal", op.result
    return "true", None


def _readers(value: ir.Value) -> Iterator[ir.Operation]:
    """What reads ``value``, or it with another last axis of one element."""
    while (source := past_unit_axis(value)) is not None:
        value = source
    pending = [value]
    for seen in pending:
        for user in torch_ir.users(seen):
            if len(user.results) != 1:
                continue
            if past_unit_axis(user.result) is None:
                yield user
            else:
                pending.append(user.result)


def _is_a_group(x: ir.Value, size: int) -> bool:
    """Tell whether the last axis of ``x`` is part of a row; otherwise it is one."""
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


def _quotient(found: Bindings) -> Quotient:
    if "scale" not in found:
        return "inverse"
    # Dividing by a power of two and multiplying with its reciprocal are one.
    return "reciprocal" if "inverse" in found and "power" not in found else "true"


def _shortest(value: float) -> float:
    """The shortest decimal of the float32 that ``value`` is in the computation, so that equals are equal."""
    rounded = torch_ir.to_float32(value)
    texts = (f"{rounded:.{digits}g}" for digits in range(1, 10))
    return next(float(text) for text in texts if torch_ir.to_float32(float(text)) == rounded)


def _objections(found: Bindings, contract: Quantization) -> Iterator[str]:
    """Say why what was written is not ``contract`` after all."""
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
