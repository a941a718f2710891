"""The family that the entry point names: from a LayerNormSpec and a target to a kernel of ``kernels/``."""

from __future__ import annotations

from pathlib import Path

from iree.compiler import ir

from lowering.errors import CompileError
from lowering.families.base import Family, Reference
from lowering.families.instance import (
    Binding,
    Dimension,
    GridRule,
    KernelInstance,
    bits32,
    float32_literal,
    listed,
)
from lowering.targets import Target
from patterns import canonical
from patterns.contracts import Quantization, in_words

from .contract import LayerNorm, LayerNormSpec
from .eager import without_kernel
from .patterns import FAMILY as PATTERNS
from .patterns import LAYER_NORM

MAX_HIDDEN = 16384

_SOURCES = {"cpu": "layer_norm.c", "cuda": "layer_norm.cu", "hip": "layer_norm.hip"}
_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}

# Elements that a thread of a GPU should have, as far as 1024 threads suffice.
_PER_THREAD = 8
# Elements that one CPU workgroup norms: some ten microseconds, well above the cost of handing it out.
_CPU_ELEMENTS = 16384


def why_unsupported(spec: LayerNormSpec, target: Target) -> str | None:
    """A sentence saying why the kernel cannot do ``spec`` on ``target``, or None if it can."""
    scheme = spec.quantization
    floors = Quantization(None, amax_floor=scheme.amax_floor, scale_floor=scheme.scale_floor)
    dtypes = {"x": spec.dtype, "a weight": spec.weight_dtype, "a bias": spec.bias_dtype}
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in _CODES:
            return f"The LayerNorm kernel takes {name} of {listed(_CODES)}, not {dtype}."
    if scheme != floors:
        return (
            "The LayerNorm kernel quantizes whole rows to float8_e4m3fn, with float32 scales in rows and "
            f"true divisions; this quantization is {in_words(scheme)}."
        )
    if scheme.dtype not in target.floats:
        return (
            f"{target.name} has no instruction that converts to {scheme.dtype}, as the LayerNorm kernel does."
        )
    if spec.hidden > MAX_HIDDEN:
        return f"The LayerNorm kernel knows rows of at most {MAX_HIDDEN} elements, not {spec.hidden}."
    return None


def instance(spec: LayerNormSpec, target: Target) -> KernelInstance:
    """The kernel for ``spec`` on ``target``.  Raises CompileError with ``why_unsupported``'s sentence."""
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    rows = 1 if target.is_gpu else max(1, _CPU_ELEMENTS // spec.hidden)
    threads = _threads(spec.hidden, target) if target.is_gpu else 1
    defines = (*_defines(spec), ("THREADS", str(threads)) if target.is_gpu else ("ROWS", str(rows)))
    stem, source = f"layer_norm_fp8_{_SHORT[spec.dtype]}_h{spec.hidden}", _SOURCES[target.backend]
    return KernelInstance.named(stem, target, spec, source, defines, _bindings(spec), GridRule(rows), threads)


def _threads(hidden: int, target: Target) -> int:
    """The threads that share a row."""
    threads = target.wave
    while threads < 1024 and threads * _PER_THREAD < hidden:
        threads *= 2
    return threads


def _bindings(spec: LayerNormSpec) -> tuple[Binding, ...]:
    """The tensors in dispatch order; q and scale are a site of their own, which counts what they cost."""
    scheme = spec.quantization
    row: tuple[Dimension, ...] = ("T", spec.hidden)
    return (
        Binding("x", spec.dtype, row, "read"),
        *([Binding("weight", spec.weight_dtype, (spec.hidden,), "read")] if spec.weight_dtype else []),
        *([Binding("bias", spec.bias_dtype, (spec.hidden,), "read")] if spec.bias_dtype else []),
        *([Binding("y", spec.dtype, row, "write")] if spec.writes_y else []),
        Binding("q", scheme.dtype, row, "write", quantization=scheme),
        Binding("scale", "float32", ("T", 1), "write", quantization=scheme),
    )


def _defines(spec: LayerNormSpec) -> tuple[tuple[str, str], ...]:
    values: dict[str, int | str] = {
        "HIDDEN": spec.hidden,
        "X_DTYPE": _CODES[spec.dtype],
        "WEIGHT_DTYPE": _CODES[spec.weight_dtype] if spec.weight_dtype else 0,
        "BIAS_DTYPE": _CODES[spec.bias_dtype] if spec.bias_dtype else 0,
        "WRITES_Y": int(spec.writes_y),
        "EPS": float32_literal(spec.norm.eps),
        "SHARE": (1.0 / spec.hidden).hex(),
        "AMAX_FLOOR": bits32(spec.quantization.amax_floor),
        "SCALE_FLOOR": bits32(spec.quantization.scale_floor),
    }
    return tuple((name, str(value)) for name, value in values.items())


def _reference(op: ir.Operation) -> Reference:
    """What a LayerNorm computes where it gets no kernel."""
    norm = canonical.from_attribute(LayerNorm, op.attributes["contract"])
    return norm, lambda x, weight=None, bias=None: without_kernel(x, weight, bias, norm)


FAMILY = Family(
    name="layer_norm_fp8",
    patterns=PATTERNS,
    spec=LayerNormSpec,
    instance=instance,
    why_unsupported=why_unsupported,
    sources={
        "layer_norm.c": ("cpu.h",),  # vmfuse's own
        "layer_norm.cu": ("layer_norm.h",),
        "layer_norm.hip": ("layer_norm.h",),
    },
    references={LAYER_NORM: _reference},
    directory=Path(__file__).parent / "kernels",
)
