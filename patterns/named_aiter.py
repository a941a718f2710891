"""List AITER's norms, activations and quantizations by name, its own and those that vLLM gives them."""

from __future__ import annotations

from collections.abc import Iterable

from .named_call import Arg, Fields, NamedOp, Role

_AITER_NORM = {"eps": Arg("variance_epsilon"), "rounding": "once"}
_AITER_UNROUNDED = {"eps": Arg("variance_epsilon"), "rounding": "none"}
# Products with reciprocals, for the scale and for the values.
_AITER_QUANT = {
    "group": Arg("group_size"),
    "amax_floor": 1e-10,
    "scale_division": "reciprocal",
    "quotient": "reciprocal",
}


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


# AITER's own operations: what the names beside these come to.
_PLAIN = {"eps": Arg("epsilon"), "rounding": "once"}
_GEMMA = {**_PLAIN, "weight_offset": 1.0}
_FP8 = {"float8_e4m3fn": {}, "float8_e4m3fnuz": {}}
_NOT_T5 = {"use_model_sensitive_rmsnorm": 0}
_SMOOTHED = (
    "it multiplies columns by smoothing scales before it quantizes, which no contract does; fold them "
)
_SMOOTHED += "into the norm's weight and call the dynamicquant of the same name"


def _norm(name: str, written: str, arguments: str, requires: Fields) -> Iterable[NamedOp]:
    """A norm, with the residual add before it where ``written`` has a residual_out; of Gemma's weight too."""
    added = "residual_out" in written
    for gemma, norm in ((False, _PLAIN), (True, _GEMMA)):
        if "gemma_norm" in arguments or not gemma:
            yield NamedOp(
                f"aiter::{name}",
                f"({written}, Tensor weight, float epsilon{arguments}) -> ()",
                ("y", "sum") if added else ("y",),
                weight="weight",
                residual="residual_in" if added else None,
                norm={**norm, "residual": "exact" if added else None},
                requires={**requires, **({"gemma_norm": gemma} if "gemma_norm" in arguments else {})},
            )


def _norm_quant(name: str, scale: str, arguments: str, requires: Fields) -> NamedOp:
    """A norm that goes on unrounded into a quantization of groups or rows, perhaps after an add."""
    added = "add" in name
    residual = "Tensor residual_in, Tensor! residual_out, " if added else ""
    return NamedOp(
        f"aiter::{name}",
        f"(Tensor! out, Tensor input, {residual}Tensor! {scale}, Tensor weight, float epsilon, "
        f"{arguments}) -> ()",
        ("q", "sum", "scale") if added else ("q", "scale"),
        weight="weight",
        residual="residual_in" if added else None,
        norm={"eps": Arg("epsilon"), "rounding": "none", "residual": "exact" if added else None},
        quantization=_AITER_QUANT,
        dtypes=_FP8,
        requires={"shuffle_scale": False, **requires},
    )


def _smoothed(name: str, residual: str) -> NamedOp:
    return NamedOp(
        f"aiter::{name}",
        f"(Tensor! out, Tensor input, {residual}Tensor xscale, Tensor! yscale, Tensor weight, float epsilon, "
        "int use_model_sensitive_rmsnorm=0) -> ()",
        ("q", "sum", "scale") if residual else ("q", "scale"),
        norm={},
        quantization={},
        refused=_SMOOTHED,
    )


def _own() -> Iterable[NamedOp]:
    """AITER's: read; its kernels take the machine's approximate reciprocal of a scale."""
    for name in ("rms_norm", "rmsnorm2d_fwd"):
        yield NamedOp(
            f"aiter::{name}",
            "(Tensor input, Tensor weight, float epsilon, int use_model_sensitive_rmsnorm=0) -> Tensor",
            ("y",),
            weight="weight",
            norm=_PLAIN,
            requires=_NOT_T5,
        )
    added = "Tensor! out, Tensor input, Tensor residual_in, Tensor! residual_out"
    yield from _norm("rms_norm_cu", "Tensor! out, Tensor input", "", {})
    yield from _norm("rmsnorm", "Tensor! out, Tensor input", ", bool gemma_norm=False", {})
    yield from _norm("add_rmsnorm", added, ", bool gemma_norm=False", {})
    yield from _norm(
        "rmsnorm2d_fwd_with_add",
        added,
        ", bool gemma_norm=False, int use_model_sensitive_rmsnorm=0",
        _NOT_T5,
    )
    groups = "int group_size=0, bool shuffle_scale=False"
    for prefix in ("", "add_"):
        plain = {"gemma_norm": False}
        yield _norm_quant(f"{prefix}rmsnorm_quant", "scale", f"{groups}, bool gemma_norm=False", plain)
        with_ = f"rmsnorm2d_fwd_with_{prefix}"
        sensitive = f"int use_model_sensitive_rmsnorm=0, {groups}"
        yield _norm_quant(f"{with_}dynamicquant", "yscale", sensitive, _NOT_T5)
        yield _smoothed(f"{with_}smoothquant", "Tensor residual_in, Tensor! residual_out, " if prefix else "")


ROWS = (
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
    *_own(),
)
