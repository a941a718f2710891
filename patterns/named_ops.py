"""List the operations that other libraries have a name for.

A row is a ``NamedOp`` of ``named_call``, which reads the calls.

How sure a row is: "read" means the schema and the arithmetic were read in the library's sources,
"numerics" that the arithmetic follows the numeric contracts this project wrote down, "memory" that
it was not looked up.  Where a library changed its arithmetic, the row says so.
"""

from __future__ import annotations

from collections.abc import Iterable

from .named_call import SCALE_LAYOUT, Arg, NamedOp, RefusedCall, Role
from .named_vllm import VLLM_LIMITS, VLLM_NORM, VLLM_QUANTS

_PLAIN = {"eps": Arg("eps"), "rounding": "once"}
_LAYER_NORM = {**_PLAIN, "statistic": "variance"}
_GEMMA = {"eps": Arg("eps"), "rounding": "once", "weight_offset": 1.0}

_AITER_NORM = {"eps": Arg("variance_epsilon"), "rounding": "once"}
_AITER_UNROUNDED = {"eps": Arg("variance_epsilon"), "rounding": "none"}

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

# AITER: products with reciprocals, for the scale and for the values.
_AITER_QUANT = {
    "group": Arg("group_size"),
    "amax_floor": 1e-10,
    "scale_division": "reciprocal",
    "quotient": "reciprocal",
}


def _norms_of(namespace: str, pdl: str) -> Iterable[NamedOp]:
    """The norms FlashInfer has, under its own name and under SGLang's, which are the same kernels."""
    for prefix, norm in (("", _PLAIN), ("gemma_", _GEMMA)):
        yield NamedOp(
            f"{namespace}::{prefix}rmsnorm",
            f"(Tensor! {'out' if namespace == 'flashinfer' else 'output'}, Tensor input, Tensor weight, "
            f"float eps, {pdl}) -> ()",
            ("y",),
            weight="weight",
            norm=norm,
        )
        yield NamedOp(
            f"{namespace}::{prefix}fused_add_rmsnorm",
            f"(Tensor! input, Tensor! residual, Tensor weight, float eps, {pdl}) -> ()",
            ("y", "sum"),
            weight="weight",
            residual="residual",
            norm={**norm, "residual": "exact"},
        )


def _gates_of(namespace: str, rounding: str, arguments: str) -> Iterable[NamedOp]:
    """act(first half) * second half, as every library spells it."""
    for prefix, activation in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_tanh")):
        yield NamedOp(
            f"{namespace}::{prefix}_and_mul",
            f"({arguments}) -> ()",
            ("y",),
            gate={"activation": activation, "rounding": rounding},
        )


def _flashinfer_quant(name: str, results: tuple[Role, ...]) -> NamedOp:
    """A norm that is quantized by a given scale, after the residual add where ``results`` have the sum."""
    residual = "residual" if "sum" in results else None
    return NamedOp(
        f"flashinfer::{name}_quant",
        f"(Tensor! out, Tensor input, {'Tensor! residual, ' if residual else ''}Tensor weight, Tensor scale, "
        "float eps=1e-06, bool? enable_pdl=None) -> ()",
        results,
        weight="weight",
        residual=residual,
        given="scale",
        norm={"eps": Arg("eps"), "rounding": "none", "residual": "exact" if residual else None},
        quantization={"quotient": "reciprocal"},
        dtypes={"float8_e4m3fn": {}},
        is_declared=False,
    )


def _cuda_quants(name: str, arguments: str) -> Iterable[NamedOp]:
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


def _aiter_add_quants(orders: Iterable[tuple[Role, ...]]) -> Iterable[NamedOp]:
    """vLLM has returned these three in two orders; the types tell which."""
    for results in orders:
        yield NamedOp(
            "vllm::rocm_aiter_rmsnorm_with_add_fp8_group_quant",
            "(Tensor x, Tensor residual, Tensor weight, float variance_epsilon, int group_size)"
            " -> (Tensor, Tensor, Tensor)",
            results,
            x="x",
            weight="weight",
            residual="residual",
            norm={**_AITER_UNROUNDED, "residual": "exact"},
            quantization=_AITER_QUANT,
        )


_OURS = (  # read: they are this project's own, and PyTorch's
    NamedOp(
        "lowering::rms_norm",
        "(Tensor x, Tensor? weight, float eps) -> Tensor",
        ("y",),
        x="x",
        weight="weight",
        norm=_PLAIN,
    ),
    NamedOp(
        "lowering::add_rms_norm",
        "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
        ("y", "sum"),
        x="x",
        weight="weight",
        residual="residual",
        norm={**_PLAIN, "residual": "exact"},
    ),
    NamedOp(
        "aten::rms_norm",
        "(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
        ("y",),
        weight="weight",
        norm=_PLAIN,
        shape="normalized_shape",
    ),
    NamedOp(
        "aten::native_layer_norm",
        "(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        ("y", "mean", "rstd"),
        weight="weight",
        bias="bias",
        norm=_LAYER_NORM,
        shape="normalized_shape",
    ),
    NamedOp(
        "aten::layer_norm",
        "(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
        "bool cudnn_enable=True) -> Tensor",
        ("y",),
        weight="weight",
        bias="bias",
        norm=_LAYER_NORM,
        shape="normalized_shape",
    ),
    NamedOp(
        "lowering::silu_mul",
        "(Tensor gate_up) -> Tensor",
        ("y",),
        x="gate_up",
        gate={"activation": "silu", "rounding": "once"},
    ),
    NamedOp(
        "lowering::group_quant",
        "(Tensor x, int group_size, *, ScalarType dtype=float8_e4m3fn, str scale='float32', "
        "str scale_layout='row', float amax_floor=1e-10, float? amax_ceiling=None, float scale_floor=0.0, "
        "str scale_division='true', str quotient='true', float? limit=None, bool infinite=False, "
        "str inverse='true') -> (Tensor, Tensor)",
        ("q", "scale"),
        x="x",
        quantization={
            "group": Arg("group_size"),
            "layout": Arg("scale_layout"),
            **{
                name: Arg(name)
                for name in (
                    "scale",
                    "amax_floor",
                    "amax_ceiling",
                    "scale_floor",
                    "scale_division",
                    "quotient",
                    "limit",
                    "infinite",
                    "inverse",
                )
            },
        },
    ),
    NamedOp(
        "lowering::static_quant",
        "(Tensor x, Tensor scale, *, ScalarType dtype=float8_e4m3fn, str quotient='true', "
        "float? limit=None, float? lowest=None) -> Tensor",
        ("q",),
        x="x",
        given="scale",
        quantization={name: Arg(name) for name in ("quotient", "limit", "lowest")},
    ),
)

_VLLM = (
    # read: the native definitions, whose casts follow the weight's dtype.
    NamedOp(
        "vllm_ir::rms_norm",
        "(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
        ("y",),
        x="x",
        weight="weight",
        norm=VLLM_NORM,
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
        norm={**VLLM_NORM, "residual": "exact"},
        requires={"variance_size": None},
    ),
    # Schemas read, arithmetic numerics: the kernels of 2025 round twice, those of 2026 once, and in
    # both the sum of fused_add_rms_norm is rounded before the statistic where numerics has it exact.
    NamedOp(
        "_C::rms_norm",
        "(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
        ("y",),
        weight="weight",
        norm=VLLM_NORM,
    ),
    NamedOp(
        "_C::fused_add_rms_norm",
        "(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
        ("y", "sum"),
        weight="weight",
        residual="residual",
        norm={**VLLM_NORM, "residual": "exact"},
    ),
    # read: the activation is rounded to the element type before the product.
    *_gates_of("_C", "twice", "Tensor! result, Tensor input"),
    # read
    *_cuda_quants(
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
        dtypes=VLLM_LIMITS,
    ),
    *VLLM_QUANTS,
)

_AITER = (
    # Schemas read, arithmetic numerics.
    NamedOp(
        "vllm::rocm_aiter_group_fp8_quant",
        "(Tensor x, int group_size) -> (Tensor, Tensor)",
        ("q", "scale"),
        x="x",
        quantization=_AITER_QUANT,
    ),
    NamedOp(
        "vllm::rocm_aiter_rmsnorm_fp8_group_quant",
        "(Tensor x, Tensor weight, float variance_epsilon, int group_size) -> (Tensor, Tensor)",
        ("q", "scale"),
        x="x",
        weight="weight",
        norm=_AITER_UNROUNDED,
        quantization=_AITER_QUANT,
    ),
    *_aiter_add_quants((("q", "sum", "scale"), ("q", "scale", "sum"))),
    # Schemas read, arithmetic memory.
    NamedOp(
        "vllm::rocm_aiter_rms_norm",
        "(Tensor x, Tensor weight, float variance_epsilon) -> Tensor",
        ("y",),
        x="x",
        weight="weight",
        norm=_AITER_NORM,
    ),
    NamedOp(
        "vllm::rocm_aiter_rmsnorm2d_fwd_with_add",
        "(Tensor x, Tensor residual, Tensor weight, float variance_epsilon) -> (Tensor, Tensor)",
        ("y", "sum"),
        x="x",
        weight="weight",
        residual="residual",
        norm={**_AITER_NORM, "residual": "exact"},
    ),
    NamedOp(
        "vllm::rocm_aiter_act_mul_and_fp8_group_quant",
        "(Tensor x, int group_size) -> (Tensor, Tensor)",
        ("q", "scale"),
        x="x",
        gate={"activation": "silu", "rounding": "none"},
        quantization=_AITER_QUANT,
    ),
)

_SGLANG = (
    # Schemas read; the kernels are FlashInfer's.
    *_norms_of("sgl_kernel", "bool enable_pdl=False"),
    *_gates_of("sgl_kernel", "once", "Tensor! out, Tensor input"),
    # Schemas read, arithmetic memory: true divisions, as in vLLM, whose kernel it once was; a version of
    # 2025 that was read multiplies by qmax/amax instead, which no contract says.  Older libraries declare
    # the outputs without saying that they are written: torch.export drops such calls before anyone sees them.
    *_cuda_quants(
        "sgl_kernel::sgl_per_token_group_quant_fp8",
        "Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
        "float fp8_max, bool scale_ue8m0",
    ),
    *_cuda_quants(
        "sgl_kernel::sgl_per_token_group_quant_8bit",
        "Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
        "float fp8_max, bool scale_ue8m0",
    ),
)

_FLASHINFER = (  # read
    *_norms_of("flashinfer", "bool? enable_pdl=None"),
    *_gates_of("flashinfer", "once", "Tensor! out, Tensor input, bool? enable_pdl=None"),
    _flashinfer_quant("rmsnorm", ("q",)),
    _flashinfer_quant("fused_add_rmsnorm", ("q", "sum")),
)

NAMED_OPS: tuple[NamedOp, ...] = (*_OURS, *_VLLM, *_AITER, *_SGLANG, *_FLASHINFER)

RECOGNISERS = NAMED_OPS


SUSPICIONS = (RefusedCall(NAMED_OPS),)
