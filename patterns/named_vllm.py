"""List vLLM's norms, activations and quantizations by name, and those it fuses.

The schemas and the arithmetic were read in its sources of 2026.  What is not here: one scale for a whole
tensor, and zero points, which no contract has; bounds of a scale that are tensors;
``per_token_group_quant_int8``, which cuts off what is behind the point.  Models register the fused ones
themselves where vLLM is not installed, so declaring the table leaves those alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .named_call import SCALE_LAYOUT, Arg, Fields, NamedOp

_NORM = {"eps": Arg("epsilon"), "rounding": "twice"}
# vLLM's own bound for fnuz.
_LIMITS = {"float8_e4m3fn": {}, "float8_e4m3fnuz": {"limit": 224.0}}
# The least scales: of fp8 1 over 512 times the bound, of int8 the float32 epsilon.
_VLLM_FP8 = {
    "float8_e4m3fn": {"scale_floor": 1 / (448 * 512)},
    "float8_e4m3fnuz": {"scale_floor": 1 / (224 * 512), "limit": 224.0},
}
_VLLM_8_BIT = {**_VLLM_FP8, "int8": {"scale_floor": 2.0**-23, "quotient": "reciprocal"}}
_VLLM_8_BIT_DIVIDED = {**_VLLM_8_BIT, "int8": {"scale_floor": 2.0**-23}}
_STATIC = {"quotient": "reciprocal"}
_ROW = {"group": None, "amax_floor": 0.0}
_GROUPS = {
    "group": Arg("group_size"),
    "amax_floor": 0.0,
    "layout": SCALE_LAYOUT,
}
# vLLM's and SGLang's CUDA kernels: true divisions; every bound is an argument.
_CUDA_QUANT = {
    "group": Arg("group_size"),
    "amax_floor": Arg("eps"),
    "limit": Arg("fp8_max"),
    "layout": SCALE_LAYOUT,
}
_FLOAT_SCALE = {"scale_ue8m0": False}
_UE8M0_SCALE = {"scale_ue8m0": True}
_POWER_OF_TWO = {"scale": "ue8m0", "scale_floor": 1e-10}


def gates_of(namespace: str, rounding: str, arguments: str) -> Iterable[NamedOp]:
    """act(first half) * second half, as every library spells it."""
    for prefix, activation in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_tanh")):
        yield NamedOp(
            f"{namespace}::{prefix}_and_mul",
            f"({arguments}) -> ()",
            ("y",),
            gate={"activation": activation, "rounding": rounding},
        )


def cuda_quants(name: str, arguments: str) -> Iterable[NamedOp]:
    """One quantization whose scales are float32 or powers of two, as an argument says."""
    for requires, scale in ((_FLOAT_SCALE, {}), (_UE8M0_SCALE, _POWER_OF_TWO)):
        yield NamedOp(
            name,
            f"({arguments}) -> ()",
            ("q", "scale"),
            quantization={**_CUDA_QUANT, **scale},
            lower="fp8_min",
            requires=requires,
        )


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
    yield NamedOp(name, results=("q", "scale"), norm=_NORM, **alone, **shared)
    yield NamedOp(
        name,
        results=("q", "scale", "sum"),
        residual="residual",
        norm={**_NORM, "residual": "exact"},
        requires=requires,
        **shared,
    )


def _static_fp8(requires: Fields) -> NamedOp:
    return NamedOp(
        "_C::static_scaled_fp8_quant",
        "(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
        ("q",),
        given="scale",
        quantization=_STATIC,
        dtypes=_LIMITS,
        requires=requires,
        is_declared=False,
    )


_QUANTS = (
    NamedOp(
        "_C::rms_norm_weightless",
        "(Tensor! result, Tensor input, float epsilon) -> ()",
        ("y",),
        norm=_NORM,
        is_declared=False,
    ),
    NamedOp(
        "_C::fused_add_rms_norm_weightless",
        "(Tensor! input, Tensor! residual, float epsilon) -> ()",
        ("y", "sum"),
        residual="residual",
        norm={**_NORM, "residual": "exact"},
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
        norm=_NORM,
        quantization=_STATIC,
        dtypes=_LIMITS,
        is_declared=False,
    ),
    NamedOp(
        "_C::fused_add_rms_norm_static_fp8_quant",
        "(Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale, float epsilon) -> ()",
        ("q", "sum"),
        weight="weight",
        residual="residual",
        given="scale",
        norm={**_NORM, "residual": "exact"},
        quantization=_STATIC,
        dtypes=_LIMITS,
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
        quantization=_STATIC,
        dtypes=_LIMITS,
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

ROWS = (
    # read: the native definitions, whose casts follow the weight's dtype.
    NamedOp(
        "vllm_ir::rms_norm",
        "(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
        ("y",),
        x="x",
        weight="weight",
        norm=_NORM,
        requires={"variance_size": None},
    ),
    NamedOp(
        "vllm_ir::fused_add_rms_norm",
        "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None)"
        " -> (Tensor, Tensor)",
        ("y", "sum"),
        x="x",
        weight="weight",
        residual="x_residual",
        norm={**_NORM, "residual": "exact"},
        requires={"variance_size": None},
    ),
    # Schemas read, arithmetic numerics: the kernels of 2025 round twice, those of 2026 once, and in
    # both the sum of fused_add_rms_norm is rounded before the statistic where numerics has it exact.
    NamedOp(
        "_C::rms_norm",
        "(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
        ("y",),
        weight="weight",
        norm=_NORM,
    ),
    NamedOp(
        "_C::fused_add_rms_norm",
        "(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
        ("y", "sum"),
        weight="weight",
        residual="residual",
        norm={**_NORM, "residual": "exact"},
    ),
    # read: the activation is rounded to the element type before the product.
    *gates_of("_C", "twice", "Tensor! result, Tensor input"),
    # read
    *cuda_quants(
        "_C::per_token_group_fp8_quant",
        "Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
        "float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed=False, "
        "bool dummy_is_tma_aligned=False",
    ),
    NamedOp(
        "_C::per_token_group_fp8_quant_packed",
        "(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, float eps, "
        "float fp8_min, float fp8_max) -> ()",
        ("q", "scale"),
        quantization={**_CUDA_QUANT, **_POWER_OF_TWO},
        lower="fp8_min",
    ),
    # read: the scale by a reciprocal, the values by a division, and vLLM's own bound for fnuz.
    NamedOp(
        "vllm::triton_per_token_group_quant_fp8",
        "(Tensor x, int group_size) -> (Tensor, Tensor)",
        ("q", "scale"),
        x="x",
        quantization={
            "group": Arg("group_size"),
            "amax_floor": 1e-10,
            "scale_division": "reciprocal",
        },
        dtypes=_LIMITS,
    ),
    *_QUANTS,
)
