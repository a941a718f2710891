"""From a RowSpec and a target to a kernel instance: one source file and the constants that specialise it.

Nothing here runs a compiler (``toolchain``) or reads an object (``abi``).  What the row kernel
family supports is decided here and nowhere else: ``why_unsupported`` says it in a sentence that
the fusion can record, ``instance`` raises the same sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from patterns.contracts import LARGEST_FINITE, Quantization, RowSpec, ScaleLayout, Spec

from .errors import CompileError
from .targets import Target

Dimension = int | Literal["T", "T4"]
Access = Literal["read", "write"]

MAX_QUANTIZATIONS = 4
MAX_HIDDEN = 16384  # on GPUs, where something depends on the whole row
GROUPS = (32, 64, 128)
WHOLE_ROW_MULTIPLE = 32  # of elements in a row that is one group

_SOURCES = {"cpu": "row.c", "cuda": "row.cu", "hip": "row.hip"}
_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_ROUNDINGS = {"none": 0, "once": 1, "twice": 2}
_RESIDUALS = {None: 0, "exact": 1, "rounded": 2}
_ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3}
_LAYOUTS = {"row": 0, "column_tma": 1, "column": 2, "ue8m0_packed": 3}
_QUANT_CODES = {"float8_e4m3fn": 0, "float8_e4m3fnuz": 1, "float8_e5m2": 2, "int8": 3}
_QUANT_SHORT = {"float8_e4m3fn": "", "float8_e4m3fnuz": "fnuz", "float8_e5m2": "e5m2", "int8": "int8"}
_SCALE_SHORT = {"float32": "", "ue8m0": "_ue8m0"}
_LAYOUT_SHORT = {"row": "", "column_tma": "_tma", "column": "_column", "ue8m0_packed": "_packed"}

# The 8-bit floats a GPU's instructions convert to; int8 needs none, and the CPU kernel none at all.
_OCP = ("float8_e4m3fn", "float8_e5m2")
_FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz")
_HARDWARE_FLOATS = {"sm_90": _OCP, "sm_100": _OCP, "gfx950": _OCP, "gfx942": _FNUZ}
# Bits of the significand of each type, int8's up to 127.
_SIGNIFICAND = {"float8_e4m3fn": 4, "float8_e4m3fnuz": 4, "float8_e5m2": 3, "int8": 7}

# Below this floor on amax 1/scale could leave float32's normal range.
_SAFE_FLOOR = 1e-30
# Lanes of the largest workgroup.
_MAX_LANES = 512
# Vectors a lane may hold before a row is spread over several waves.
_WITHIN_WAVE = 3
# Elements of x that one CPU workgroup takes: some ten microseconds, well above the cost of handing it out.
_CPU_ELEMENTS = 16384


@dataclass(frozen=True)
class Binding:
    """One tensor of a dispatch, dense and row major.

    ``shape`` holds ints and the symbols ``T`` (rows) and ``T4`` (rows rounded up to 4).  Scales have their
    physical shape: [T, Gn] in ``row`` layout, [Gn, T] in ``column``, [Gn, T4] in ``column_tma``, and in
    ``ue8m0_packed`` int32 [ceil(Gn/4), T4], four exponents in each.  ``quantization`` is the one whose values
    or scales these are.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...]
    access: Access
    quantization: Quantization | None = None

    @property
    def has_rows(self) -> bool:
        """Whether it has a row for each of the dispatch's, unlike a weight."""
        return len(self.shape) == 2 and self.shape[0] == "T"

    @property
    def layout(self) -> ScaleLayout:
        """How the tensor lies in memory, as torch's strides would say it."""
        return self.quantization.layout if self.quantization and self.name.startswith("scale") else "row"


@dataclass(frozen=True)
class Tile:
    """How rows are laid over lanes.

    ``lanes`` work on one row, each on ``vectors`` vectors of ``vector`` elements at once, ``batches`` times;
    a workgroup takes ``rows``.
    """

    lanes: int
    vectors: int
    vector: int
    rows: int
    batches: int = 1

    @property
    def threads(self) -> int:
        return self.lanes * self.rows


@dataclass(frozen=True)
class KernelInstance:
    """A kernel ready to be compiled and dispatched.

    On a GPU the parameters are one pointer per binding, in order, then ``rows`` as i32.  On the CPU
    they are a base pointer and an i64 element offset per binding, then i32 ``rows`` and i32 workgroup.
    ``column_tiles`` consecutive workgroups share the rows of one.
    """

    entry: str
    target: Target
    spec: Spec
    source: str
    defines: tuple[tuple[str, str], ...]
    bindings: tuple[Binding, ...]
    block: tuple[int, int, int]
    rows_per_workgroup: int
    dynamic_shared: int = 0
    column_tiles: int = 1

    def grid(self, rows: int) -> tuple[int, int, int]:
        """Workgroups for ``rows`` rows; never zero, since CUDA does not skip an empty grid."""
        return max(1, -(-rows // self.rows_per_workgroup)) * self.column_tiles, 1, 1

    def shape(self, binding: Binding, rows: int) -> tuple[int, ...]:
        """The sizes of ``binding`` when there are ``rows`` rows."""
        sizes = {"T": rows, "T4": (rows + 3) // 4 * 4}
        return tuple(d if isinstance(d, int) else sizes[d] for d in binding.shape)


def why_unsupported(spec: RowSpec, target: Target) -> str | None:
    """A sentence saying why the row kernel cannot do ``spec`` on ``target``, or None if it can."""
    reasons = [_why_not_dtypes(spec), _why_not_gate(spec), _why_not_norm(spec), _why_not_hidden(spec, target)]
    reasons += _why_not_quants(spec, target)
    return next((reason for reason in reasons if reason), None)


def hardware_floats(target: Target) -> tuple[str, ...]:
    """The 8-bit floats ``target`` converts to: by its instructions or, on the CPU, by the kernel's own."""
    floats = tuple(dtype for dtype in _QUANT_CODES if dtype != "int8")
    return _HARDWARE_FLOATS[target.name] if target.backend != "cpu" else floats


def instance(spec: RowSpec, target: Target, tile: Tile | None = None) -> KernelInstance:
    """The kernel for ``spec`` on ``target``; ``tile`` overrides the chosen mapping (for tuning).

    Raises CompileError with ``why_unsupported``'s sentence.
    """
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    tile = tile or choose_tile(spec, target)
    defines = _defines(spec) + _tile_defines(tile, target)
    entry = f"{_stem(spec)}_{digest(defines)}"
    return KernelInstance(
        entry=entry,
        target=target,
        spec=spec,
        source=_SOURCES[target.backend],
        defines=(("ENTRY", entry), *defines),
        bindings=bindings(spec),
        block=(tile.threads, 1, 1) if target.backend != "cpu" else (1, 1, 1),
        rows_per_workgroup=tile.rows,
    )


def bindings(spec: RowSpec) -> tuple[Binding, ...]:
    """The tensors of ``spec`` in dispatch order: x, up, residual, weight; sum, y, every q and scale."""
    row: tuple[Dimension, ...] = ("T", spec.hidden)
    packed = spec.gate is not None and spec.gate.packed
    out = [Binding("x", spec.dtype, ("T", 2 * spec.hidden) if packed else row, "read")]
    if spec.gate and not packed:
        out.append(Binding("up", spec.dtype, row, "read"))
    if spec.norm and spec.norm.residual:
        out.append(Binding("residual", spec.dtype, row, "read"))
    if spec.weight_dtype:
        out.append(Binding("weight", spec.weight_dtype, (spec.hidden,), "read"))
    if spec.writes_sum:
        out.append(Binding("sum", spec.dtype, row, "write"))
    if spec.writes_y:
        out.append(Binding("y", spec.dtype, row, "write"))
    for i, quantization in enumerate(spec.quantizations):
        out.append(Binding(f"q{i}", quantization.dtype, row, "write", quantization))
        out.append(_scale_binding(f"scale{i}", quantization, spec.hidden))
    return tuple(out)


def _scale_binding(name: str, quantization: Quantization, hidden: int) -> Binding:
    groups = quantization.groups(hidden)
    shapes: dict[str, tuple[Dimension, ...]] = {
        "row": ("T", groups),
        "column": (groups, "T"),
        "column_tma": (groups, "T4"),
        "ue8m0_packed": (-(-groups // 4), "T4"),
    }
    dtype = "int32" if quantization.layout == "ue8m0_packed" else "float32"
    return Binding(name, dtype, shapes[quantization.layout], "write", quantization)


def choose_tile(spec: RowSpec, target: Target) -> Tile:
    """The default mapping of rows to lanes.

    Short rows stay inside a wave or a part of it, so no barrier is needed; longer ones take whole
    waves, of two vectors a lane where possible: what every lane computes for itself (the reduction,
    1/rms) costs as much as half a vector, while more vectors would make a single row slow.  Without
    a norm there is no such cost, and one vector a lane is enough; where nothing at all depends on the
    whole row, one of any length is taken in batches.
    """
    if target.backend == "cpu":
        return Tile(lanes=1, vectors=1, vector=1, rows=max(1, _CPU_ELEMENTS // spec.hidden))
    vector = 8 if spec.hidden % 16 == 8 and not spec.quantizations else 16
    count = -(-spec.hidden // vector)
    if count <= _WITHIN_WAVE * target.wave:
        lanes, vectors = _lanes_within_wave(count, target.wave, _fewest_lanes(spec, vector))
        return Tile(lanes, vectors, vector, rows=max(4, 2 * target.wave // lanes))
    if not _needs_whole_row(spec):
        return _batched_tile(count, target.wave, vector, at_most=1 if spec.gate else 2)
    per_lane = 2 if spec.norm else 1
    waves = min(-(-count // (per_lane * target.wave)), _MAX_LANES // target.wave)
    lanes = waves * target.wave
    return Tile(lanes, -(-count // lanes), vector, rows=1)


def _batched_tile(count: int, wave: int, vector: int, at_most: int) -> Tile:
    """A block for a row of ``count`` vectors: one a lane, in longer rows ``at_most``, then in batches."""
    vectors = min(at_most, -(-count // _MAX_LANES))
    batches = -(-count // (_MAX_LANES * vectors))
    lanes = -(-count // (batches * vectors * wave)) * wave
    return Tile(lanes, vectors, vector, rows=1, batches=batches)


def _needs_whole_row(spec: RowSpec) -> bool:
    return spec.norm is not None or _has_row_scale(spec)


def _has_row_scale(spec: RowSpec) -> bool:
    return any(_group(quantization, spec) == 0 for quantization in spec.quantizations)


def _group(quantization: Quantization, spec: RowSpec) -> int:
    """Elements of a group; 0 for a whole row that is of no length the kernel knows as a group."""
    if quantization.group is None:
        return spec.hidden if spec.hidden in GROUPS else 0
    return quantization.group


def _lanes_within_wave(count: int, wave: int, fewest: int) -> tuple[int, int]:
    """(lanes, vectors): a power of two of lanes and few vectors each; the least idle, then the widest."""
    powers = [1 << k for k in range(int(math.log2(wave)) + 1) if 1 << k >= fewest]
    choices = [(lanes, -(-count // lanes)) for lanes in powers if lanes * _WITHIN_WAVE >= count]
    return min(choices, key=lambda choice: (choice[0] * choice[1], -choice[0]))


def _fewest_lanes(spec: RowSpec, vector: int) -> int:
    """Lanes over which the widest group of ``spec`` is spread: a row cannot have fewer."""
    return max([1, *(_group(quantization, spec) // vector for quantization in spec.quantizations)])


def _why_not_dtypes(spec: RowSpec) -> str | None:
    known = "bfloat16, float16 and float32"
    if spec.dtype not in _CODES:
        return f"The row kernel takes x of {known}, not {spec.dtype}."
    if spec.weight_dtype is not None and spec.weight_dtype not in _CODES:
        return f"The row kernel takes a weight of {known}, not {spec.weight_dtype}."
    return None


def _why_not_gate(spec: RowSpec) -> str | None:
    gate = spec.gate
    if gate is None:
        return None
    if spec.norm is not None:
        return "The row kernel either normalises or gates, not both."
    if gate.activation not in _ACTIVATIONS:
        return f"The row kernel gates with {_listed(_ACTIVATIONS)}, not {gate.activation}."
    if gate.rounding not in _ROUNDINGS:
        return f"The row kernel rounds {_listed(_ROUNDINGS)}, not {gate.rounding}."
    return None


def _why_not_norm(spec: RowSpec) -> str | None:
    norm = spec.norm
    if norm is None and (spec.weight_dtype or spec.writes_sum):
        return "The row kernel has a weight or a residual sum only where it normalises."
    if norm and (norm.rounding not in _ROUNDINGS or norm.residual not in _RESIDUALS):
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


def _why_not_hidden(spec: RowSpec, target: Target) -> str | None:
    if spec.hidden < 1:
        return f"The row kernel needs rows of at least one element, not {spec.hidden}."
    if spec.hidden > MAX_HIDDEN and target.backend != "cpu" and _needs_whole_row(spec):
        limit = f"rows of up to {MAX_HIDDEN} elements where a norm or a scale depends on all of them"
        return f"On {target.name} the row kernel takes {limit}, not {spec.hidden}."
    return None


def _why_not_quants(spec: RowSpec, target: Target) -> list[str | None]:
    reasons: list[str | None] = []
    for quantization in spec.quantizations:
        reasons.append(_why_not_codes(quantization, target))
        reasons.append(_why_not_group(quantization, spec.hidden))
        reasons.append(_why_not_scale(quantization))
    if len(spec.quantizations) > MAX_QUANTIZATIONS:
        most = f"at most {MAX_QUANTIZATIONS} different quantizations"
        reasons.append(f"The row kernel writes {most}, not {len(spec.quantizations)}.")
    return reasons


def _why_not_codes(quantization: Quantization, target: Target) -> str | None:
    dtype, limit = quantization.dtype, quantization.limit
    if dtype not in _QUANT_CODES:
        return f"The row kernel quantizes to {_listed(_QUANT_CODES)}, not {dtype}."
    hardware = hardware_floats(target)
    if dtype not in ("int8", *hardware):
        other = (
            ", whose values differ by a factor of two; --fp8 native changes it where nothing else sees them"
            if dtype.startswith("float8_e4m3")
            else ""
        )
        return f"{target.name} converts to {_listed(hardware)} in hardware, not to {dtype}{other}."
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


def _why_not_scale(quantization: Quantization) -> str | None:
    if quantization.scale not in _SCALE_SHORT:
        return f"The row kernel writes {_listed(_SCALE_SHORT)} scales, not {quantization.scale}."
    if quantization.layout not in _LAYOUTS:
        return f"The row kernel writes scales in {_listed(_LAYOUTS)} layout, not {quantization.layout}."
    if quantization.layout == "ue8m0_packed" and quantization.scale != "ue8m0":
        return f"The layout ue8m0_packed holds ue8m0 scales, not {quantization.scale}."
    divisions = (quantization.scale_division, quantization.quotient)
    if not set(divisions) <= {"true", "reciprocal"}:
        return f"The row kernel divides truly or by a reciprocal, not as {' and '.join(divisions)}."
    for name, floor in (("amax", quantization.amax_floor), ("the scale", quantization.scale_floor)):
        if not 0.0 <= floor < math.inf:
            return f"The floor on {name} must be finite and not negative, not {floor}."
    ceiling = quantization.amax_ceiling
    if ceiling is not None and not 0.0 < ceiling < math.inf:
        return f"The upper bound on amax must be finite and positive, not {ceiling}."
    return None


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _defines(spec: RowSpec) -> tuple[tuple[str, str], ...]:
    norm, gate = spec.norm, spec.gate
    producer = norm or gate
    offset = norm.weight_offset if norm else 0.0
    values: dict[str, int | str] = {
        "HIDDEN": spec.hidden,
        "X_DTYPE": _CODES[spec.dtype],
        "WEIGHT_DTYPE": _CODES[spec.weight_dtype] if spec.weight_dtype else 0,
        "PRODUCT_DTYPE": _CODES[_promoted(spec.dtype, "float32" if offset else spec.weight_dtype)],
        "NORM": int(norm is not None),
        "EPS": float32_literal(norm.eps if norm else 0.0),
        "HAS_WEIGHT_OFFSET": int(offset != 0.0),
        "WEIGHT_OFFSET": float32_literal(offset),
        "ROUNDING": _ROUNDINGS[producer.rounding] if producer else 0,
        "RESIDUAL": _RESIDUALS[norm.residual] if norm else 0,
        "ACT": _ACTIVATIONS[gate.activation] if gate else 0,
        "GATE_PACKED": int(gate is not None and gate.packed),
        "WRITES_SUM": int(spec.writes_sum),
        "WRITES_Y": int(spec.writes_y),
        "QUANTS": len(spec.quantizations),
        "WHOLE_ROW": int(_has_row_scale(spec)),
    }
    for i, quantization in enumerate(spec.quantizations):
        values |= {f"{name}{i}": value for name, value in _scheme(quantization, spec).items()}
    if spec.quantizations:
        values |= {f"GROUP{i}": 0 for i in range(len(spec.quantizations), MAX_QUANTIZATIONS)}
    return tuple((name, str(value)) for name, value in values.items())


def _scheme(quantization: Quantization, spec: RowSpec) -> dict[str, int | str]:
    """The constants of one quantization; those that are floats as their bits.

    GROUP 0 is the whole row.  POWER: scales are powers of two.  RECIPROCAL: y is multiplied by 1/scale.
    INVERSE is what amax is multiplied by for the scale, 0 where it is divided by LIMIT.  SAFE: ``_is_safe``.
    """
    ceiling = math.inf if quantization.amax_ceiling is None else quantization.amax_ceiling
    inverse = 1.0 / quantization.qmax if quantization.scale_division == "reciprocal" else 0.0
    return {
        "GROUP": _group(quantization, spec),
        "LAYOUT": _LAYOUTS[quantization.layout],
        "CODES": _QUANT_CODES[quantization.dtype],
        "LIMIT": int(quantization.qmax),
        "POWER": int(quantization.scale == "ue8m0"),
        "RECIPROCAL": int(quantization.quotient == "reciprocal"),
        "FLOOR": _bits32(quantization.amax_floor),
        "CEILING": _bits32(ceiling),
        "SCALE_FLOOR": _bits32(quantization.scale_floor),
        "INVERSE": _bits32(inverse),
        "SAFE": int(_is_safe(quantization)),
    }


def _tile_defines(tile: Tile, target: Target) -> tuple[tuple[str, str], ...]:
    if target.backend == "cpu":
        return (("ROWS", str(tile.rows)),)
    values = {"ROW_LANES": tile.lanes, "VECTORS": tile.vectors, "VECTOR": tile.vector, "ROWS": tile.rows}
    values["BATCHES"] = tile.batches
    return (*((name, str(value)) for name, value in values.items()), ("THREADS", str(tile.threads)))


def _promoted(dtype: str, weight_dtype: str | None) -> str:
    """The dtype torch multiplies ``dtype`` by ``weight_dtype`` in."""
    return dtype if weight_dtype in (None, dtype) else "float32"


def _is_safe(quantization: Quantization) -> bool:
    """Whether y/scale may be computed through 1/scale, and needs no clamp.

    Not where the scale can be so small that 1/scale leaves float32's normal range; not where y can exceed the
    limit (a ceiling on amax, or a limit that rounding to the type can pass); nor where a scale that does not
    come from 11 bits of amax is the one the kernel's reciprocal gets wrong.
    """
    floor, scale_floor = _rounded32(quantization.amax_floor), _rounded32(quantization.scale_floor)
    qmax = quantization.qmax
    if max(floor, scale_floor) < _SAFE_FLOOR or quantization.amax_ceiling is not None:
        return False
    if not _has_bits(qmax, _SIGNIFICAND[quantization.dtype]):
        return False
    scales = [scale_floor, _rounded32(floor / qmax)]
    if quantization.scale_division == "reciprocal":
        inverse = _rounded32(1.0 / qmax)
        scales = [scale_floor, _rounded32(floor * inverse), _rounded32(qmax * inverse)]
    return not any(_is_all_ones(scale) for scale in scales)


def _is_all_ones(value: float) -> bool:
    """Whether every bit of a float32's significand is one."""
    return math.frexp(value)[0] == 1 - 2**-24


def _has_bits(value: float, bits: int) -> bool:
    """Whether ``bits`` bits hold the significand of ``value``."""
    return (math.frexp(value)[0] * 2**bits).is_integer()


def _rounded32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def float32_literal(value: float) -> str:
    """``value`` rounded to float32 as a C hexadecimal literal."""
    return _rounded32(value).hex() + "f"


def _bits32(value: float) -> str:
    """The bits of ``value`` rounded to float32, as a C literal."""
    return f"0x{struct.unpack('I', struct.pack('f', value))[0]:08x}u"


def _stem(spec: RowSpec) -> str:
    parts = []
    if spec.norm:
        parts.append("add_rms_norm" if spec.norm.residual else "rms_norm")
    if spec.gate:
        parts.append(f"{spec.gate.activation}_mul")
    parts += [_quant_stem(quantization) for quantization in spec.quantizations]
    return "_".join([*(parts or ["copy"]), _SHORT[spec.dtype], f"h{spec.hidden}"])


def _quant_stem(quantization: Quantization) -> str:
    """``quant128`` is the usual scheme; what differs is named: ``int8quant_row``, ``quant128_packed``."""
    group = "_row" if quantization.group is None else str(quantization.group)
    scale = _SCALE_SHORT[quantization.scale] if quantization.layout != "ue8m0_packed" else ""
    return f"{_QUANT_SHORT[quantization.dtype]}quant{group}{scale}{_LAYOUT_SHORT[quantization.layout]}"


def digest(defines: tuple[tuple[str, str], ...]) -> str:
    """What tells instances of different ``defines`` apart in their names."""
    return hashlib.sha256(json.dumps(defines).encode()).hexdigest()[:8]
