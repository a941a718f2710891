"""Make a kernel instance of a RowSpec and a target: one source file and the constants that specialise it.

Nothing here runs a compiler or reads an object: that is ``backends``' business.  What the row kernel
family supports is decided in ``row_support`` alone: ``why_unsupported`` says it in a sentence that the
fusion can record, ``instance`` raises the same sentence.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from iree.compiler import ir

from patterns import canonical
from patterns.contracts import Norm, Quantization, RowSpec
from patterns.families import ROW

from .. import ops
from ..errors import CompileError
from ..targets import Target
from .base import Family, Reference
from .instance import (
    Binding,
    Dimension,
    KernelInstance,
    bits32,
    float32_literal,
    rounded32,
)
from .row_mapping import Mapping, choose_mapping, group_of, has_row_scale
from .row_support import (
    ACTIVATIONS,
    CODES,
    GIVEN,
    LAYOUTS,
    MAX_QUANTIZATIONS,
    QUANT_CODES,
    RESIDUALS,
    ROUNDINGS,
    SCALE_SHORT,
    reciprocal_code,
    why_unsupported,
)

_SOURCES = {"cpu": "row.c", "cuda": "row.cu", "hip": "row.hip"}
_GPU_HEADERS = ("row.h", "given.h", "norm.h", "tile.h", "reduce.h", "quantize.h", "activation.h")
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_QUANT_SHORT = {"float8_e4m3fn": "", "float8_e4m3fnuz": "fnuz", "float8_e5m2": "e5m2", "int8": "int8"}
_LAYOUT_SHORT = {"row": "", "column_tma": "_tma", "column": "_column", "ue8m0_packed": "_packed"}

# Bits of the significand of each type, int8's up to 127.
_SIGNIFICAND = {"float8_e4m3fn": 4, "float8_e4m3fnuz": 4, "float8_e5m2": 3, "int8": 7}

# Below this floor on amax 1/scale could leave float32's normal range.
_SAFE_FLOOR = 1e-30


def instance(spec: RowSpec, target: Target, mapping: Mapping | None = None) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; ``mapping`` overrides the chosen one (for tuning).

    Raises CompileError with ``why_unsupported``'s sentence.
    """
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    mapping = mapping or choose_mapping(spec, target)
    defines = _defines(spec) + _mapping_defines(mapping, target)
    source, grid_rule = _SOURCES[target.backend], mapping.grid_rule
    return KernelInstance.named(
        _stem(spec), target, spec, source, defines, bindings(spec), grid_rule, mapping.threads
    )


def bindings(spec: RowSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order.

    x, up or the gate of what is normed, residual, weight, bias, the scales that are given; sum, y, every q,
    and its scale unless it is given.
    """
    row: tuple[Dimension, ...] = ("T", spec.hidden)
    out = [_input_binding("x", spec)]
    if spec.gate and not spec.gate.packed:
        out.append(_input_binding("gate" if spec.norm else "up", spec))
    if spec.norm and spec.norm.residual:
        out.append(_input_binding("residual", spec))
    vectors = (("weight", spec.weight_dtype), ("bias", spec.bias_dtype))
    out += [Binding(name, dtype, (spec.hidden,), "read") for name, dtype in vectors if dtype]
    out += [
        Binding(f"scale{i}", "float32", (1,), "read", quantization)
        for i, quantization in enumerate(spec.quantizations)
        if quantization.static
    ]
    if spec.writes_sum:
        out.append(Binding("sum", spec.dtype, row, "write"))
    if spec.writes_y:
        out.append(Binding("y", spec.y_dtype, row, "write"))
    for i, quantization in enumerate(spec.quantizations):
        out.append(Binding(f"q{i}", quantization.dtype, row, "write", quantization))
        if not quantization.static:
            out.append(_scale_binding(f"scale{i}", quantization, spec.hidden))
    return tuple(out)


def _input_binding(name: str, spec: RowSpec) -> Binding:
    pitch, columns = spec.pitch(name), spec.columns(name)
    part = (columns.start, columns.stop) if pitch > columns.stop - columns.start else None
    return Binding(name, spec.dtype_of(name), ("T", pitch), "read", columns=part)


def _scale_binding(name: str, quantization: Quantization, hidden: int) -> Binding:
    groups = quantization.groups(hidden)
    shapes: dict[str, tuple[Dimension, ...]] = {
        "row": ("T", groups),
        "column": (groups, "T"),
        "column_tma": (groups, "T4"),
        "ue8m0_packed": (-(-groups // 4), "T4"),
    }
    dtype = "int32" if quantization.layout == "ue8m0_packed" else "float32"
    return Binding(name, dtype, shapes[quantization.layout], "write", quantization, quantization.layout)


def _defines(spec: RowSpec) -> tuple[tuple[str, str], ...]:
    norm, gate = spec.norm, spec.gate
    producer = norm or gate
    packed = gate is not None and gate.packed
    offset = norm.weight_offset if norm else 0.0
    product = _promoted(spec.dtype, "float32" if offset else spec.weight_dtype)
    values: dict[str, int | str] = {
        "HIDDEN": spec.hidden,
        "X_DTYPE": CODES[spec.dtype],
        "WEIGHT_DTYPE": CODES[spec.weight_dtype] if spec.weight_dtype else 0,
        "PRODUCT_DTYPE": CODES[product],
        "NORM": int(norm is not None),
        "EPS": float32_literal(norm.eps if norm else 0.0),
        "HAS_WEIGHT_OFFSET": int(offset != 0.0),
        "WEIGHT_OFFSET": float32_literal(offset),
        "ROUNDING": ROUNDINGS[producer.rounding] if producer else 0,
        "RESIDUAL": RESIDUALS[norm.residual] if norm else 0,
        "ACT": ACTIVATIONS[gate.activation] if gate else 0,
        "GATE_PACKED": int(packed),
        "X_PITCH": spec.pitch("x"),
        "X_OFFSET": spec.columns("x").start,
        "OTHER_PITCH": spec.pitch("x" if packed else "other"),
        "OTHER_OFFSET": spec.columns("x").start + spec.hidden if packed else spec.columns("other").start,
        "WRITES_SUM": int(spec.writes_sum),
        "WRITES_Y": int(spec.writes_y),
        "QUANTS": len(spec.quantizations),
        "WHOLE_ROW": int(has_row_scale(spec)),
    }
    if norm and gate:
        values["GATE_ROUNDING"] = ROUNDINGS[gate.rounding]
    values |= _unusual(spec, product)
    for i, quantization in enumerate(spec.quantizations):
        values |= {f"{name}{i}": value for name, value in _scheme(quantization, spec).items()}
    if spec.quantizations:
        values |= {f"GROUP{i}": 0 for i in range(len(spec.quantizations), MAX_QUANTIZATIONS)}
    return tuple((name, str(value)) for name, value in values.items())


def _unusual(spec: RowSpec, product: str) -> dict[str, int | str]:
    """The constants of what few norms have: kernels/norm.h has the values of the others."""
    norm = spec.norm or Norm(0.0)
    values: dict[str, int | str] = {
        "GATE_FIRST": int(spec.gate_first),
        "CENTRED": int(norm.statistic == "variance"),
        "STATISTIC_GROUP": norm.group or 0,
        "BIAS_FUSED": int(norm.bias == "once"),
    }
    if spec.y_dtype != spec.dtype:
        values["Y_DTYPE"] = CODES[spec.y_dtype]
    if spec.gate_dtype:
        values["OTHER_DTYPE"] = CODES[spec.gate_dtype]
    if spec.bias_dtype:
        values["BIAS_DTYPE"] = CODES[spec.bias_dtype]
        values["NORMED_DTYPE"] = CODES[_promoted(product, spec.bias_dtype)]
    return {name: value for name, value in values.items() if value}


def _scheme(quantization: Quantization, spec: RowSpec) -> dict[str, int | str]:
    """The constants of one quantization; those that are floats as their bits.

    GROUP 0 is the whole row.  POWER: scales are powers of two, where it is 2 perhaps infinite.  RECIPROCAL: y
    is multiplied by 1/scale; ``reciprocal_code`` says the other ways.  INVERSE is what amax is multiplied by
    for the scale, 0 where LIMIT divides it.
    """
    if quantization.static:
        return _static_scheme(quantization)
    ceiling = math.inf if quantization.amax_ceiling is None else quantization.amax_ceiling
    inverse = 1.0 / quantization.qmax if quantization.scale_division == "reciprocal" else 0.0
    return {
        "GROUP": group_of(quantization, spec),
        "LAYOUT": LAYOUTS[quantization.layout],
        "CODES": QUANT_CODES[quantization.dtype],
        "LIMIT": int(quantization.qmax),
        "POWER": int(quantization.scale == "ue8m0") * (2 if quantization.infinite else 1),
        "RECIPROCAL": reciprocal_code(quantization),
        "FLOOR": bits32(quantization.amax_floor),
        "CEILING": bits32(ceiling),
        "SCALE_FLOOR": bits32(quantization.scale_floor),
        "INVERSE": bits32(inverse),
        "QUOTIENT": _quotient(quantization, spec),
    }


def _static_scheme(quantization: Quantization) -> dict[str, int | str]:
    """The constants of a quantization by a given scale, of which QUOTIENT says so.

    RECIPROCAL 2: what is given is 1/scale.  LEAST is the lower bound; what says how scales are computed is 0.
    """
    unused = ("GROUP", "LAYOUT", "POWER", "FLOOR", "CEILING", "SCALE_FLOOR", "INVERSE")
    return {
        **dict.fromkeys(unused, 0),
        "CODES": QUANT_CODES[quantization.dtype],
        "LIMIT": int(quantization.qmax),
        "LEAST": int(quantization.least),
        "RECIPROCAL": reciprocal_code(quantization),
        "QUOTIENT": GIVEN,
    }


def _mapping_defines(mapping: Mapping, target: Target) -> tuple[tuple[str, str], ...]:
    if not target.is_gpu:
        return (("ROWS", str(mapping.many.rows)),)
    many, few = mapping.many, mapping.few
    values = {
        "MANY_LANES": many.lanes,
        "MANY_VECTORS": many.vectors,
        "MANY_VECTOR": many.vector,
        "MANY_ROWS": many.rows,
        "MANY_BATCHES": many.batches,
        "MANY_BLOCKS": many.blocks,
        "FEW_ROWS": mapping.few_rows,
        "SPREAD": mapping.spread,
        "THREADS": mapping.threads,
        "RESIDENT": mapping.resident,
    }
    if few:
        values |= {"FEW_LANES": few.lanes, "FEW_VECTORS": few.vectors, "FEW_VECTOR": few.vector}
        values |= {"FEW_SLICES": few.slices}
    return tuple((name, str(value)) for name, value in values.items())


def _promoted(dtype: str, weight_dtype: str | None) -> str:
    """The dtype torch multiplies ``dtype`` by ``weight_dtype`` in."""
    return dtype if weight_dtype in (None, dtype) else "float32"


def _quotient(quantization: Quantization, spec: RowSpec) -> int:
    """Choose how y/scale is computed: 0 divides, 1 uses 1/scale and the remainder, 2 a twofold 1/scale.

    0 (and a clamp) where an inverse is computed from amax; where the scale can be so small that 1/scale
    leaves float32's normal range; where y can exceed the limit (a ceiling on amax, or a limit that rounding
    to the type can pass); and where a scale that does not come from 11 bits of amax is the one the kernel's
    reciprocal gets wrong.  2, the shortest,
    where y has 8 bits and no y/scale is too near to where float32 rounds the other way.
    """
    if quantization.inverts:
        return 0
    floor, scale_floor = rounded32(quantization.amax_floor), rounded32(quantization.scale_floor)
    qmax = quantization.qmax
    if max(floor, scale_floor) < _SAFE_FLOOR or quantization.amax_ceiling is not None:
        return 0
    if not _has_bits(qmax, _SIGNIFICAND[quantization.dtype]):
        return 0
    inverse = rounded32(1.0 / qmax) if quantization.scale_division == "reciprocal" else None
    bounds = [scale_floor, _scale(floor, qmax, inverse)]
    if any(_is_all_ones(scale) for scale in [*bounds, _scale(qmax, qmax, inverse)]):
        return 0
    return 2 if _is_rounded_to_bfloat16(spec) and _rounds_clearly(qmax, inverse, *bounds) else 1


def _scale(amax: float, qmax: float, inverse: float | None) -> float:
    return rounded32(amax / qmax if inverse is None else amax * inverse)


def _is_rounded_to_bfloat16(spec: RowSpec) -> bool:
    """Tell whether what is quantized has the 8 significant bits of a bfloat16."""
    producer = spec.norm if spec.gate_first else spec.gate or spec.norm
    if spec.y_dtype != "bfloat16" or producer is None:
        return spec.y_dtype == "bfloat16"
    if spec.gate and not spec.gate_first:
        return producer.rounding != "none"
    offset = spec.norm.weight_offset if spec.norm else 0.0
    product = _promoted(spec.dtype, "float32" if offset else spec.weight_dtype)
    wide = _promoted(product, spec.bias_dtype) != spec.dtype
    return producer.rounding == "once" or (producer.rounding == "twice" and not wide)


@functools.cache
def _rounds_clearly(qmax: float, inverse: float | None, *bounds: float) -> bool:
    """Tell whether, for every 8-bit y, y/scale is 2^-42 of itself from where float32's rounding turns.

    The scales are those of every 8-bit amax, and ``bounds``; a kernel's error is below 2^-43.
    """
    scales = {_scale(amax, qmax, inverse) for amax in range(128, 256)} | {bound for bound in bounds if bound}
    for scale in scales:
        divisor = int(math.frexp(scale)[0] * 2**24)
        for y in range(128, 256):
            # The quotient has 24 bits before its point; rounding turns half way to the next integer.
            dividend = y << (39 if y << 16 >= divisor else 40)
            if abs(2 * (dividend % divisor) - divisor) << 41 < dividend:
                return False
    return True


def _is_all_ones(value: float) -> bool:
    """Tell whether every bit of a float32's significand is one."""
    return math.frexp(value)[0] == 1 - 2**-24


def _has_bits(value: float, bits: int) -> bool:
    """Tell whether ``bits`` bits hold the significand of ``value``."""
    return (math.frexp(value)[0] * 2**bits).is_integer()


def _stem(spec: RowSpec) -> str:
    parts = []
    if spec.norm:
        kind = "layer_norm" if spec.norm.statistic == "variance" else "rms_norm"
        group = str(spec.norm.group or "")
        parts.append(f"add_{kind}{group}" if spec.norm.residual else f"{kind}{group}")
    if spec.gate:
        parts.insert(0 if spec.gate_first else len(parts), f"{spec.gate.activation}_mul")
    parts += [_quant_stem(quantization) for quantization in spec.quantizations]
    within = ["window"] if spec.x_window or spec.other_window else []
    return "_".join(
        [
            *(parts or ["copy"]),
            *dict.fromkeys((_SHORT[spec.dtype], _SHORT[spec.y_dtype])),
            f"h{spec.hidden}",
            *within,
        ]
    )


def _quant_stem(quantization: Quantization) -> str:
    """``quant128`` is the usual scheme; what differs is named: ``int8quant_row``, ``quant128_packed``."""
    if quantization.static:
        return f"{_QUANT_SHORT[quantization.dtype]}quant_static"
    group = "_row" if quantization.group is None else str(quantization.group)
    scale = SCALE_SHORT[quantization.scale] if quantization.layout != "ue8m0_packed" else ""
    return f"{_QUANT_SHORT[quantization.dtype]}quant{group}{scale}{_LAYOUT_SHORT[quantization.layout]}"


# -- what it computes, where there is no kernel ------------------------------------------------------


def _norm_reference(op: ir.Operation) -> Reference:
    norm = canonical.norm_contract(op)

    def normed(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        given = list(rest)
        gate = given.pop(0) if norm.gate else None
        residual = given.pop(0) if norm.residual else None
        bias = given.pop() if norm.bias else None
        y, total = ops.norm_reference(x, residual, given[0] if given else None, norm, bias, gate)
        return (y, total) if norm.residual else y

    return norm, normed


def _gate_reference(op: ir.Operation) -> Reference:
    gate = canonical.gate_contract(op)

    def gated_activation(*halves: torch.Tensor) -> torch.Tensor:
        first, second = ops.split_gate_up(halves[0]) if gate.packed else halves
        return ops.gated_activation_reference(first, second, gate)

    return gate, gated_activation


def _quantization_reference(op: ir.Operation) -> Reference:
    quantization = canonical.quantization(op)
    if quantization.static:
        return quantization, lambda x, scale: ops.static_quant_reference(x, scale, quantization)
    return quantization, lambda x: ops.group_quant_contiguous_reference(x, quantization)


FAMILY = Family(
    name="row",
    patterns=ROW,
    spec=RowSpec,
    instance=instance,
    why_unsupported=why_unsupported,
    sources={
        "row.c": (
            "cpu.h",
            "vectors.h",
            "given.h",
            "norm.h",
            "statistic_cpu.h",
            "quantize_cpu.h",
            "reals_cpu.h",
            "activation.h",
        ),
        "row.cu": _GPU_HEADERS,
        "row.hip": _GPU_HEADERS,
    },
    references={
        canonical.NORM: _norm_reference,
        canonical.GATED_ACTIVATION: _gate_reference,
        canonical.GROUP_QUANT: _quantization_reference,
    },
)
