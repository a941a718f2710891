"""Say which rows the kernel computes, and why not the others; its codes for what it knows."""

from __future__ import annotations

import math

from patterns.contracts import LARGEST_FINITE, Norm, Quantization, RowSpec

from ..targets import Target
from .instance import listed
from .row_mapping import GROUPS, needs_whole_row

MAX_QUANTIZATIONS = 4
MAX_HIDDEN = 16384  # on GPUs, where something depends on the whole row
WHOLE_ROW_MULTIPLE = 32  # of elements in a row that is one group
STATISTIC_MULTIPLE = 32  # of elements that share a statistic, where it is not the row's

# What the sources call each of these.
CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
ROUNDINGS = {"none": 0, "once": 1, "twice": 2}
RESIDUALS = {None: 0, "exact": 1, "rounded": 2}
STATISTICS = ("mean_square", "variance")
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3}
LAYOUTS = {"row": 0, "column_tma": 1, "column": 2, "ue8m0_packed": 3}
QUANT_CODES = {"float8_e4m3fn": 0, "float8_e4m3fnuz": 1, "float8_e5m2": 2, "int8": 3}
RECIPROCALS = {"true": 0, "reciprocal": 1, "inverse": 2}
INVERTED_TWICE, SCALE_IS_INVERTED = 4, 8  # added to these: qmax * (1/amax), and a scale of 1 over that
GIVEN = 3  # as a quotient: by a scale that is given
SCALE_SHORT = {"float32": "", "ue8m0": "_ue8m0"}


def reciprocal_code(quantization: Quantization) -> int:
    """Say in a number what y is divided by, or multiplied with."""
    twice = quantization.inverts and quantization.inverse == "reciprocal"
    inverted = not quantization.static and quantization.scale_division == "inverse"
    return RECIPROCALS[quantization.quotient] + INVERTED_TWICE * twice + SCALE_IS_INVERTED * inverted


def why_unsupported(spec: RowSpec, target: Target) -> str | None:
    """Say in a sentence why the row kernel cannot do ``spec`` on ``target``; None if it can."""
    reasons = [_why_not_dtypes(spec), _why_not_gate(spec), _why_not_norm(spec), _why_not_hidden(spec, target)]
    reasons += [*_why_not_quants(spec, target), _why_not_windows(spec)]
    return next((reason for reason in reasons if reason), None)


def _why_not_dtypes(spec: RowSpec) -> str | None:
    known = "bfloat16, float16 and float32"
    if spec.dtype not in CODES:
        return f"The row kernel takes x of {known}, not {spec.dtype}."
    if spec.y_dtype != spec.dtype and (spec.dtype != "float32" or spec.y_dtype not in CODES):
        return f"The row kernel writes {spec.y_dtype} of float32, not of {spec.dtype}."
    if spec.gate_dtype and not (spec.gate_first and spec.dtype == "float32" and spec.gate_dtype in CODES):
        return f"The row kernel has a gate of {spec.gate_dtype} before a norm of float32 alone."
    for name, dtype in (("weight", spec.weight_dtype), ("bias", spec.bias_dtype)):
        if dtype is not None and dtype not in CODES:
            return f"The row kernel takes a {name} of {known}, not {dtype}."
    return None


def _why_not_gate(spec: RowSpec) -> str | None:
    gate = spec.gate
    if spec.gate_first and (gate is None or spec.norm is None):
        return "The row kernel has a gate before its norm only where it has both."
    if gate is None:
        return None
    if spec.norm is not None and (gate.packed or spec.norm.residual or spec.writes_sum):
        return (
            "The row kernel gates what it normalises where nothing is added before, and the gate is a tensor."
        )
    vectors = [dtype for dtype in (spec.weight_dtype, spec.bias_dtype) if dtype is not None]
    others = [dtype for dtype in vectors if dtype != spec.dtype]
    if spec.norm is not None and not spec.gate_first and spec.norm.rounding == "twice" and others:
        return f"The row kernel gates what it normalises with vectors of {spec.dtype}, not {others[0]}."
    if gate.activation not in ACTIVATIONS:
        return f"The row kernel gates with {listed(ACTIVATIONS)}, not {gate.activation}."
    if gate.rounding not in ROUNDINGS:
        return f"The row kernel rounds {listed(ROUNDINGS)}, not {gate.rounding}."
    return None


def _why_not_norm(spec: RowSpec) -> str | None:
    norm = spec.norm
    if norm is None and (spec.weight_dtype or spec.bias_dtype or spec.writes_sum):
        return "The row kernel has a weight, a bias or a residual sum only where it normalises."
    if norm and (reason := _why_not_statistic(norm, spec)):
        return reason
    if norm and (norm.rounding not in ROUNDINGS or norm.residual not in RESIDUALS):
        return f"The row kernel knows no norm with rounding {norm.rounding} and residual {norm.residual}."
    if norm and norm.weight_offset and not spec.weight_dtype:
        return "The row kernel adds an offset to a weight only where there is one."
    if norm and not math.isfinite(norm.weight_offset):
        return f"The offset of the weight must be finite, not {norm.weight_offset}."
    if spec.writes_sum and norm and not norm.residual:
        return "The row kernel can write a residual sum only where there is a residual."
    if not (spec.writes_sum or spec.writes_y or spec.quantizations):
        return "The site writes nothing."
    return None


def _why_not_statistic(norm: Norm, spec: RowSpec) -> str | None:
    if norm.statistic not in STATISTICS:
        return f"The row kernel norms by {listed(STATISTICS)}, not by {norm.statistic}."
    if norm.group is not None and (norm.group % STATISTIC_MULTIPLE or norm.group < 1):
        return f"The row kernel norms groups of multiples of {STATISTIC_MULTIPLE} elements, not {norm.group}."
    if norm.dtype and (norm.rounding != "once" or (spec.gate and not spec.gate_first)):
        return f"The row kernel rounds float32 to {norm.dtype} once, and gates it before or not at all."
    if norm.group is not None and spec.hidden % norm.group:
        return f"Rows of {spec.hidden} elements do not divide into groups of {norm.group} that are normed."
    if (norm.bias is None) != (spec.bias_dtype is None) or norm.bias not in (None, "once", "twice"):
        return f"The row kernel adds a bias of {spec.bias_dtype} where the norm has one, not {norm.bias}."
    if norm.bias == "once" and norm.rounding == "twice":
        return "A bias that is added before the product is rounded needs a norm that is not rounded before."
    return None


def _why_not_hidden(spec: RowSpec, target: Target) -> str | None:
    if spec.hidden < 1:
        return f"The row kernel needs rows of at least one element, not {spec.hidden}."
    if spec.hidden > MAX_HIDDEN and target.is_gpu and needs_whole_row(spec):
        limit = f"rows of up to {MAX_HIDDEN} elements where a norm or a scale depends on all of them"
        return f"On {target.name} the row kernel takes {limit}, not {spec.hidden}."
    return None


def _why_not_windows(spec: RowSpec) -> str | None:
    for name in ("x", "other"):
        columns, pitch = spec.columns(name), spec.pitch(name)
        if not 0 <= columns.start <= columns.stop <= pitch:
            return f"Columns {columns.start} to {columns.stop} do not lie in rows of {pitch} elements."
    if (
        spec.other_window
        and not (spec.norm and spec.norm.residual)
        and not (spec.gate and not spec.gate.packed)
    ):
        return "The row kernel has a second window only where it has a second input."
    return None


def _why_not_quants(spec: RowSpec, target: Target) -> list[str | None]:
    reasons: list[str | None] = []
    for quantization in spec.quantizations:
        reasons.append(_why_not_codes(quantization, target))
        reasons.append(_why_not_group(quantization, spec.hidden))
        reasons.append(_why_not_given(quantization) if quantization.static else _why_not_scale(quantization))
    if len(spec.quantizations) > MAX_QUANTIZATIONS:
        most = f"at most {MAX_QUANTIZATIONS} different quantizations"
        reasons.append(f"The row kernel writes {most}, not {len(spec.quantizations)}.")
    return reasons


def _why_not_codes(quantization: Quantization, target: Target) -> str | None:
    dtype, limit = quantization.dtype, quantization.limit
    if dtype not in QUANT_CODES:
        return f"The row kernel quantizes to {listed(QUANT_CODES)}, not {dtype}."
    if dtype not in ("int8", *target.floats):
        other = (
            ", whose values differ by a factor of two; --fp8 native changes it where nothing else sees them"
            if dtype.startswith("float8_e4m3")
            else ""
        )
        return f"{target.name} converts to {listed(target.floats)} in hardware, not to {dtype}{other}."
    if limit is not None and not (0 < limit <= LARGEST_FINITE[dtype] and limit == int(limit)):
        most = f"whole numbers up to {LARGEST_FINITE[dtype]:g}"
        return f"The row kernel limits {dtype} to {most}, not to {limit:g}."
    return None


def _why_not_group(quantization: Quantization, hidden: int) -> str | None:
    group = quantization.group
    if group is None:
        if hidden % WHOLE_ROW_MULTIPLE:
            multiple = f"a multiple of {WHOLE_ROW_MULTIPLE} elements"
            return f"The row kernel quantizes whole rows of {multiple}, not of {hidden}."
        return None
    if group not in GROUPS:
        return f"The row kernel quantizes groups of 32, 64 or 128 elements, not {group}."
    if hidden % group:
        return f"Rows of {hidden} elements do not divide into groups of {group}."
    return None


def _why_not_given(quantization: Quantization) -> str | None:
    if quantization.group is not None or quantization.layout != "row" or quantization.scale != "float32":
        return "A scale that is given is one float32 for all rows."
    if quantization.quotient not in RECIPROCALS:
        return f"The row kernel takes a quotient that is {listed(RECIPROCALS)}, not {quantization.quotient}."
    smallest = -128.0 if quantization.dtype == "int8" else -LARGEST_FINITE[quantization.dtype]
    if not (smallest <= quantization.least < 0 and quantization.least == int(quantization.least)):
        return f"Values of {quantization.dtype} are bounded by a whole number from {smallest:g}."
    return None


def _why_not_scale(quantization: Quantization) -> str | None:
    if quantization.scale not in SCALE_SHORT:
        return f"The row kernel writes {listed(SCALE_SHORT)} scales, not {quantization.scale}."
    if quantization.layout not in LAYOUTS:
        return f"The row kernel writes scales in {listed(LAYOUTS)} layout, not {quantization.layout}."
    if quantization.layout == "ue8m0_packed" and quantization.scale != "ue8m0":
        return f"The layout ue8m0_packed holds ue8m0 scales, not {quantization.scale}."
    divisions = (quantization.scale_division, quantization.quotient)
    if not set(divisions) <= set(RECIPROCALS):
        return f"The row kernel divides as {listed(RECIPROCALS)} says, not as {' and '.join(divisions)}."
    if quantization.inverts and (quantization.scale != "float32" or quantization.scale_floor):
        return "The row kernel computes an inverse before its scale where that is float32 and has no floor."
    for name, floor in (("amax", quantization.amax_floor), ("the scale", quantization.scale_floor)):
        if not 0.0 <= floor < math.inf:
            return f"The floor on {name} must be finite and not negative, not {floor}."
    ceiling = quantization.amax_ceiling
    if ceiling is not None and not 0.0 < ceiling < math.inf:
        return f"The upper bound on amax must be finite and positive, not {ceiling}."
    return None
