"""Make a kernel instance of a LinearSpec and a target: products without scales, of ``kernels/matmul.c``.

On the CPU IREE's own product of a large weight, a language model's head above all, takes four times as long
(docs/measurements.md); elsewhere it is left to IREE.
"""

from __future__ import annotations

from patterns.contracts import LinearSpec
from patterns.linear_fusion import FAMILY as PATTERNS

from ..errors import CompileError
from ..targets import Target
from .base import Family
from .instance import Binding, KernelInstance
from .matmul.cpu import DEPTH_MULTIPLE, MATMUL_C, ProductTile, tile_defines
from .matmul.variant import DTYPE_CODES, addend_bindings, addend_defines, texts

_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def why_unsupported(spec: LinearSpec, target: Target) -> str | None:
    """Say in a sentence why no kernel computes ``spec`` on ``target``; None if one does."""
    if target.is_gpu:
        return f"The kernel of linear layers is written for the cpu, not for {target.name}."
    if spec.dtype not in DTYPE_CODES:
        return f"The kernel of linear layers computes in {', '.join(DTYPE_CODES)}, not {spec.dtype}."
    if spec.depth % DEPTH_MULTIPLE:
        return f"The kernel of linear layers takes whole {DEPTH_MULTIPLE} features, not {spec.depth}."
    return None


def instance(spec: LinearSpec, target: Target) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; raises CompileError with ``why_unsupported``'s words."""
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    values, grid_rule = tile_defines(spec.columns, ProductTile())
    defines = texts(
        {
            "N": spec.columns,
            "K": spec.depth,
            "PLAIN": DTYPE_CODES[spec.dtype],
            "OUT_DTYPE": DTYPE_CODES[spec.dtype],
            **addend_defines(spec),
            **values,
        }
    )
    stem = f"linear_{_SHORT[spec.dtype]}_n{spec.columns}_k{spec.depth}"
    return KernelInstance.named(stem, target, spec, "matmul.c", defines, bindings(spec), grid_rule)


def bindings(spec: LinearSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order: a, b, bias and residual if there are any; out."""
    read = [
        Binding("a", spec.dtype, ("T", spec.depth), "read"),
        Binding("b", spec.dtype, (spec.columns, spec.depth), "read"),
    ]
    return (*read, *addend_bindings(spec), Binding("out", spec.dtype, ("T", spec.columns), "write"))


# It shares its source with the block-scaled product.
FAMILY = Family("linear", PATTERNS, LinearSpec, instance, why_unsupported, sources=MATMUL_C)
