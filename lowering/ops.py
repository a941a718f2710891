"""``torch.ops.lowering.*``: the operations this project knows, and what each one computes.

Every operation is functional and has an eager implementation, which is the executable
definition of its contract, and a fake kernel, which gives shapes, dtypes and strides without
computing.  The definitions themselves are the plain functions ``*_reference``: they take a
contract of ``patterns.contracts``, so they can also express contracts that no operation here
defaults to, and they use simple aten operations with free leading dimensions, so that
torch.export can trace them to lower a site that did not fuse.  What an operation returns is
contiguous, whatever strides its arguments have; only scale layouts are otherwise.

Nothing here knows about IR, compilers or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from patterns.contracts import (
    LARGEST_FINITE,
    Division,
    GatedActivation,
    Quantization,
    RmsNorm,
    ScaleEncoding,
    ScaleLayout,
    WeightLayout,
)

from .checks import (
    FLOAT_DTYPES,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    dtype_name,
    dtype_names,
    shape_text,
)
from .routing import grouped_topk as grouped_topk
from .routing import grouped_topk_reference as grouped_topk_reference
from .weight_layouts import check_stored, unshuffle_weight_reference

QUANTIZED_DTYPES = tuple(getattr(torch, name) for name in LARGEST_FINITE)
FP8_DTYPES = tuple(dtype for dtype in QUANTIZED_DTYPES if dtype.is_floating_point)
SCALE_ENCODINGS: tuple[ScaleEncoding, ...] = get_args(ScaleEncoding)
SCALE_LAYOUTS: tuple[ScaleLayout, ...] = get_args(ScaleLayout)
DIVISIONS: tuple[Division, ...] = get_args(Division)
WHOLE_ROW = 0

# What the rows of a column-major scale are padded to a multiple of.
_ROW_MULTIPLE = {"column": 1, "column_tma": 4, "ue8m0_packed": 4}
# Scales in one int32 of ``ue8m0_packed``, one byte each.
_PACK = 4


# --- RMSNorm -----------------------------------------------------------------------------------


def rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, norm: RmsNorm
) -> tuple[Tensor, Tensor | None]:
    """RMSNorm over the last axis, as ``norm`` says, and the residual sum.

    x, residual: [..., H]; weight: [H] or None.  ``residual`` is given exactly when
    ``norm.residual`` is not None.  Returns (y, sum): y is x's dtype (``once``), the promoted
    dtype of x and weight (``twice``) or float32 (``none``); sum is round(x + residual) in x's
    dtype, or None.  The order in which the squares are added is free.

    The factor is weight, or float32(weight) + ``norm.weight_offset``, a float32, where that is not zero.

    Source: torch.nn.RMSNorm and FlashInfer (once), Hugging Face and vLLM CUDA (twice), AITER (none),
    Gemma (weight_offset).
    """
    x32, total = _statistic_input(x, residual, norm)
    # In float64, so that both roundings are to nearest wherever this runs: on the CPU float32 torch.sqrt is
    # off by one unit in the last place for one value in seven, and on CUDA torch.rsqrt is an approximation.
    mean = torch.mean(x32 * x32, dim=-1, keepdim=True) + _float32(norm.eps)
    rstd = torch.reciprocal(torch.sqrt(mean.to(torch.float64)).to(torch.float32))
    y = x32 * rstd
    weight = _offset(weight, norm)
    if norm.rounding == "twice":
        y = y.to(x.dtype)
        return (y if weight is None else y * weight), total
    if weight is not None:
        y = y * weight.to(torch.float32)
    return (y if norm.rounding == "none" else y.to(x.dtype)), total


def _statistic_input(x: Tensor, residual: Tensor | None, norm: RmsNorm) -> tuple[Tensor, Tensor | None]:
    """float32 [..., H] that the norm works on, and round(x + residual) or None."""
    if (residual is None) != (norm.residual is None):
        raise ValueError(f"residual: the contract says {norm.residual!r}")
    x32 = x.to(torch.float32)
    if residual is None:
        return x32, None
    x32 = x32 + residual.to(torch.float32)
    total = x32.to(x.dtype)
    return (x32 if norm.residual == "exact" else total.to(torch.float32)), total


def _offset(weight: Tensor | None, norm: RmsNorm) -> Tensor | None:
    """What the normed row is multiplied by."""
    if norm.weight_offset == 0:
        return weight
    if weight is None:
        raise ValueError(f"weight: the contract adds {norm.weight_offset} to it, and there is none")
    return weight.to(torch.float32) + _float32(norm.weight_offset)


@torch.library.custom_op(
    "lowering::rms_norm", mutates_args=(), schema="(Tensor x, Tensor? weight, float eps) -> Tensor"
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = round(x32 * rstd * float32(weight)), rstd = 1/sqrt(mean(x32^2) + eps); contract ``once``.

    x: [..., H] float32, bfloat16 or float16; weight: [H] of any of these dtypes, or None.
    Returns [..., H] in x's dtype.  Raises ValueError naming the argument that does not fit.
    Source: torch.nn.RMSNorm, FlashInfer.
    """
    _check_norm(x, None, weight)
    return rms_norm_reference(x, None, weight, RmsNorm(eps))[0].contiguous()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    _check_norm(x, None, weight)
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "lowering::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (contract ``once``) of the unrounded x + residual, and the rounded sum.

    x, residual: [..., H], one dtype (float32, bfloat16, float16); weight: [H] of any of these, or None.
    Returns (y, residual'), both [..., H] in x's dtype: the statistic and y use
    float32(x) + float32(residual) unrounded (contract ``exact``), residual' = round(x + residual).
    Raises ValueError naming the argument that does not fit.
    Source: fused_add_rms_norm of FlashInfer and vLLM, without the mutation.
    """
    _check_norm(x, residual, weight)
    y, total = rms_norm_reference(x, residual, weight, RmsNorm(eps, residual="exact"))
    assert total is not None
    return y.contiguous(), total.contiguous()


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _check_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> None:
    check_dtype("x", x, FLOAT_DTYPES)
    check_rank("x", x, 1)
    if residual is not None:
        check_dtype("residual", residual, (x.dtype,))
        check_shape("residual", residual, x.shape)
    if weight is not None:
        check_dtype("weight", weight, FLOAT_DTYPES)
        check_shape("weight", weight, x.shape[-1:])


# --- gated activation --------------------------------------------------------------------------


def gated_activation_reference(gate: Tensor, up: Tensor, gate_activation: GatedActivation) -> Tensor:
    """``act(gate) * up``, as ``gate_activation`` says.

    gate, up: [..., H], already split where the contract is ``packed``.  Returns [..., H] in gate's dtype
    (``once``), the promoted dtype of gate and up (``twice``) or float32 (``none``).

    The activation itself is torch's, in float32.

    Source: silu_and_mul of vLLM, SGLang and FlashInfer (once), Hugging Face MLPs (twice).
    """
    activated = _ACTIVATIONS[gate_activation.activation](gate.to(torch.float32))
    if gate_activation.rounding == "twice":
        return activated.to(gate.dtype) * up
    y = activated * up.to(torch.float32)
    return y if gate_activation.rounding == "none" else y.to(gate.dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of [..., 2H]: gate, then up, each [..., H]."""
    half = gate_up.shape[-1] // 2
    return gate_up[..., :half], gate_up[..., half:]


@torch.library.custom_op("lowering::silu_mul", mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def silu_mul(gate_up: Tensor) -> Tensor:
    """y = round(silu(gate) * up) of rows that hold gate, then up; contract ``once``.

    gate_up: [..., 2H] float32, bfloat16 or float16.  Returns [..., H] in its dtype; g / (1 + exp(-g)) and the
    product are float32, rounded once.  Raises ValueError naming the argument if it does not fit.
    Source: silu_and_mul of vLLM, SGLang and FlashInfer.
    """
    _check_gate_up(gate_up)
    return gated_activation_reference(*split_gate_up(gate_up), GatedActivation("silu")).contiguous()


@silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    _check_gate_up(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _check_gate_up(gate_up: Tensor) -> None:
    check_dtype("gate_up", gate_up, FLOAT_DTYPES)
    check_rank("gate_up", gate_up, 1)
    if gate_up.shape[-1] % 2 != 0:
        raise ValueError(f"gate_up: the last axis, {gate_up.shape[-1]}, has no two halves")


# --- group quantization ------------------------------------------------------------------------


def group_quant_reference(y: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Quantize groups of the last axis, as ``quantization`` says.

    y: [..., K]; K divisible by the group.  Returns q [..., K] in ``quantization.dtype`` and the scale
    with the strides of ``quantization.layout``: float32 [..., Gn], or int32 [..., ceil(Gn/4)] for
    ``ue8m0_packed``.  The conversion rounds to nearest even.

    A group that holds a NaN becomes NaN, scale and values; an int8 of NaN is 0, a packed byte of NaN 255.

    Source: vLLM's per_token_group_quant_fp8 and its fused kernels, AITER, FlashInfer, DeepGEMM.
    """
    q, scale = group_quant_contiguous_reference(y, quantization)
    if quantization.layout == "row":
        return q, scale
    return q, from_physical(to_physical(scale, quantization.layout), y.shape[:-1], quantization.layout)


def group_quant_physical_reference(y: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """``group_quant_reference``, but the scale as it lies in memory: see ``to_physical``.

    This is the form a program returns, since a program's tensors have no strides.
    """
    q, scale = group_quant_contiguous_reference(y, quantization)
    return q, to_physical(scale, quantization.layout)


def group_quant_contiguous_reference(y: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """``group_quant_reference``, but the scale too is contiguous in its logical shape.

    This is what a program computes with where nothing outside it sees the scale.
    """
    hidden, qmax = y.shape[-1], quantization.qmax
    group = hidden if quantization.group is None else quantization.group
    blocks = y.to(torch.float32).unflatten(-1, (quantization.groups(hidden), group))
    scale = _scale(blocks.abs().amax(dim=-1), quantization)
    if quantization.scale == "ue8m0":
        scale = _power_of_two_above(scale)
    q = _convert(_clip(_quotient(blocks, scale.unsqueeze(-1), quantization), qmax), quantization.dtype)
    stored = _pack_exponents(scale) if quantization.layout == "ue8m0_packed" else scale
    return q.flatten(-2).contiguous(), stored.contiguous()


def _scale(amax: Tensor, quantization: Quantization) -> Tensor:
    """float32 scales, before they are rounded to powers of two if they are."""
    amax = _at_least(amax, quantization.amax_floor)
    if quantization.amax_ceiling is not None:
        amax = _at_most(amax, quantization.amax_ceiling)
    if quantization.scale_division == "true":
        # A tensor, not a Python number: CUDA turns division by a number into a product with 1/number.
        scale = amax / torch.full((), quantization.qmax, dtype=torch.float32, device=amax.device)
    else:
        scale = amax * _float32(1 / quantization.qmax)
    return _at_least(scale, quantization.scale_floor) if quantization.scale_floor else scale


def _quotient(blocks: Tensor, scale: Tensor, quantization: Quantization) -> Tensor:
    # By a power of two the two are equal, but 1/2^127 is a subnormal, zero on some devices.
    if quantization.quotient == "true" or quantization.scale == "ue8m0":
        return blocks / scale
    return blocks * torch.reciprocal(scale)


def _power_of_two_above(scale: Tensor) -> Tensor:
    """The least power of two that is not below, its biased exponent kept in [1, 254]; NaN stays NaN.

    From the bits, since log2 of a float is off by one unit here and there, and its ceiling then by one
    power of two.  Source: DeepGEMM's ceil_to_ue8m0.
    """
    bits = scale.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    exponent = (exponent + (mantissa != 0).to(torch.int32)).clamp(1, 254)
    return torch.where(scale.isnan(), scale, (exponent << 23).view(torch.float32))


def _pack_exponents(scale: Tensor) -> Tensor:
    """float32 [..., Gn] to int32 [..., ceil(Gn/4)]: the first exponent in the lowest byte, pad bytes zero."""
    exponent = (scale.view(torch.int32) >> 23) & 0xFF
    groups = exponent.shape[-1]
    words = packed_words(groups)
    padded = torch.nn.functional.pad(exponent, (0, words * _PACK - groups))
    # Not unbind: there is no lowering for what torch.export makes of it.
    first, second, third, fourth = (padded[..., i::_PACK] for i in range(_PACK))
    return first | (second << 8) | (third << 16) | (fourth << 24)


def _convert(values: Tensor, dtype: str) -> Tensor:
    """Values that fit, rounded to nearest even."""
    if dtype == "int8":
        values = torch.where(values.isnan(), 0.0, torch.round(values))
    return values.to(getattr(torch, dtype))


# Bounds that let a NaN through.  Not clamp: IREE's lowering of it takes the bound for a NaN.


def _at_least(x: Tensor, bound: float) -> Tensor:
    bound = _float32(bound)
    return torch.where(x < bound, bound, x)


def _at_most(x: Tensor, bound: float) -> Tensor:
    bound = _float32(bound)
    return torch.where(x > bound, bound, x)


def _clip(x: Tensor, bound: float) -> Tensor:
    return _at_most(_at_least(x, -bound), bound)


def _float32(value: float) -> float:
    """``value`` rounded to float32: compilers that demote a Python scalar do not all round it.

    In plain arithmetic, which torch.compile can follow.  Exact for every float32 that is normal or zero.
    """
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 2**24), exponent - 24)


# How scales lie in memory


def padded_rows(rows: int, layout: str) -> int:
    """The length of a column of scales: M, or Mp = M rounded up to 4."""
    multiple = _ROW_MULTIPLE[layout]
    return (rows + multiple - 1) // multiple * multiple


def packed_words(groups: int) -> int:
    """How many int32 hold the scales of a row in ``ue8m0_packed``."""
    return (groups + _PACK - 1) // _PACK


def to_physical(scale: Tensor, layout: str) -> Tensor:
    """The contiguous tensor that holds the logical ``scale`` [..., S] in ``layout``.

    S is Gn, or ceil(Gn/4) for ``ue8m0_packed``.  ``row``: scale itself.  The others: [S, M], M the product
    of the leading dimensions, or [S, Mp] with columns M to Mp zero.
    Source: DeepGEMM's get_mn_major_tma_aligned_tensor.
    """
    if _check_layout(layout) == "row":
        return scale
    columns = scale.reshape(-1, scale.shape[-1]).t() if scale.dim() > 1 else scale.unsqueeze(-1)
    # Before the padding: where that adds nothing it keeps the strides.
    columns = columns.contiguous()
    rows = columns.shape[1]
    return torch.nn.functional.pad(columns, (0, padded_rows(rows, layout) - rows))


def physical_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of what ``to_physical`` returns for a scale of ``shape``."""
    if _check_layout(layout) == "row":
        return shape
    return shape[-1], padded_rows(math.prod(shape[:-1]), layout)


def from_physical(physical: Tensor, leading: tuple[int, ...] | torch.Size, layout: str) -> Tensor:
    """The logical scale, shape ``leading`` + (S,), as a view of what ``to_physical`` returned."""
    if _check_layout(layout) == "row":
        return physical
    return physical.as_strided(*_column_geometry(tuple(leading), physical.shape[0], layout))


def _column_geometry(
    leading: tuple[int, ...], last: int, layout: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a logical column-major scale; [M, S] has strides (1, M) or (1, Mp)."""
    rows, strides = 1, []
    for size in reversed(leading):
        strides.append(rows)
        rows = rows * size
    return (*leading, last), (*reversed(strides), padded_rows(rows, layout))


# The operation


@torch.library.custom_op(
    "lowering::group_quant",
    mutates_args=(),
    schema=(
        "(Tensor x, int group_size, *, ScalarType dtype=float8_e4m3fn, str scale='float32', "
        "str scale_layout='row', float amax_floor=1e-10, float? amax_ceiling=None, float scale_floor=0.0, "
        "str scale_division='true', str quotient='true', float? limit=None) -> (Tensor, Tensor)"
    ),
)
def group_quant(
    x: Tensor,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: str = "float32",
    scale_layout: str = "row",
    amax_floor: float = 1e-10,
    amax_ceiling: float | None = None,
    scale_floor: float = 0.0,
    scale_division: str = "true",
    quotient: str = "true",
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize every ``group_size`` elements of the last axis with one scale; 0: the whole row.

    x: [..., K] float32, bfloat16 or float16, K divisible by group_size.  By default, per group
    amax = max(max|x|, 1e-10), scale = amax / 448, q = round(clamp(x / scale)): true divisions,
    round to nearest even.  Returns q [..., K] in ``dtype`` and scale float32 [..., Gn], Gn = K/group_size.

    dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8; qmax is its largest finite value, or ``limit``
    where that is given (vLLM has 224 for e4m3fnuz).
    scale ``ue8m0``: scales are powers of two, rounded up.
    scale_layout ``row``: scale is contiguous.  The others are column-major; with the leading dimensions
    flattened to M, ``column`` has strides (1, M), ``column_tma`` (1, Mp), Mp = M rounded up to 4, and
    ``ue8m0_packed`` (for scale ``ue8m0`` in groups) is int32 [..., ceil(Gn/4)] with strides (1, Mp), four
    biased exponents in each, the first in the lowest byte.  Pad rows and bytes are zero.
    amax_floor, amax_ceiling (fp8 only), scale_floor: bounds of amax and of scale = amax / qmax.
    scale_division, quotient: ``true``, or ``reciprocal`` for amax * (1/qmax) and x * (1/scale).

    Raises ValueError naming the argument that does not fit, or that contradicts another.
    Source: vLLM per_token_group_quant_fp8; DeepGEMM for column_tma and ue8m0_packed.
    """
    contract = _quantization(
        x,
        group_size,
        dtype=dtype,
        scale=scale,
        scale_layout=scale_layout,
        amax_floor=amax_floor,
        amax_ceiling=amax_ceiling,
        scale_floor=scale_floor,
        scale_division=scale_division,
        quotient=quotient,
        limit=limit,
    )
    return group_quant_reference(x, contract)


@group_quant.register_fake
def _(x: Tensor, group_size: int, **scheme: Any) -> tuple[Tensor, Tensor]:
    contract = _quantization(x, group_size, **scheme)
    q = x.new_empty(x.shape, dtype=getattr(torch, contract.dtype))
    leading, last = tuple(x.shape[:-1]), contract.groups(x.shape[-1])
    if contract.layout == "row":
        return q, x.new_empty((*leading, last), dtype=torch.float32)
    packed = contract.layout == "ue8m0_packed"
    geometry = _column_geometry(leading, packed_words(last) if packed else last, contract.layout)
    return q, x.new_empty_strided(*geometry, dtype=torch.int32 if packed else torch.float32)


def _quantization(
    x: Tensor,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: str = "float32",
    scale_layout: str = "row",
    **numbers: Any,
) -> Quantization:
    """The contract these arguments ask for, after checking all of them."""
    check_dtype("x", x, FLOAT_DTYPES)
    check_rank("x", x, 1)
    _check_group("x", x, group_size)
    if dtype not in QUANTIZED_DTYPES:
        raise ValueError(
            f"dtype: {dtype_name(dtype)} is not available; choose {dtype_names(QUANTIZED_DTYPES)}"
        )
    check_choice("scale", scale, SCALE_ENCODINGS)
    quantization = Quantization(
        group=None if group_size == WHOLE_ROW else group_size,
        dtype=dtype_name(dtype),
        scale=scale,  # pyright: ignore[reportArgumentType]
        layout=_check_layout(scale_layout),
        **numbers,
    )
    _check_bounds(quantization)
    check_choice("scale_division", quantization.scale_division, DIVISIONS)
    check_choice("quotient", quantization.quotient, DIVISIONS)
    if quantization.layout == "ue8m0_packed":
        if quantization.scale != "ue8m0":
            raise ValueError(f"scale: scale_layout 'ue8m0_packed' holds 'ue8m0' alone, not {scale!r}")
        if quantization.group is None:
            raise ValueError("group_size: scale_layout 'ue8m0_packed' holds groups, not whole rows (0)")
    return quantization


def _check_bounds(quantization: Quantization) -> None:
    """That every number can bound what it is there to bound."""
    for name in ("amax_floor", "scale_floor"):
        value = getattr(quantization, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    floor, ceiling = quantization.amax_floor, quantization.amax_ceiling
    if ceiling is not None:
        if quantization.dtype == "int8":
            raise ValueError("amax_ceiling: bounds fp8 scales alone, and dtype is int8")
        if not (0 < ceiling < math.inf and floor <= ceiling):
            least = f"at least amax_floor, {floor}" if floor else "above 0"
            raise ValueError(f"amax_ceiling: expected a number {least}, got {ceiling}")
    largest = LARGEST_FINITE[quantization.dtype]
    if quantization.limit is not None and not 0 < quantization.limit <= largest:
        raise ValueError(
            f"limit: expected a number above 0, at most the {largest:g} of {quantization.dtype}, "
            f"got {quantization.limit:g}"
        )


# --- block-scaled matrix product ---------------------------------------------------------------


def block_scaled_matmul_reference(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    b_layout: WeightLayout = "row",
) -> Tensor:
    """a . b^T with the scales applied, bias added, one rounding to ``out_dtype`` at the end.

    a: [..., K] fp8, b: [N, K] fp8 in ``b_layout``, a_scale: float32 [..., K/G], b_scale: float32
    [ceil(N/G), K/G], bias: [N] or None.  The accumulation is float32; its order, and whether a scale
    multiplies the factors or a block's partial sum, is free: compare with a tolerance.

    Source: DeepGEMM fp8_gemm_nt, vLLM w8a8_block_fp8_matmul.
    """
    b = unshuffle_weight_reference(b, b_layout)
    groups = a_scale.shape[-1]
    group = a.shape[-1] // groups
    rows = a.to(torch.float32).unflatten(-1, (groups, group)) * a_scale.unsqueeze(-1)
    blocks = b.to(torch.float32).unflatten(-1, (groups, group))
    row_scale = b_scale.unsqueeze(1).expand(-1, group, -1).flatten(0, 1)[: b.shape[0]]
    columns = blocks * row_scale.unsqueeze(-1)
    product = torch.matmul(rows.flatten(-2), columns.flatten(-2).t())
    return (product if bias is None else product + bias.to(torch.float32)).to(out_dtype)


@torch.library.custom_op(
    "lowering::block_scaled_matmul",
    mutates_args=(),
    schema=(
        "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, "
        "Tensor? bias=None, *, str b_layout='row') -> Tensor"
    ),
)
def block_scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    b_layout: str = "row",
) -> Tensor:
    """out[..., n] = sum over groups g of (a_g . b_g[n]) * a_scale[..., g] * b_scale[n // G, g] + bias[n].

    a: [..., K] fp8, b: [N, K] fp8 (a row is an output feature), a_scale: float32 [..., K/G] of any
    strides, b_scale: float32 [ceil(N/G), K/G]; G = K / a_scale.shape[-1].  bias: [N] in ``out_dtype``, or
    None.  b_layout: how the bytes of b lie, as ``shuffle_weight`` returns them; N is then its padded number
    of rows.  A weight is best given in ``row``: the compiler finds the layout for its target.
    Returns [..., N] in ``out_dtype`` (float32, bfloat16, float16), accumulated in float32, the bias added
    there, and rounded once; the order of accumulation is free.
    Raises ValueError naming the argument that does not fit.
    Source: DeepGEMM, vLLM (block-scaled fp8 GEMM, 1xG by GxG).
    """
    _check_block_scaled(a, b, a_scale, b_scale, out_dtype, bias, b_layout)
    layout: Any = b_layout
    return block_scaled_matmul_reference(a, b, a_scale, b_scale, out_dtype, bias, layout)


@block_scaled_matmul.register_fake
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    b_layout: str = "row",
) -> Tensor:
    _check_block_scaled(a, b, a_scale, b_scale, out_dtype, bias, b_layout)
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=out_dtype)


def _check_block_scaled(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
    b_layout: str,
) -> None:
    check_dtype("a", a, FP8_DTYPES)
    check_dtype("b", b, FP8_DTYPES)
    check_dtype("a_scale", a_scale, (torch.float32,))
    check_dtype("b_scale", b_scale, (torch.float32,))
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype: expected {dtype_names(FLOAT_DTYPES)}, got {dtype_name(out_dtype)}")
    check_rank("a", a, 1)
    check_rank("a_scale", a_scale, 1)
    depth = a.shape[-1]
    if b.dim() != 2 or b.shape[1] != depth:
        raise ValueError(f"b: expected shape [N, {depth}], got {shape_text(b)}")
    check_stored("b", b, "b_layout", b_layout)
    groups = a_scale.shape[-1]
    if groups == 0 or depth % groups != 0:
        raise ValueError(f"a_scale: {groups} groups do not divide the last axis of a, {depth}")
    check_shape("a_scale", a_scale, (*a.shape[:-1], groups))
    group = depth // groups
    check_shape("b_scale", b_scale, ((b.shape[0] + group - 1) // group, groups))
    if bias is not None:
        check_dtype("bias", bias, (out_dtype,))
        check_shape("bias", bias, b.shape[:1])


# --- checks ------------------------------------------------------------------------------------


def _check_group(name: str, tensor: Tensor, group: int) -> None:
    if group < 0:
        raise ValueError(f"group_size: expected a positive number, or 0 for the whole row, got {group}")
    last = tensor.shape[-1]
    if group == WHOLE_ROW:
        if last == 0:
            raise ValueError(f"{name}: the last axis is empty")
    elif last == 0 or last % group != 0:
        raise ValueError(f"{name}: group {group} does not divide the last axis, {last}")


def _check_layout(layout: str) -> ScaleLayout:
    check_choice("scale_layout", layout, SCALE_LAYOUTS)
    return layout  # pyright: ignore[reportReturnType]
