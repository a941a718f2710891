"""Make a kernel instance of a SelectionSpec and a target: top-k by itself, of ``kernels/select.c``.

Elsewhere than on the CPU, and where this kernel does not fit, a top-k is computed of ranks
(``respell_sorts``), of equal elements that with the smaller index first.
"""

from __future__ import annotations

from patterns.contracts import SelectionSpec
from patterns.selection_fusion import FAMILY as PATTERNS

from ..errors import CompileError
from ..targets import Target
from .base import Family
from .instance import Binding, GridRule, KernelInstance

_CODES = {"bfloat16": 1, "float16": 2, "float32": 3, "int32": 4, "int64": 5}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "i32", "int64": "i64"}

# Elements that a row's kernel holds on its stack, of 8 bytes each, of int64 16.
_MOST_HELD = 8192
# Elements of a workgroup: some ten microseconds, well above the cost of handing it out.
_ELEMENTS = 4096


def why_unsupported(spec: SelectionSpec, target: Target) -> str | None:
    """Say in a sentence why no kernel computes ``spec`` on ``target``; None if one does."""
    if target.is_gpu:
        return f"The kernel of a top-k is written for the cpu, not for {target.name}."
    if spec.dtype not in _CODES:
        return f"The kernel of a top-k compares {', '.join(_CODES)}, not {spec.dtype}."
    held = spec.count if spec.count * 64 <= spec.elements else spec.elements
    if not 0 < spec.count <= spec.elements or held > _MOST_HELD:
        return f"The kernel of a top-k does not take the best {spec.count} of {spec.elements} elements."
    return None


def instance(spec: SelectionSpec, target: Target) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; raises CompileError with ``why_unsupported``'s words."""
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    rows = max(1, _ELEMENTS // spec.elements)
    values = {
        "ELEMENTS": spec.elements,
        "COUNT": spec.count,
        "DTYPE": _CODES[spec.dtype],
        "LARGEST": int(spec.largest),
        "SORTED": int(spec.sorted),
        "ROWS": rows,
    }
    defines = tuple((name, str(value)) for name, value in values.items())
    stem = f"select{spec.count}_{_SHORT[spec.dtype]}_of{spec.elements}"
    return KernelInstance.named(stem, target, spec, "select.c", defines, bindings(spec), GridRule(rows))


def bindings(spec: SelectionSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order."""
    return (
        Binding("x", spec.dtype, ("T", spec.elements), "read"),
        Binding("values", spec.dtype, ("T", spec.count), "write"),
        Binding("places", "int64", ("T", spec.count), "write"),
    )


FAMILY = Family(
    "selection",
    PATTERNS,
    SelectionSpec,
    instance,
    why_unsupported,
    sources={"select.c": ("cpu.h", "order.h")},
)
