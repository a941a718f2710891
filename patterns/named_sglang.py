"""List SGLang's norms, activations and quantizations by name, and FlashInfer's, often the same kernels."""

from __future__ import annotations

from collections.abc import Iterable

from .named_call import Arg, NamedOp, Role
from .named_vllm import cuda_quants, gates_of

_PLAIN = {"eps": Arg("eps"), "rounding": "once"}
_GEMMA = {"eps": Arg("eps"), "rounding": "once", "weight_offset": 1.0}


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


_SGLANG = (
    # Schemas read; the kernels are FlashInfer's.
    *_norms_of("sgl_kernel", "bool enable_pdl=False"),
    *gates_of("sgl_kernel", "once", "Tensor! out, Tensor input"),
    # Schemas read, arithmetic memory: true divisions, as in vLLM, whose kernel it once was; a version of
    # 2025 that was read multiplies by qmax/amax instead, which no contract says.  Older libraries declare
    # the outputs without saying that they are written: torch.export drops such calls before anyone sees them.
    *cuda_quants(
        "sgl_kernel::sgl_per_token_group_quant_fp8",
        "Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
        "float fp8_max, bool scale_ue8m0",
    ),
    *cuda_quants(
        "sgl_kernel::sgl_per_token_group_quant_8bit",
        "Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
        "float fp8_max, bool scale_ue8m0",
    ),
    # Read.  SGLang gives a row of zeros a scale of 0, here it is the least that has an inverse.
    NamedOp(
        "sgl_kernel::sgl_per_token_quant_fp8",
        "(Tensor input, Tensor! output_q, Tensor! output_s) -> ()",
        ("q", "scale"),
        quantization={"group": None, "amax_floor": 1e-35, "quotient": "reciprocal"},
        dtypes={"float8_e4m3fn": {}},
    ),
    NamedOp(
        "sgl_kernel::sgl_per_tensor_quant_fp8",
        "(Tensor input, Tensor! output_q, Tensor output_s, bool is_static) -> ()",
        ("q",),
        given="output_s",
        quantization={"quotient": "reciprocal"},
        dtypes={"float8_e4m3fn": {}},
        requires={"is_static": True},
    ),
    NamedOp(
        "sgl_kernel::sgl_per_token_group_quant_int8",
        "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float int8_min, "
        "float int8_max) -> ()",
        ("q", "scale"),
        quantization={},
        refused="its codes are cut off behind the point, and every contract rounds them; "
        "call torch.ops.lowering.group_quant",
    ),
)

_FLASHINFER = (  # read
    *_norms_of("flashinfer", "bool? enable_pdl=None"),
    *gates_of("flashinfer", "once", "Tensor! out, Tensor input, bool? enable_pdl=None"),
    _flashinfer_quant("rmsnorm", ("q",)),
    _flashinfer_quant("fused_add_rmsnorm", ("q", "sum")),
)

ROWS = (*_SGLANG, *_FLASHINFER)
