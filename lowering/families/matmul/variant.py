"""Describe a backend's kernel of the block-scaled product to its family: what it reads, how it is made.

Each backend has one ``Variant``, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from patterns.contracts import LinearSpec, MatmulSpec, ScaleLayout, WeightLayout
from patterns.packed_matmul import PackedSpec

from ...targets import Target
from ..instance import Binding, GridRule

Product = MatmulSpec | LinearSpec | PackedSpec

DTYPE_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
CODE_KINDS = {"float8_e4m3fn": 0, "float8_e4m3fnuz": 1, "int8": 3}
FLOAT8_CODES = tuple(name for name in CODE_KINDS if name.startswith("float8"))
SCALE_LAYOUT_CODES: dict[ScaleLayout, int] = {"row": 0, "column_tma": 1, "column": 2}


@dataclass(frozen=True)
class Specialised:
    """Hold what makes an instance of a source: its constants, workgroups of ``threads``, and their number."""

    defines: tuple[tuple[str, str], ...]
    grid_rule: GridRule
    threads: int = 1
    dynamic_shared: int = 0


@dataclass(frozen=True)
class Variant:
    """The product kernel of one backend.

    weight_layouts, scale_layouts
        Those of b and of the scales of a that it may read, the fastest first.
    why_unsupported
        A sentence saying why it does not compute a spec on a target, whatever is said here; None if it does.
        Dtypes and layouts have been looked at.
    specialise
        The instance's constants and its grid, for a spec that it computes; ``tile``, of a kind of its own,
        overrides the default (for tuning).
    """

    source: str
    weight_layouts: tuple[WeightLayout, ...]
    scale_layouts: tuple[ScaleLayout, ...]
    why_unsupported: Callable[[MatmulSpec, Target], str | None]
    specialise: Callable[[MatmulSpec, Target, object | None], Specialised]


def common_defines(spec: MatmulSpec) -> dict[str, int]:
    """The constants that every backend's source knows by the same names."""
    return {
        "N": spec.columns,
        "K": spec.depth,
        "GROUP": spec.group,
        "A_CODES": CODE_KINDS[spec.a_dtype],
        "B_CODES": CODE_KINDS[spec.b_dtype],
        "OUT_DTYPE": DTYPE_CODES[spec.dtype],
        **addend_defines(spec),
        "A_SCALE_LAYOUT": SCALE_LAYOUT_CODES[spec.a_scale_layout],
        "WHOLE": int(spec.whole),
        "ONE_A": int(spec.a_scales == "one"),
        "B_ROWS": {"blocks": spec.group, "rows": 1, "one": spec.columns}[spec.b_scales],
        **({"BIAS_TWICE": 1} if spec.bias_rounding == "twice" else {}),
    }


def addend_defines(spec: Product) -> dict[str, int]:
    """The constants that say what is added to a product; sources take no HAS_RESIDUAL for none."""
    return {"HAS_BIAS": int(spec.bias), **({"HAS_RESIDUAL": 1} if spec.residual else {})}


def addend_bindings(spec: Product) -> list[Binding]:
    """The tensors that are added to a product: a bias, then a residual, if there are any."""
    bias = Binding("bias", spec.dtype, (spec.columns,), "read")
    residual = Binding("residual", spec.dtype, ("T", spec.columns), "read")
    return [bias] * spec.bias + [residual] * spec.residual


def texts(values: dict[str, int]) -> tuple[tuple[str, str], ...]:
    """``values`` as a compiler takes them."""
    return tuple((name, str(value)) for name, value in values.items())
