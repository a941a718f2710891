"""Make a kernel instance of a MatmulSpec and a target: the scaled product of ``kernels/matmul.*``.

What that kernel family supports is decided here and in the variant of the target's backend:
``why_unsupported`` says it in a sentence that the fusion can act on, ``instance`` raises the same sentence.
"""

from __future__ import annotations

import torch
from iree.compiler import ir

from patterns import canonical, torch_ir
from patterns.contracts import DEPTH_MULTIPLE, MatmulSpec, ScaleLayout, WeightLayout, stored_rows
from patterns.families import PRODUCT

from ... import ops
from ...errors import CompileError
from ...targets import Backend, Target
from ..base import Family, Reference
from ..instance import Binding, Dimension, KernelInstance
from . import cpu as matmul_cpu
from . import cuda as matmul_cuda
from . import hip as matmul_hip
from .variant import DTYPE_CODES, FLOAT8_CODES, Variant, addend_bindings

_VARIANTS: dict[Backend, Variant] = {
    "cpu": matmul_cpu.VARIANT,
    "cuda": matmul_cuda.VARIANT,
    "hip": matmul_hip.VARIANT,
}
_MOST_INTEGERS = (2**31 - 1) // 128**2  # products of int8 that an int32 holds the sum of
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    """Say in a sentence why no kernel computes ``spec`` on ``target``; None if one does."""
    special = _VARIANTS[target.backend].why_unsupported
    return (
        _why_not_types(spec)
        or _why_not_scales(spec)
        or _why_not_layouts(spec, target)
        or special(spec, target)
    )


def _why_not_types(spec: MatmulSpec) -> str | None:
    if spec.a_dtype == spec.b_dtype == "int8":
        if not spec.whole or spec.depth > _MOST_INTEGERS:
            return f"The product kernel takes int8 with whole scales of up to {_MOST_INTEGERS} codes."
    else:
        for name, dtype in (("a", spec.a_dtype), ("b", spec.b_dtype)):
            if dtype not in FLOAT8_CODES:
                return f"The product kernel takes {name} of {' or '.join(FLOAT8_CODES)}, not {dtype}."
    if spec.dtype not in DTYPE_CODES:
        return f"The product kernel writes {', '.join(DTYPE_CODES)}, not {spec.dtype}."
    if spec.columns < 1:
        return "The product has no columns."
    return None


def _why_not_scales(spec: MatmulSpec) -> str | None:
    if not spec.whole and (spec.a_scales, spec.b_scales) != ("rows", "blocks"):
        return f"The product kernel knows scales of groups in blocks of b, not of its {spec.b_scales}."
    if spec.a_scales == "one" and spec.a_scale_layout != "row":
        return "One scale of a has no layout."
    return None


def _why_not_layouts(spec: MatmulSpec, target: Target) -> str | None:
    weights, scales = weight_layouts(target), scale_layouts(target)
    if spec.b_layout not in weights:
        return f"The product kernel of {target.name} reads b in {' or '.join(weights)}, not {spec.b_layout}."
    multiple = DEPTH_MULTIPLE[spec.b_layout]
    if spec.depth % multiple:
        return f"The layout {spec.b_layout} has rows of whole {multiple} elements, not of {spec.depth}."
    if spec.a_scale_layout not in scales:
        asked = spec.a_scale_layout
        return f"The product kernel of {target.name} reads a_scale in {' or '.join(scales)}, not {asked}."
    return None


def weight_layouts(target: Target) -> tuple[WeightLayout, ...]:
    """The layouts of b that some kernel of ``target`` reads, the fastest first."""
    return _VARIANTS[target.backend].weight_layouts


def scale_layouts(target: Target) -> tuple[ScaleLayout, ...]:
    """The layouts of the scales of a that some kernel of ``target`` reads, the fastest first."""
    return _VARIANTS[target.backend].scale_layouts


def instance(spec: MatmulSpec, target: Target, tile: object | None = None) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; ``tile``, of the variant's kind, overrides the default.

    Raises CompileError with ``why_unsupported``'s sentence.
    """
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    variant = _VARIANTS[target.backend]
    special = variant.specialise(spec, target, tile)
    stem = f"matmul{'' if spec.whole else spec.group}_{_SHORT[spec.dtype]}_n{spec.columns}_k{spec.depth}"
    return KernelInstance.named(
        stem,
        target,
        spec,
        variant.source,
        special.defines,
        bindings(spec),
        special.grid_rule,
        special.threads,
        special.dynamic_shared,
    )


def bindings(spec: MatmulSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order: a, b, scales of both, bias and residual if any; out."""
    groups = spec.depth // spec.group
    scales: dict[ScaleLayout, tuple[Dimension, ...]] = {
        "row": ("T", groups) if spec.a_scales == "rows" else (1,),
        "column": (groups, "T"),
        "column_tma": (groups, "T4"),
    }
    read = [
        Binding("a", spec.a_dtype, ("T", spec.depth), "read"),
        Binding("b", spec.b_dtype, (stored_rows(spec.columns, spec.b_layout), spec.depth), "read"),
        Binding("a_scale", "float32", scales[spec.a_scale_layout], "read", layout=spec.a_scale_layout),
        Binding("b_scale", "float32", spec.b_scale_shape, "read"),
    ]
    return (*read, *addend_bindings(spec), Binding("out", spec.dtype, ("T", spec.columns), "write"))


def _reference(op: ir.Operation) -> Reference:
    result, product = torch_ir.tensor_type(op.results[0]), canonical.product_contract(op)
    assert result is not None
    dtype = getattr(torch, result.dtype)

    def block_scaled_matmul(
        a: torch.Tensor,
        b: torch.Tensor,
        a_scale: torch.Tensor,
        b_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return ops.block_scaled_matmul_reference(
            a, b, a_scale, b_scale, dtype, bias, product.b_layout, product.bias_rounding
        )

    return (dtype, product), block_scaled_matmul


FAMILY = Family(
    name="block_scaled_matmul",
    patterns=PRODUCT,
    spec=MatmulSpec,
    instance=instance,
    why_unsupported=why_unsupported,
    sources={**matmul_cpu.MATMUL_C, "matmul.cu": ("mma.h", "finish.h"), "matmul.hip": ()},
    references={canonical.BLOCK_SCALED_MATMUL: _reference},
)
