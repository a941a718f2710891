"""List vLLM's quantizations, and the norms and activations it fuses with them, by name.

The schemas and the arithmetic were read in its sources of 2026.  What is not here: one scale for a whole
tensor, and zero points, which no contract has; bounds of a scale that are tensors;
``per_token_group_quant_int8``, which cuts off what is behind the point.  Models register these operations
themselves where vLLM is not installed, so declaring the table leaves them alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .named_call import SCALE_LAYOUT, Arg, Fields, NamedOp

VLLM_NORM = {"eps": Arg("epsilon"), "rounding": "twice"}
# vLLM's own bound for fnuz.
VLLM_LIMITS = {"float8_e4m3fn": {}, "float8_e4m3fnuz": {"limit": 224.0}}
# The least scales: of fp8 1 over 512 times the bound, of int8 the float32 epsilon.
_VLLM_FP8 = {
    "float8_e4m3fn": {"scale_floor": 1 / (448 * 512)},
    "float8_e4m3fnuz": {"scale_floor": 1 / (224 * 512), "limit": 224.0},
}
_VLLM_8_BIT = {**_VLLM_FP8, "int8": {"scale_floor": 2.0**-23, "quotient": "reciprocal"}}
_VLLM_8_BIT_DIVIDED = {**_VLLM_8_BIT, "int8": {"scale_floor": 2.0**-23}}
_VLLM_STATIC = {"quotient": "reciprocal"}
_ROW = {"group": None, "amax_floor": 0.0}
_GROUPS = {
    "group": Arg("group_size"),
    "amax_floor": 0.0,
    "layout": SCALE_LAYOUT,
}


def _with_or_without_residual(
    name: str, arguments: str, scheme: Fields, requires: Fields
) -> Iterable[NamedOp]:
    """A norm and its quantization, with the residual add before it where a residual is given."""
    shared = {
        "schema": "(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
        f"{arguments}) -> ()",
        "weight": "weight",
        "quantization": scheme,
        "dtypes": _VLLM_8_BIT,
        "is_declared": False,
    }
    alone = {"requires": {**requires, "residual": None}, "unwritten": ("residual",)}
    yield NamedOp(name, results=("q", "scale"), norm=VLLM_NORM, **alone, **shared)
    yield NamedOp(
        name,
        results=("q", "scale", "sum"),
        residual="residual",
        norm={**VLLM_NORM, "residual": "exact"},
        requires=requires,
        **shared,
    )


def _static_fp8(requires: Fields) -> NamedOp:
    return NamedOp(
        "_C::static_scaled_fp8_quant",
        "(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
        ("q",),
        given="scale",
        quantization=_VLLM_STATIC,
        dtypes=VLLM_LIMITS,
        requires=requires,
        is_declared=False,
    )


VLLM_QUANTS = (
    NamedOp(
        "_C::rms_norm_weightless",
        "(Tensor! result, Tensor input, float epsilon) -> ()",
        ("y",),
        norm=VLLM_NORM,
        is_declared=False,
    ),
    NamedOp(
        "_C::fused_add_rms_norm_weightless",
        "(Tensor! input, Tensor! residual, float epsilon) -> ()",
        ("y", "sum"),
        residual="residual",
        norm={**VLLM_NORM, "residual": "exact"},
        is_declared=False,
    ),
    NamedOp(
        "_C::dynamic_per_token_scaled_fp8_quant",
        "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        ("q", "scale"),
        quantization=_ROW,
        dtypes=_VLLM_FP8,
        requires={"scale_ub": None},
        is_declared=False,
    ),
    _static_fp8({"group_shape": None}),
    _static_fp8({"group_shape": [-1, -1]}),
    NamedOp(
        "_C::dynamic_scaled_int8_quant",
        "(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()",
        ("q", "scale"),
        quantization={**_ROW, "quotient": "inverse"},
        dtypes={"int8": {}},
        requires={"azp": None},
        unwritten=("azp",),
        is_declared=False,
    ),
    NamedOp(
        "_C::static_scaled_int8_quant",
        "(Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()",
        ("q",),
        given="scale",
        quantization={"lowest": -128.0},
        dtypes={"int8": {}},
        requires={"azp": None},
        is_declared=False,
    ),
    NamedOp(
        "_C::rms_norm_static_fp8_quant",
        "(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()",
        ("q",),
        weight="weight",
        given="scale",
        norm=VLLM_NORM,
        quantization=_VLLM_STATIC,
        dtypes=VLLM_LIMITS,
        is_declared=False,
    ),
    NamedOp(
        "_C::fused_add_rms_norm_static_fp8_quant",
        "(Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale, float epsilon) -> ()",
        ("q", "sum"),
        weight="weight",
        residual="residual",
        given="scale",
        norm={**VLLM_NORM, "residual": "exact"},
        quantization=_VLLM_STATIC,
        dtypes=VLLM_LIMITS,
        is_declared=False,
    ),
    *_with_or_without_residual(
        "_C::rms_norm_dynamic_per_token_quant",
        "Tensor? scale_ub, Tensor!? residual",
        _ROW,
        {"scale_ub": None},
    ),
    *_with_or_without_residual(
        "_C::rms_norm_per_block_quant",
        "Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed",
        _GROUPS,
        {"scale_ub": None},
    ),
    # The product of activation and up was rounded to 16 bits before 2026.
    NamedOp(
        "_C::silu_and_mul_quant",
        "(Tensor! result, Tensor input, Tensor scale) -> ()",
        ("q",),
        given="scale",
        gate={"activation": "silu", "rounding": "none"},
        quantization=_VLLM_STATIC,
        dtypes=VLLM_LIMITS,
        is_declared=False,
    ),
    NamedOp(
        "_C::silu_and_mul_per_block_quant",
        "(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub=None, "
        "bool is_scale_transposed=False) -> ()",
        ("q", "scale"),
        gate={"activation": "silu", "rounding": "none"},
        quantization=_GROUPS,
        dtypes=_VLLM_8_BIT_DIVIDED,
        requires={"scale_ub": None},
        is_declared=False,
    ),
)
