"""Read a call of an operation that another library has a name for as what it computes.

A row (``NamedOp``) maps a name to the canonical op or ops it stands for: which argument holds what, by the
argument's name, and the contract, field by field, as a value or as the argument that gives it.
A row may be a norm or a gated activation, a quantization, or the one and then the other.

An operation that writes into its arguments has no place in a functional program; ``functional`` is
the name of its twin, which takes the same arguments and returns what would have been written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from iree.compiler import ir

from . import canonical, gated_activation, torch_ir
from .contracts import LARGEST_FINITE, GatedActivation, Norm, Quantization, static_quantization
from .recogniser import NearMiss, Raised
from .torch_ir import TensorType
from .well_typed import is_given_scale, norm_dtype

FUNCTIONAL = "vmfuse_functional"
# What the twin of a quantization is told besides: how the caller laid out the tensor for the scales.
LAYOUT = "scale_layout"

Role = Literal["y", "sum", "q", "scale", "weights", "ids", "source", "mean", "rstd"]

# Arguments that hold tensors, besides x: fields of a row that name them.
_TENSORS = ("weight", "bias", "residual", "given")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_EPSILON = {"bfloat16": 2.0**-23, "float16": 2.0**-23, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True)
class Arg:
    """A field of a contract that an argument of the call gives; ``becomes`` translates its values."""

    name: str
    becomes: Mapping[Any, Any] | None = None


Fields = Mapping[str, Any]
# The layout that the caller gave the tensor for the scales.
SCALE_LAYOUT = Arg(LAYOUT, {None: "row", **{name: name for name in ("row", "column", "column_tma")}})


@dataclass(frozen=True)
class NamedOp:
    """One row: ``name`` with its ``schema`` stands for ``norm`` or ``gate``, then ``quantization``.

    results
        What the results are; of an operation that writes into its arguments, what those become.
    norm, gate, quantization
        Fields of the contracts; None where the operation has no such part.
    x, weight, bias, residual, given
        Names of the arguments that hold the tensors; ``given`` the scale of a quantization that makes none.
    shape
        The argument that lists the normalized axes; only the last one is a norm as meant here.
    lower
        The argument that holds the lower bound of the quantized values, which must be minus the upper one.
    dtypes
        Fields of the quantization for each dtype of its values, where that decides; others are refused.
    requires
        What other arguments must be; with any other value the operation is not recognised.
    unwritten
        Arguments that the schema says are written, and such a call leaves out.
    refused
        Why no contract says what it computes: it is in the table so that a call is refused with this.
    is_declared
        Whether declaring the table declares it; models that register operations themselves often do others.
    """

    name: str
    schema: str
    results: tuple[Role, ...]
    x: str = "input"
    weight: str | None = None
    bias: str | None = None
    residual: str | None = None
    given: str | None = None
    norm: Fields | None = None
    gate: Fields | None = None
    quantization: Fields | None = None
    shape: str | None = None
    lower: str | None = None
    dtypes: Mapping[str, Fields] = field(default_factory=dict)
    requires: Fields = field(default_factory=dict)
    unwritten: tuple[str, ...] = ()
    refused: str | None = None
    is_declared: bool = True

    def shapes(self, given: Mapping[str, Any], fp8: str) -> dict[str, tuple[tuple[Any, ...], Any]]:
        """Shape and dtype (a name, or that of an argument) of each result, for declaring the operation.

        given: the arguments by name.  fp8: what quantizations that leave it to their platform return.  Raises
        ValueError where the arguments do not fit each other.
        """
        x, group = given[self.x], given.get("group_size")
        hidden = x.shape[-1] // 2 if self.gate is not None else x.shape[-1]
        if group is not None and hidden % group:
            raise ValueError(f"{self.name}: group {group} does not divide the last axis, {hidden}")
        return {
            "y": ((*x.shape[:-1], hidden), x.dtype),
            "sum": (x.shape, x.dtype),
            "q": ((*x.shape[:-1], hidden), fp8),
            "scale": ((*x.shape[:-1], hidden // group if group else 1), "float32"),
        }

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        return tuple(name for name, _ in _arguments(self.schema))

    @cached_property
    def required(self) -> int:
        """Count the arguments before the first that has a default."""
        inside = self.schema[: self.schema.rindex("->")]
        return (
            len(_arguments(f"{inside[: inside.find('=')]}) ->")) - 1 if "=" in inside else len(self.arguments)
        )

    @cached_property
    def mutated(self) -> tuple[str, ...]:
        """The arguments it writes into."""
        written = tuple(name for name, type_ in _arguments(self.schema) if "!" in type_)
        return tuple(name for name in written if name not in self.unwritten)

    @property
    def functional(self) -> str:
        without = "".join(f"__without_{name}" for name in self.unwritten)
        return f"{FUNCTIONAL}::{self.name.replace('::', '__')}{without}"

    def is_called(self, given: Mapping[str, Any]) -> bool:
        """Tell whether a call of the operation with these arguments writes what this row says it does."""
        written = (name for name, type_ in _arguments(self.schema) if "!" in type_)
        return all((given.get(name) is None) == (name in self.unwritten) for name in written)

    @cached_property
    def functional_schema(self) -> str:
        """The twin's schema: nothing is written, everything that was is returned."""
        inside = self.schema[: self.schema.rindex("->")].replace("!", "").strip()
        if "scale" in self.results:
            inside = f"{inside[:-1]}, str {LAYOUT}='row')"
        return f"{inside} -> ({', '.join('Tensor' for _ in self.mutated)})"

    @property
    def roots(self) -> tuple[str, ...]:
        """Names in the torch dialect."""
        names = (self.name, self.functional) if self.mutated else (self.name,)
        return tuple(f"torch.{name.replace('::', '.')}" for name in names)

    def recognise(self, op: ir.Operation) -> Raised | None:
        try:
            return self._read(op)
        except Refusal:
            return None

    def why_not(self, op: ir.Operation) -> str | None:
        """Say why this row does not stand for the call ``op``; None if it does."""
        try:
            self._read(op)
        except Refusal as refusal:
            return str(refusal)
        return None

    def accepts(self, op: ir.Operation) -> bool:
        """Tell whether the call has what the row requires, so that a refusal is about the call itself."""
        try:
            self._check_required(self._operands(op))
        except Refusal:
            return False
        return True

    def _operands(self, op: ir.Operation) -> dict[str, ir.Value]:
        """The operands of the call ``op`` by name; refuses where their number is none there may be."""
        names = self.arguments
        if len(op.operands) == len(names) + 1 and self.mutated and "scale" in self.results:
            names = (*names, LAYOUT)
        # MLIR written by hand may leave out what the schema has a value for, and so do older libraries.
        names = names[: max(len(op.operands), self.required)]
        fits = len(op.operands) == len(names)
        require(fits, f"its arguments and results are not those of {self.name}{self.schema}")
        return dict(zip(names, op.operands, strict=True))

    def _check_required(self, operands: Mapping[str, ir.Value]) -> None:
        """Refuse where an argument is not what is required; one left out has its default, which is."""
        require(self.refused is None, str(self.refused))
        for name, value in self.requires.items():
            found = torch_ir.constant(operands[name]) if name in operands else value
            require(found == value, f"{name} is {shown(found)}, not {value}")

    @property
    def site(self) -> str:
        """Name the last operation it stands for, as the report does."""
        if self.quantization is not None:
            return "group_quant"
        if self.norm is not None:
            return "layer_norm" if self.norm.get("statistic") == "variance" else "rms_norm"
        return f"{(self.gate or {})['activation']}_mul"

    def _read(self, op: ir.Operation) -> Raised:
        call = Call.of(self, op)
        self._check_required(call.operands)
        producer = self._producer(call)
        if self.quantization is None:
            return producer
        quantized = call.source if producer is call.source else producer.results[0]
        if isinstance(quantized, ir.Value):
            quantized = torch_ir.tensor_type(quantized)
        return self._quantization(call, producer, quantized)

    def _producer(self, call: Call) -> Any:
        """Give what makes the row: a Raised, or x itself where nothing does."""
        if self.norm is not None:
            return self._norm(call, self.norm)
        if self.gate is not None:
            return self._gate(call, self.gate)
        return call.tensors["x"]

    def _norm(self, call: Call, row: Fields) -> Raised:
        values = call.fields(row)
        self._check_norm(call)
        if values.get("eps") is None:  # torch's default
            values["eps"] = _EPSILON[call.x.dtype]
        weight = call.types.get("weight")
        y = call.types.get("y") or _with_dtype(call.x, "float32")
        values["rounding"] = _rounding(values.get("rounding", "once"), call.x, weight, y)
        values["bias"] = "once" if "bias" in call.tensors else None
        contract = Norm(**values)
        wanted = _with_dtype(call.x, norm_dtype(contract, call.x, weight))
        require("y" not in self.results or y == wanted, f"its result is {y}, where the contract has {wanted}")
        contract, tensors = _within(contract, {"y": wanted, **call.tensors})
        names = ("x", "gate", "residual", "weight", "bias")
        operands = [tensors[name] for name in names if name in tensors]
        results = [tensors["y"]]
        if contract.residual is not None:
            results.append(call.tensors.get("sum", call.x))
        return Raised(canonical.NORM, contract, operands, results)

    def _check_norm(self, call: Call) -> None:
        """Check that the tensors are those of a norm over the last axis."""
        for name, role in ((self.weight, "weight"), (self.bias, "bias")):
            if (vector := call.types.get(role)) is not None:
                row = TensorType((call.hidden,), vector.dtype)
                require(vector == row, f"{name} is {vector}, not a vector over the last axis of {call.x}")
                require(vector.dtype in _FLOATS, f"{name} is {vector.dtype}, not one of {_FLOATS}")
        residual = call.types.get("residual")
        same = residual is None or residual == call.x
        require(same, f"{self.residual} is {residual} and {self.x} is {call.x}: they must be the same")
        statistics = [call.tensors[role] for role in ("mean", "rstd") if role in call.tensors]
        unread = not any(torch_ir.users(value) for value in statistics)
        require(unread, "its mean or its rstd is read as well, which a kernel does not write")
        if self.shape is not None:
            known = call.hidden is not None
            require(
                known, "the size of the last axis is unknown until run time; a kernel is made for one size"
            )
            axes = call.value(self.shape)
            last = axes == [call.hidden]
            require(last, f"{self.shape} is {shown(axes)}; a kernel norms the last axis alone")

    def _gate(self, call: Call, row: Fields) -> Raised:
        values = call.fields(row)
        halves = call.hidden is not None and call.hidden % 2 == 0
        require(halves, f"the last axis of {self.x}, {call.x}, has no two halves of known size")
        rounding = values.get("rounding", "once")
        if rounding == "twice" and call.x.dtype == "float32":
            values["rounding"] = "once"  # nothing is rounded in between, and one contract is enough
        y = call.x.with_last((call.hidden or 0) // 2, "float32" if rounding == "none" else None)
        fits = "y" not in self.results or call.types["y"] == y
        require(fits, f"its result is {call.types.get('y')}, where the contract has {y}")
        contract = GatedActivation(**values)
        return Raised(canonical.GATED_ACTIVATION, contract, [call.tensors["x"]], [call.tensors.get("y", y)])

    def _quantization(self, call: Call, producer: Any, y: TensorType | None) -> Raised:
        values, q = call.fields(self.quantization or {}), call.types["q"]
        known = y is not None and y.shape[-1] is not None
        require(known, "the size of the last axis, which holds the groups, is unknown until run time")
        require(q.dtype in LARGEST_FINITE, f"its values are {q.dtype}, not one of {tuple(LARGEST_FINITE)}")
        if self.dtypes:
            require(q.dtype in self.dtypes, f"its values are {q.dtype}, not one of {tuple(self.dtypes)}")
            values |= self.dtypes[q.dtype]
        if self.given is not None:
            return self._static(call, producer, values)
        scale = call.types["scale"]
        limit = values.pop("limit", None)
        lower = call.value(self.lower) if self.lower else None
        bounds = f"{self.lower} is {shown(lower)} and the upper bound {shown(limit)}: they must be opposite"
        require(self.lower is None or lower == -limit, bounds)
        largest = LARGEST_FINITE[q.dtype]
        values["limit"] = None if limit == largest else limit
        group = values.get("group")
        values["group"] = group if group and group > 0 else None  # ours, for the whole row
        if scale.dtype == "int32":
            values["layout"] = "ue8m0_packed"
        contract = Quantization(dtype=q.dtype, **values)
        packed = contract.layout == "ue8m0_packed"
        require(packed == (scale.dtype == "int32"), f"scales in layout {contract.layout} are {scale.dtype}")
        require(contract.qmax <= largest, f"its bound {contract.qmax:g} is more than {q.dtype} holds")
        assert y is not None
        wanted = canonical.quantized_types(y, contract)
        require((q, scale) == wanted, f"its results are {q} and {scale}, not {wanted[0]} and {wanted[1]}")
        return Raised(canonical.GROUP_QUANT, contract, [producer], [call.tensors["q"], call.tensors["scale"]])

    def _static(self, call: Call, producer: Any, values: dict[str, Any]) -> Raised:
        """Read a quantization by a scale that is given."""
        q, given = call.types["q"], call.types.get("given")
        require(is_given_scale(given), f"{self.given} is {given}, not one float32")
        contract = static_quantization(q.dtype, **values)
        operands = [producer, call.tensors["given"]]
        return Raised(canonical.GROUP_QUANT, contract, operands, [call.tensors["q"]])


def nearest(rows: Sequence[NamedOp], op: ir.Operation) -> NamedOp:
    """Choose, of rows that need different values of an argument, that of the call's: it can tell more."""
    return next((row for row in rows if row.accepts(op)), rows[0])


class RefusedCall:
    """A call of an operation of a table that none of its ``rows`` stands for."""

    def __init__(self, rows: Sequence[NamedOp]):
        self.rows = rows
        self.roots = tuple(dict.fromkeys(root for row in rows for root in row.roots))

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        rows = [row for row in self.rows if torch_ir.op_name(op) in row.roots]
        row = nearest(rows, op)
        return NearMiss(row.site, f"{row.name}: {row.why_not(op)}")


class Refusal(Exception):
    """Say why a row does not stand for a call: which argument is what, and what it would have to be."""


def require(condition: bool, refusal: str) -> None:
    """Raise ``refusal`` unless ``condition`` holds."""
    if not condition:
        raise Refusal(refusal)


def shown(value: Any) -> str:
    """Spell the value of an argument for a refusal."""
    return "computed" if value is torch_ir.NOT_CONSTANT else str(value)


@dataclass(frozen=True)
class Call:
    """The operands and results of one operation, by name and by role."""

    operands: Mapping[str, ir.Value]
    tensors: Mapping[str, ir.Value]
    types: Mapping[str, TensorType]

    @staticmethod
    def of(row: NamedOp, op: ir.Operation) -> Call:
        """Raises a refusal where the operation is not of the row's schema."""
        operands = row._operands(op)
        fits = len(op.results) == len(row.results)
        require(fits, f"its arguments and results are not those of {row.name}{row.schema}")
        tensors: dict[str, ir.Value] = dict(zip(row.results, op.results, strict=True))
        named = (("x", row.x), *((role, getattr(row, role)) for role in _TENSORS))
        for role, name in named:
            if name in operands and torch_ir.constant(operands[name]) is not None:
                tensors[role] = operands[name]
        types = {role: torch_ir.tensor_type(value) for role, value in tensors.items()}
        known = {role: type_ for role, type_ in types.items() if type_ is not None}
        x = known.get("x")
        unknown = ", ".join(role for role in types if role not in known)
        require(not unknown, f"rank or dtype of {unknown} is not known")
        require(x is not None and bool(x.shape), f"{row.x} is {x}, which has no last axis")
        assert x is not None
        require(x.dtype in _FLOATS, f"{row.x} is {x.dtype}, not one of {', '.join(_FLOATS)}")
        return Call(operands, tensors, known)

    @property
    def x(self) -> TensorType:
        return self.types["x"]

    @property
    def source(self) -> ir.Value:
        return self.tensors["x"]

    @property
    def hidden(self) -> int | None:
        return self.x.shape[-1]

    def value(self, name: str) -> Any:
        """Give the argument ``name``; None also where only a twin has it."""
        return torch_ir.constant(self.operands[name]) if name in self.operands else None

    def fields(self, row: Fields) -> dict[str, Any]:
        """The fields of ``row`` with arguments read; refuses where one of them is computed or unknown."""
        values: dict[str, Any] = {}
        for name, given in row.items():
            value = given
            if isinstance(given, Arg):
                if given.name not in self.operands and given.becomes is None:
                    continue  # the contract's default, which is the schema's
                value = self.value(given.name)
                computed = value is torch_ir.NOT_CONSTANT
                require(not computed, f"{given.name} is computed; it must be a constant")
                if given.becomes is not None:
                    require(value in given.becomes, f"{given.name} is {value}, which has no meaning here")
                    value = given.becomes[value]
            values[name] = value
        return values


def _arguments(schema: str) -> list[tuple[str, str]]:
    """Name and type of every argument of a schema, in its order."""
    inside = schema[schema.index("(") + 1 : schema.rindex("->")].strip()[:-1]
    parts = [part.split("=")[0].split() for part in re.split(r",\s*", inside)]
    return [(part[-1], part[0]) for part in parts if part != ["*"]]


def _within(contract: Norm, tensors: dict[str, Any]) -> tuple[Norm, dict[str, Any]]:
    """Let a norm that adds nothing do the gate before it and the rounding behind it, if there are any."""
    if contract.residual is not None:
        return contract, tensors
    y = torch_ir.rounded_later(tensors["y"]) if isinstance(tensors["y"], ir.Value) else None
    if y is not None and contract.rounding == "once":
        exact, dtype = torch_ir.widened_from(tensors["x"]), torch_ir.dtype_of(y)
        is_exact = torch_ir.dtype_of(exact) == dtype
        contract = replace(contract, dtype=None if is_exact else dtype)
        tensors = {**tensors, "x": exact if is_exact else tensors["x"], "y": y}
    gated = gated_activation.product(tensors["x"])
    if gated is None or gated.up.type != tensors["x"].type:
        return contract, tensors
    return replace(contract, gate=gated.contract), {**tensors, "x": gated.up, "gate": gated.gate}


def _with_dtype(type_: TensorType, dtype: str) -> TensorType:
    """``type_`` with other elements."""
    return TensorType(type_.shape, dtype)


def _rounding(rounding: Any, x: TensorType, weight: TensorType | None, y: TensorType) -> Any:
    """The rounding for the dtypes at hand.

    Two roundings are one where there is no weight or nothing but float32, and where a weight of
    another dtype gives a result in x's: there the product is taken in float32.
    """
    if rounding != "twice":
        return rounding
    one = weight is None or x.dtype == "float32" or (weight.dtype != x.dtype and y.dtype == x.dtype)
    return "once" if one else "twice"
