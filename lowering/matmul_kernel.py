"""From a MatmulSpec and a target to a kernel instance: the block-scaled product of ``kernels/matmul.c``.

What that kernel supports is decided here and nowhere else: ``why_unsupported`` says it in a sentence that the
fusion can act on, ``instance`` raises the same sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from patterns.contracts import MatmulSpec

from .errors import CompileError
from .kernel import Binding, KernelInstance, digest
from .mapping import GROUPS, GridRule
from .targets import Target

_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_FLOAT8_CODES = {"float8_e4m3fn": 0, "float8_e4m3fnuz": 1}


@dataclass(frozen=True)
class ProductTile:
    """What one workgroup computes: ``rows`` x ``columns`` of the result.

    Up to ``few_rows`` rows the weights stream past one row after another; with more, a tile of them is
    decoded and multiplied with all rows.  96 columns are whole panels of every vector width; rows * columns
    sums lie on the stack of a worker, which has 128 KiB.
    """

    rows: int = 128
    columns: int = 96
    few_rows: int = 1


def why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    """A sentence saying why no kernel computes ``spec`` on ``target``, or None if one does."""
    if target.backend != "cpu":
        return f"The product kernel is written for the cpu, not for {target.name}."
    for name, dtype in (("a", spec.a_dtype), ("b", spec.b_dtype)):
        if dtype not in _FLOAT8_CODES:
            return f"The product kernel takes {name} of {' or '.join(_FLOAT8_CODES)}, not {dtype}."
    if spec.dtype not in _CODES:
        return f"The product kernel writes {', '.join(_CODES)}, not {spec.dtype}."
    if spec.group not in GROUPS:
        return f"The product kernel knows groups of {', '.join(map(str, GROUPS))}, not {spec.group}."
    if spec.columns < 1:
        return "The product has no columns."
    return None


def instance(spec: MatmulSpec, target: Target, tile: ProductTile | None = None) -> KernelInstance:
    """The kernel for ``spec`` on ``target``; ``tile`` overrides the default (for tuning).

    Raises CompileError with ``why_unsupported``'s sentence.
    """
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    tile = tile or ProductTile()
    defines = _defines(spec, tile)
    stem = f"matmul{spec.group}_{_SHORT[spec.dtype]}_n{spec.columns}_k{spec.depth}"
    entry = f"{stem}_{digest(defines)}"
    return KernelInstance(
        entry=entry,
        target=target,
        spec=spec,
        source="matmul.c",
        defines=(("ENTRY", entry), *defines),
        bindings=bindings(spec),
        block=(1, 1, 1),
        grid_rule=GridRule(tile.rows, columns=-(-spec.columns // tile.columns)),
    )


def bindings(spec: MatmulSpec) -> tuple[Binding, ...]:
    """The tensors of ``spec`` in dispatch order."""
    groups = spec.depth // spec.group
    return (
        Binding("a", spec.a_dtype, ("T", spec.depth), "read"),
        Binding("b", spec.b_dtype, (spec.columns, spec.depth), "read"),
        Binding("a_scale", "float32", ("T", groups), "read"),
        Binding("b_scale", "float32", (-(-spec.columns // spec.group), groups), "read"),
        Binding("out", spec.dtype, ("T", spec.columns), "write"),
    )


def _defines(spec: MatmulSpec, tile: ProductTile) -> tuple[tuple[str, str], ...]:
    values = {
        "N": spec.columns,
        "K": spec.depth,
        "GROUP": spec.group,
        "A_CODES": _FLOAT8_CODES[spec.a_dtype],
        "B_CODES": _FLOAT8_CODES[spec.b_dtype],
        "OUT_DTYPE": _CODES[spec.dtype],
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "FEW_ROWS": tile.few_rows,
    }
    return tuple((name, str(value)) for name, value in values.items())
