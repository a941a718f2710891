"""The operations' references against independent arithmetic, their fakes, and their errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.library import opcheck

from lowering import ops
from patterns.contracts import GatedActivation, Norm, Quantization, ScaleLayout

LOW = torch.ops.lowering
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(5, 256), (2, 3, 256), (256,), (0, 256), (2, 0, 256), (1, 256)]


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- RMSNorm -----------------------------------------------------------------------------------


def norm_by_numpy(x, residual, weight, norm):
    """float32 arithmetic, one operation at a time; the mean in float64 does not depend on its order."""
    x32 = x.float().numpy()
    total = None
    if residual is not None:
        x32 = x32 + residual.float().numpy()
        total = torch.from_numpy(x32).to(x.dtype)
        x32 = x32 if norm.residual == "exact" else total.float().numpy()
    mean = np.mean(x32.astype(np.float64) ** 2, axis=-1, keepdims=True).astype(np.float32)
    y = x32 * (np.float32(1) / np.sqrt(mean + np.float32(norm.eps)))
    factor = weight.float().numpy() + np.float32(norm.weight_offset)
    if norm.rounding == "twice":
        y = torch.from_numpy(y).to(x.dtype).float().numpy()
        factor_dtype = torch.float32 if norm.weight_offset else weight.dtype
        return torch.from_numpy(y * factor).to(torch.promote_types(x.dtype, factor_dtype)), total
    y = torch.from_numpy(y * factor)
    return (y.to(x.dtype) if norm.rounding == "once" else y), total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["once", "twice", "none"])
@pytest.mark.parametrize("residual", [None, "exact", "rounded"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_every_norm_contract(dtype, weight_dtype, rounding, residual, offset):
    norm = Norm(1e-5, rounding, residual, offset)
    x, weight = rand(7, 320, dtype=dtype), rand(320, dtype=weight_dtype, seed=1)
    r = None if residual is None else rand(7, 320, dtype=dtype, seed=2)
    y, total = ops.norm_reference(x, r, weight, norm)
    expected, expected_total = norm_by_numpy(x, r, weight, norm)
    assert y.dtype == expected.dtype
    # The sum's order may move rstd by an ulp or two, and a rounding of y with it.
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(y.dtype).eps + 1e-6, atol=0)
    assert (total is None) == (residual is None)
    assert total is None or torch.equal(total, expected_total)


def test_twice_is_what_hugging_face_computes():
    x, weight = rand(9, 512), rand(512, seed=1)
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    y, _ = ops.norm_reference(x, None, weight, Norm(1e-6, "twice"))
    assert torch.equal(y, weight * hidden.to(x.dtype))


def test_weight_offset_is_what_gemma_computes():
    x, weight = rand(9, 512), rand(512, seed=1)
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    y, _ = ops.norm_reference(x, None, weight, Norm(1e-6, weight_offset=1.0))
    assert torch.equal(y, (hidden * (1.0 + weight.float())).type_as(x))
    with pytest.raises(ValueError, match=r"weight: the contract adds 1\.0 to it, and there is none"):
        ops.norm_reference(x, None, None, Norm(1e-6, weight_offset=1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_torch_nn_rmsnorm(dtype):
    x, weight = rand(3, 5, 192, dtype=dtype), rand(192, dtype=dtype, seed=1)
    expected = torch.nn.functional.rms_norm(x, (192,), weight, 1e-6)
    tolerance = torch.finfo(dtype).eps * 2 + 1e-6
    torch.testing.assert_close(LOW.rms_norm(x, weight, 1e-6), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        LOW.rms_norm(x, None, 1e-6),
        torch.nn.functional.rms_norm(x, (192,), None, 1e-6),
        rtol=tolerance,
        atol=0,
    )


def test_add_rms_norm_uses_the_unrounded_sum():
    x, residual, weight = rand(64, 256), rand(64, 256, seed=1) * 100, rand(256, seed=2)
    y, total = LOW.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    unrounded = LOW.rms_norm(x.float() + residual.float(), weight, 1e-6)
    assert torch.equal(y, unrounded.to(x.dtype))
    assert not torch.equal(y, LOW.rms_norm(total, weight, 1e-6))


# --- gated activation --------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": lambda g: g / (1 + math.exp(-g)),
    "gelu": lambda g: g * (1 + math.erf(g / math.sqrt(2))) / 2,
    "gelu_tanh": lambda g: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rounding", ["once", "twice", "none"])
def test_every_gate_contract(dtype, activation, rounding):
    gate, up = rand(5, 192, dtype=dtype) * 4, rand(5, 192, dtype=dtype, seed=1)
    y = ops.gated_activation_reference(gate, up, GatedActivation(activation, rounding))
    exact = torch.tensor([ACTIVATIONS[activation](g) for g in gate.flatten().tolist()])
    expected = exact.view(gate.shape).double()
    expected = (expected.to(dtype) if rounding == "twice" else expected).double() * up.double()
    assert y.dtype == (torch.float32 if rounding == "none" else dtype)
    # gelu cancels where the gate is negative, and is then off by units of 1, not of the result.
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(y.dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_is_an_eager_product(dtype):
    gate, up = rand(64, 192, dtype=dtype) * 4, rand(64, 192, dtype=dtype, seed=1)
    y = ops.gated_activation_reference(gate, up, GatedActivation("silu", "twice", packed=False))
    assert torch.equal(y, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 64), (6,), (0, 8), (3, 0)])
def test_silu_mul(dtype, shape):
    gate_up = rand(*shape, dtype=dtype) * 4
    half = shape[-1] // 2
    gate, up = gate_up[..., :half].float(), gate_up[..., half:].float()
    y = LOW.silu_mul(gate_up)
    assert torch.equal(y, (torch.nn.functional.silu(gate) * up).to(dtype))
    assert y.shape == (*shape[:-1], half)


# --- group quantization ------------------------------------------------------------------------

NUMPY_DTYPES: dict[str, Any] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
SCHEMES = [
    Quantization(128),
    Quantization(64, "float8_e4m3fnuz"),
    Quantization(32, "float8_e5m2", quotient="reciprocal"),
    Quantization(64, "int8", amax_floor=0.0, scale_floor=2.0**-23),
    Quantization(None),
    Quantization(None, "int8", scale_division="reciprocal", quotient="reciprocal"),
    Quantization(128, "float8_e4m3fnuz", limit=224.0, amax_floor=0.0, scale_floor=1 / (224 * 512)),
    Quantization(128, amax_floor=1e-4),
    Quantization(64, scale_division="reciprocal"),
    Quantization(None, amax_ceiling=2.0, amax_floor=1e-4),
    Quantization(32, amax_floor=0.0),
    Quantization(128, scale="ue8m0"),
    Quantization(32, "float8_e5m2", scale="ue8m0", quotient="reciprocal"),
    Quantization(None, "int8", scale="ue8m0", scale_floor=1e-3),
    Quantization(64, "int8", scale="ue8m0", limit=1.0, amax_floor=0.0),
    Quantization(32, scale="ue8m0", amax_floor=0.0, amax_ceiling=100.0, scale_division="reciprocal"),
    Quantization(32, scale="ue8m0", infinite=True),
    Quantization(None, "int8", amax_floor=0.0, quotient="inverse"),
    Quantization(64, quotient="inverse", inverse="reciprocal", scale_division="inverse"),
]


def arguments(quantization: Quantization) -> dict[str, Any]:
    """What ``torch.ops.lowering.group_quant`` is called with for a scheme."""
    fields = dict(vars(quantization), scale_layout=quantization.layout)
    for name in ("layout", "group", "static", "lowest"):
        del fields[name]
    fields["dtype"] = getattr(torch, quantization.dtype)
    return {"group_size": quantization.group or 0, **fields}


def quant_by_numpy(x: torch.Tensor, scheme: Quantization) -> tuple[np.ndarray, np.ndarray]:
    """(q as bytes, row-major scale), one float32 operation at a time."""
    f32 = np.float32
    group = scheme.group or x.shape[-1]
    blocks = x.float().numpy().reshape(*x.shape[:-1], -1, group)
    qmax = f32(scheme.qmax)
    with np.errstate(all="ignore"):
        amax = np.maximum(np.abs(blocks).max(-1), f32(scheme.amax_floor))
        if scheme.amax_ceiling is not None:
            amax = np.minimum(amax, f32(scheme.amax_ceiling))
        inverse = qmax / amax if scheme.inverse == "true" else f32(1) / amax * qmax
        scales = {"true": amax / qmax, "reciprocal": amax * f32(1 / scheme.qmax), "inverse": f32(1) / inverse}
        scale = scales[scheme.scale_division]
        scale = np.maximum(scale, f32(scheme.scale_floor))
        if scheme.scale == "ue8m0":
            scale = np.where(np.isnan(scale), scale, np.ldexp(f32(1), exponents(scale) - 127))
            if scheme.infinite:
                scale = np.where(np.isinf(amax), amax, scale)
        divisor = scale[..., None]
        factor = inverse[..., None] if scheme.quotient == "inverse" else f32(1) / divisor
        values = blocks / divisor if scheme.quotient == "true" else blocks * factor
        values = np.clip(values, -qmax, qmax)
        if scheme.dtype == "int8":
            q = np.rint(np.nan_to_num(values)).astype(np.int8)
        else:
            q = values.astype(NUMPY_DTYPES[scheme.dtype])
    return q.view(np.uint8).reshape(x.shape), scale


def exponents(scale: np.ndarray) -> np.ndarray:
    """Biased exponents of the powers of two that are not below; 254 for infinity, 255 for NaN."""
    mantissa, exponent = np.frexp(scale)  # the mantissa is in [1/2, 1)
    biased = np.where(mantissa == 0.5, exponent - 1, exponent) + 127
    biased = np.where(scale == 0, 1, np.where(np.isinf(scale), 254, np.clip(biased, 1, 254)))
    return np.where(np.isnan(scale), 255, biased)


def strange_values(dtype: torch.dtype) -> torch.Tensor:
    """[40, 256]: every magnitude, and rows with zeros, NaN, infinities, subnormals and rounding ties."""
    largest = math.log10(torch.finfo(dtype).max) - 1
    x = rand(40, 256, dtype=torch.float32) * torch.logspace(-largest, largest, 40).unsqueeze(1)
    x = x.to(dtype)
    x[3] = 0
    x[4] = -0.0
    x[5, 0], x[6, 100], x[7, 255] = float("nan"), float("inf"), -float("inf")
    x[8] = torch.finfo(dtype).smallest_normal / 4
    x[9] = torch.finfo(dtype).max
    for row, qmax in enumerate((448, 240, 57344, 127), start=10):
        x[row] = torch.arange(256) / 8 * (-1 if row % 2 else 1)
        x[row, ::32] = min(qmax, largest)
    return x


def assert_same_quants(q: torch.Tensor, expected: np.ndarray) -> None:
    """Equal bytes; a NaN has several in e5m2."""
    values = torch.from_numpy(expected).view(q.dtype).float()
    same = (q.view(torch.uint8) == torch.from_numpy(expected)) | (q.float().isnan() & values.isnan())
    assert same.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_bit_for_bit(dtype, scheme):
    x = strange_values(dtype)
    q, scale = LOW.group_quant(x, **arguments(scheme))
    expected_q, expected_scale = quant_by_numpy(x, scheme)
    assert q.dtype == getattr(torch, scheme.dtype) and scale.dtype == torch.float32
    assert np.array_equal(scale.numpy(), expected_scale, equal_nan=True)
    assert_same_quants(q, expected_q)


def test_defaults_are_a_public_contract():
    """The recognisers read the arguments in this order."""
    declared = LOW.group_quant.default._schema.arguments
    assert [(argument.name, argument.default_value) for argument in declared if argument.name != "dtype"] == [
        ("x", None), ("group_size", None), ("scale", "float32"), ("scale_layout", "row"),
        ("amax_floor", 1e-10), ("amax_ceiling", None), ("scale_floor", 0.0), ("scale_division", "true"),
        ("quotient", "true"), ("limit", None), ("infinite", False), ("inverse", "true"),
    ]  # fmt: skip
    assert declared[2].name == "dtype" and [a.kwarg_only for a in declared] == [False] * 2 + [True] * 11
    x = strange_values(torch.bfloat16)
    for got, expected in zip(
        LOW.group_quant(x, 64), LOW.group_quant(x, **arguments(Quantization(64))), strict=True
    ):
        assert torch.equal(got.float().nan_to_num(9), expected.float().nan_to_num(9))


@pytest.mark.parametrize("layout", ["column", "column_tma"])
@pytest.mark.parametrize("shape", SHAPES)
def test_column_scales_are_row_scales_with_other_strides(shape, layout):
    x = rand(*shape)
    q, row = LOW.group_quant(x, 64)
    column_q, column = LOW.group_quant(x, 64, scale_layout=layout)
    assert torch.equal(q.view(torch.uint8), column_q.view(torch.uint8))
    assert torch.equal(row, column)
    rows = row.numel() // 4
    padded = -(-rows // 4) * 4 if layout == "column_tma" else rows
    assert column.stride(-1) == padded
    storage = column.untyped_storage()
    assert storage.nbytes() == 4 * padded * 4
    physical = torch.empty(0).set_(storage, 0, (4, padded))  # pyright: ignore
    assert torch.equal(physical[:, :rows], row.reshape(rows, 4).t())
    assert not physical[:, rows:].any()
    if len(shape) == 2:
        assert column.stride() == (1, padded)


@pytest.mark.parametrize("layout", ["row", "column", "column_tma"])
@pytest.mark.parametrize("rows", range(1, 10))
def test_physical_and_logical_scales_convert(rows, layout: ScaleLayout):
    x, scheme = rand(2, rows, 256), Quantization(64)
    _, row = ops.group_quant_reference(x, scheme)
    physical = ops.to_physical(row, layout)
    assert physical.is_contiguous()
    logical = ops.from_physical(physical, (2, rows), layout)
    assert torch.equal(logical, row) and logical.data_ptr() == physical.data_ptr()
    _, direct = ops.group_quant_physical_reference(x, replace(scheme, layout=layout))
    assert torch.equal(direct, physical)
    if layout == "row":
        assert physical is row and logical is row
    else:
        assert physical.shape == (4, 2 * rows if layout == "column" else -(-2 * rows // 4) * 4)


# UE8M0


def test_ue8m0_scales_are_the_next_power_of_two():
    amax = torch.tensor([448.0, 448.0 * (1 + 2**-23), 447.0, 1.0, 2.0**-40, 3e38, 0.0])
    _, scale = LOW.group_quant(amax.unsqueeze(1).expand(7, 32).contiguous(), 32, scale="ue8m0")
    floor = 2.0 ** math.ceil(math.log2(1e-10 / 448))
    assert scale.flatten().tolist() == [1, 2, 1, 2**-8, max(2.0**-48, floor), 2.0**120, floor]


def test_ue8m0_is_exact_where_log2_is_not():
    """One unit above each power of two the ceiling is the next one; log2 in float32 does not see it."""
    powers = torch.exp2(torch.arange(-20.0, 20.0))
    above = (powers.view(torch.int32) + 1).view(torch.float32)
    for scales, factor in ((powers, 1), (above, 2)):
        x = scales.unsqueeze(1).expand(40, 32).contiguous()
        _, scale = LOW.group_quant(x, 32, scale="ue8m0", limit=1.0)
        assert torch.equal(scale.flatten(), powers * factor)
    assert not torch.equal(torch.exp2(torch.ceil(torch.log2(above))), powers * 2)


def packed_bytes(scale: np.ndarray) -> np.ndarray:
    """DeepGEMM's buffer for float32 scales [M, Gn], byte by byte."""
    rows, groups = scale.shape
    padded = -(-rows // 4) * 4
    buffer = np.zeros(-(-groups // 4) * padded * 4, dtype=np.uint8)
    for m, exponent_row in enumerate(exponents(scale)):
        for g, exponent in enumerate(exponent_row):
            buffer[((g // 4) * padded + m) * 4 + g % 4] = exponent
    return buffer


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7, 8, 56])
def test_packed_scales_byte_by_byte(rows, groups):
    x = rand(rows, groups * 32, dtype=torch.float32, seed=rows) * torch.logspace(-30, 30, groups * 32)
    x[0, :32], x[-1, -1], x[rows // 2, 0], x[rows // 3, -2] = 0, float("inf"), 1e-42, float("nan")
    scheme = Quantization(32, scale="ue8m0", layout="ue8m0_packed", amax_floor=0.0)
    q, packed = LOW.group_quant(x, **arguments(scheme))
    row_q, row = LOW.group_quant(x, **arguments(replace(scheme, layout="row")))
    words, padded = -(-groups // 4), -(-rows // 4) * 4
    assert packed.dtype == torch.int32 and packed.shape == (rows, words) and packed.stride() == (1, padded)
    expected = torch.from_numpy(packed_bytes(quant_by_numpy(x, replace(scheme, scale="float32"))[1]))
    storage = torch.empty(0, dtype=torch.uint8).set_(packed.untyped_storage())  # pyright: ignore
    assert torch.equal(storage, expected)
    assert_same_quants(q, row_q.view(torch.uint8).numpy())
    # The bytes are the exponents of the scales in the row layout.
    unpacked = torch.stack([packed >> shift & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(1)
    assert np.array_equal(unpacked[:, :groups].numpy(), exponents(row.numpy()))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_scales_with_leading_dims(shape):
    x = rand(*shape)
    scheme = Quantization(32, scale="ue8m0", layout="ue8m0_packed")
    _, packed = LOW.group_quant(x, **arguments(scheme))
    _, flat = LOW.group_quant(x.reshape(-1, 256), **arguments(scheme))
    assert packed.shape == (*shape[:-1], 2)
    assert torch.equal(packed.reshape(-1, 2), flat)
    physical = ops.group_quant_physical_reference(x, scheme)[1]
    assert physical.shape == (2, packed.stride(-1)) and physical.is_contiguous()
    assert torch.equal(ops.from_physical(physical, shape[:-1], "ue8m0_packed"), packed)
    contiguous = ops.group_quant_contiguous_reference(x, scheme)[1]
    assert contiguous.is_contiguous() and torch.equal(ops.to_physical(contiguous, "ue8m0_packed"), physical)


def test_not_a_number():
    """The scale and a float q become NaN; an int8 is 0, a packed exponent 255, as in e8m0."""
    x = torch.ones(1, 256)
    x[0, 40] = float("nan")
    for scale in ("float32", "ue8m0"):
        q, scales = LOW.group_quant(x, 32, scale=scale, amax_ceiling=3.0)
        assert scales.isnan().tolist() == [[False, True, *[False] * 6]]
        assert q.float().isnan().nonzero()[:, 1].tolist() == list(range(32, 64))
        q, _ = LOW.group_quant(x, 32, scale=scale, dtype=torch.int8)
        assert not q[0, 32:64].any() and q[0, :32].all()
    _, packed = LOW.group_quant(x, 32, scale="ue8m0", scale_layout="ue8m0_packed")
    assert (packed[0, 0] >> 8) & 0xFF == 255


class Lowered(torch.nn.Module):
    """The references, as a site without a kernel is lowered."""

    schemes = (*SCHEMES, Quantization(16, scale="ue8m0", layout="ue8m0_packed"))

    def forward(self, x):
        results = []
        for scheme in self.schemes:
            results += ops.group_quant_contiguous_reference(x, scheme)
            results.append(ops.to_physical(results[-1], "column_tma"))
        results.append(ops.to_physical(results[1], "column"))
        return tuple(results)


def test_references_keep_their_bits_when_they_are_lowered():
    from lowering import load
    from lowering.compiler import compile

    def values(*leading):
        # Whole numbers: IREE's code for a cpu flushes subnormals to zero, fp8 ones among them.
        x = torch.randint(-448, 449, (*leading, 256), generator=torch.Generator().manual_seed(1)).float()
        x[0, 0], x[0, 1, 5], x[-1, -1, 7] = 0, float("nan"), float("inf")
        return x.bfloat16()

    rows = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = load(compile(Lowered(), (values(2, 5),), dynamic_shapes=(rows,)).vmfb)
    x = values(3, 7)
    for number, (got, expected) in enumerate(zip(program(x), Lowered()(x), strict=True)):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), number
        same = (got.float() == expected.float()) | (got.float().isnan() & expected.float().isnan())
        assert same.all(), number


# --- block-scaled matrix product ---------------------------------------------------------------


@pytest.mark.parametrize(("depth", "features", "group"), [(256, 256, 128), (192, 200, 64), (64, 3, 32)])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (0,)])
def test_block_scaled_matmul(depth, features, group, leading):
    a, a_scale = LOW.group_quant(rand(*leading, depth), group)
    b = rand(features, depth, seed=1).to(torch.float8_e4m3fn)
    b_scale = rand(-(-features // group), depth // group, dtype=torch.float32, seed=2).abs()
    out = LOW.block_scaled_matmul(a, b, a_scale, b_scale, torch.bfloat16)
    expected = np.zeros((*leading, features))
    for k in range(depth // group):
        block = slice(k * group, (k + 1) * group)
        partial = a.double().numpy()[..., block] @ b.double().numpy()[:, block].T
        scales = np.repeat(b_scale.double().numpy()[:, k], group)[:features]
        expected += partial * a_scale.double().numpy()[..., k, None] * scales
    assert out.dtype == torch.bfloat16 and out.shape == (*leading, features)
    torch.testing.assert_close(out.double(), torch.from_numpy(expected), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("a_shape", ["row", "one"])
@pytest.mark.parametrize("b_rows", [1, 40, 2])
def test_one_scale_in_a_row_is_applied_to_the_sum(codes, a_shape, b_rows):
    """Of a token or all tokens, of a channel, of blocks or all: int8 bit for bit, its sum being exact."""
    a, a_scale = LOW.group_quant(rand(2, 3, 32), 0, dtype=codes)
    b, _ = LOW.group_quant(rand(40, 32, seed=1), 0, dtype=codes)
    a_scale = a_scale if a_shape == "row" else a_scale[0, 0]
    b_scale = rand(b_rows, 1, dtype=torch.float32, seed=2).abs()
    bias = rand(40, seed=3)
    out = LOW.block_scaled_matmul(a, b, a_scale, b_scale, torch.bfloat16, bias)
    channels = b_scale.repeat_interleave({1: 40, 40: 1, 2: 32}[b_rows], 0)[:40]
    exact = a.double() @ b.double().t()
    expected = exact.float() * a_scale * channels.t() + bias.float()
    if codes == torch.int8:
        assert torch.equal(out, expected.bfloat16())
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-4)


def test_column_tma_scales_are_accepted():
    x, b = rand(6, 256), rand(128, 256, seed=1).to(torch.float8_e4m3fn)
    results = []
    for layout in ("row", "column_tma"):
        q, scale = LOW.group_quant(x, 128, scale_layout=layout)
        results.append(LOW.block_scaled_matmul(q, b, scale, torch.ones(1, 2), torch.float32))
    assert torch.equal(*results)


# --- tracing -----------------------------------------------------------------------------------

TRANSPOSED = rand(3, 5, 64).transpose(0, 1)


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (LOW.rms_norm, (rand(3, 64), rand(64), 1e-6), {}),
        (LOW.rms_norm, (rand(3, 64), None, 1e-6), {}),
        (LOW.add_rms_norm, (rand(3, 64), rand(3, 64), rand(64, dtype=torch.float32), 1e-6), {}),
        (LOW.silu_mul, (rand(3, 64),), {}),
        (LOW.silu_mul, (rand(2, 0, 64)[..., 1:63],), {}),
        (LOW.rms_norm, (TRANSPOSED, None, 1e-6), {}),
        (LOW.add_rms_norm, (TRANSPOSED, TRANSPOSED + 1, None, 1e-6), {}),
        (LOW.silu_mul, (TRANSPOSED,), {}),
        *((LOW.group_quant, (TRANSPOSED, group), {"scale_layout": "column"}) for group in (32, 0)),
        *((LOW.group_quant, (rand(64, 6).t(), group), {}) for group in (2, 0)),
        *(
            (LOW.group_quant, (rand(*shape), 64), {"scale_layout": layout, "scale": "ue8m0"})
            for shape in SHAPES
            for layout in ops.SCALE_LAYOUTS
        ),
        (LOW.group_quant, (rand(2, 3, 64), 32), {}),
        (LOW.group_quant, (rand(2, 3, 96), 0), {"scale_layout": "column_tma", "dtype": torch.int8}),
        (LOW.group_quant, (rand(5, 96), 32), {"amax_ceiling": 1.0, "limit": 224.0, "quotient": "reciprocal"}),
        (
            LOW.block_scaled_matmul,
            (*LOW.group_quant(rand(2, 64), 32), rand(40, 64).to(torch.float8_e4m3fn), torch.ones(2, 2)),
            {},
        ),
    ],
)
def test_fake_kernels_agree(op, args, kwargs):
    utilities = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if op is LOW.block_scaled_matmul:
        a, a_scale, b, b_scale = args
        args = (a, b, a_scale, b_scale, torch.float16)
        utilities.remove(
            "test_schema"
        )  # it multiplies the arguments by a number, which fp8 has no kernel for
    opcheck(op.default, args, kwargs, test_utils=utilities)


PACKED = Quantization(64, scale="ue8m0", layout="ue8m0_packed")


class AllReferences(torch.nn.Module):
    def forward(self, x, residual, weight, b, b_scale):
        y, total = ops.norm_reference(x, residual, weight, Norm(1e-6, "twice", "rounded", 1.0))
        y = ops.gated_activation_reference(y, residual, GatedActivation("gelu_tanh", "none"))
        q, physical = ops.group_quant_physical_reference(y, Quantization(64, layout="column_tma"))
        _, scale = ops.group_quant_reference(y, Quantization(64))
        _, packed = ops.group_quant_physical_reference(y, PACKED)
        product = ops.block_scaled_matmul_reference(q, b, scale, b_scale, x.dtype)
        return q, physical, packed, total, product


class AllOps(torch.nn.Module):
    def forward(self, x, residual, weight, b, b_scale):
        y, total = LOW.add_rms_norm(x, residual, weight, 1e-6)
        y = LOW.silu_mul(torch.cat([y, total], -1))
        q, scale = LOW.group_quant(LOW.rms_norm(y, weight, 1e-6), 64, scale_layout="column_tma")
        _, column = LOW.group_quant(y, 0, dtype=torch.int8, scale_layout="column")
        _, packed = LOW.group_quant(y, **arguments(PACKED))
        return q, scale, column, packed, total, LOW.block_scaled_matmul(q, b, scale, b_scale, x.dtype)


def rows_of_192(*leading):
    rows = rand(*leading, 192), rand(*leading, 192, seed=3)
    return *rows, rand(192, seed=1), rand(100, 192).to(torch.float8_e4m3fn), torch.ones(2, 3)


def exported_for_any_rows(module: torch.nn.Module) -> torch.export.ExportedProgram:
    rows = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    return torch.export.export(module, rows_of_192(2, 5), dynamic_shapes=(rows, rows, None, None, None))


@pytest.mark.parametrize("module", [AllReferences(), AllOps()])
def test_export_with_dynamic_rows(module):
    exported = exported_for_any_rows(module).module()
    for leading in ((2, 5), (3, 7), (4, 4)):
        args = rows_of_192(*leading)
        for got, expected in zip(exported(*args), module(*args), strict=True):
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert torch.equal(got.float(), expected.float())


def test_symbolic_shapes_and_strides_are_the_eager_ones():
    nodes = list(exported_for_any_rows(AllOps()).graph.nodes)
    batch, tokens, _ = nodes[0].meta["val"].shape
    traced = [node.meta["val"] for node in nodes[-1].args[0]]
    for leading in ((2, 5), (3, 7), (4, 4)):
        values = dict(zip((batch.node.expr, tokens.node.expr), leading, strict=True))

        def evaluated(sizes, values=values):
            return tuple(s if isinstance(s, int) else int(s.node.expr.subs(values)) for s in sizes)

        for fake, real in zip(traced, AllOps()(*rows_of_192(*leading)), strict=True):
            assert evaluated(fake.shape) == real.shape and fake.dtype == real.dtype
            assert evaluated(fake.stride()) == real.stride()


# --- errors ------------------------------------------------------------------------------------

Q, S = LOW.group_quant(rand(2, 256), 128)
B, BS = Q[:1].expand(130, 256), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LOW.group_quant(rand(2, 576), 128), "x: group 128 does not divide the last axis, 576"),
        (lambda: LOW.group_quant(rand(2, 0), 128), "x: group 128 does not divide the last axis, 0"),
        (lambda: LOW.group_quant(rand(2, 0), 0), "x: the last axis is empty"),
        (
            lambda: LOW.group_quant(rand(2, 64), -1),
            "group_size: expected a positive number, or 0 for the whole row, got -1",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64).long(), 64),
            "x: expected float32 or bfloat16 or float16, got int64",
        ),
        (lambda: LOW.group_quant(torch.tensor(1.0), 64), "x: expected at least 1 dimension, got a scalar"),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, scale="e8m0"),
            "scale: 'e8m0' is not available; choose one of 'float32', 'ue8m0'",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, scale_layout="rows"),
            "scale_layout: 'rows' is not available; choose one of 'row', 'column', 'column_tma', 'ue8m0_pack",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, scale_layout="ue8m0_packed"),
            "scale: scale_layout 'ue8m0_packed' holds 'ue8m0' alone, not 'float32'",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 0, scale="ue8m0", scale_layout="ue8m0_packed"),
            "group_size: scale_layout 'ue8m0_packed' holds groups, not whole rows",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, dtype=torch.uint8),
            "dtype: uint8 is not available; choose float8_e4m3fn or float8_e4m3fnuz or float8_e5m2 or int8",
        ),
        *(
            (
                lambda argument=argument: LOW.group_quant(rand(2, 64), 64, **{argument: "half"}),
                f"{argument}: 'half' is not available; choose one of 'true', 'reciprocal'",
            )
            for argument in ("scale_division", "quotient")
        ),
        *(
            (
                lambda argument=argument, value=value: LOW.group_quant(rand(2, 64), 64, **{argument: value}),
                f"{argument}: expected a number of at least 0, got {value}",
            )
            for argument in ("amax_floor", "scale_floor")
            for value in (-1.0, float("nan"), float("inf"))
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, amax_ceiling=1e-12),
            "amax_ceiling: expected a number at least amax_floor, 1e-10, got 1e-12",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, amax_floor=0.0, amax_ceiling=0.0),
            r"amax_ceiling: expected a number above 0, got 0\.0",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, amax_ceiling=1.0, dtype=torch.int8),
            "amax_ceiling: bounds fp8 scales alone, and dtype is int8",
        ),
        (
            lambda: LOW.group_quant(rand(2, 64), 64, dtype=torch.float8_e4m3fnuz, limit=448.0),
            "limit: expected a number above 0, at most the 240 of float8_e4m3fnuz, got 448",
        ),
        (lambda: LOW.group_quant(rand(2, 64), 64, limit=0.0), "limit: expected a number above 0"),
        (lambda: LOW.silu_mul(rand(2, 63)), "gate_up: the last axis, 63, has no two halves"),
        (lambda: LOW.silu_mul(torch.tensor(1.0)), "gate_up: expected at least 1 dimension, got a scalar"),
        (lambda: LOW.silu_mul(rand(2, 64).int()), "gate_up: expected .*, got int32"),
        (lambda: LOW.rms_norm(rand(2, 64).double(), None, 1e-6), "x: expected .*, got float64"),
        (lambda: LOW.rms_norm(rand(2, 64), rand(32), 1e-6), r"weight: expected shape \[64\], got \[32\]"),
        (lambda: LOW.rms_norm(rand(2, 64), rand(64).long(), 1e-6), "weight: expected .*, got int64"),
        (
            lambda: LOW.add_rms_norm(rand(2, 64), rand(64), None, 1e-6),
            r"residual: expected shape \[2, 64\], got \[64\]",
        ),
        (
            lambda: LOW.add_rms_norm(rand(2, 64), rand(2, 64).float(), None, 1e-6),
            "residual: expected bfloat16, got float32",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q.float(), B, S, BS, torch.bfloat16),
            "a: expected float8_e4m3fn or float8_e4m3fnuz or float8_e5m2 or int8, got float32",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q, B[:, :128], S, BS, torch.bfloat16),
            r"b: expected shape \[N, 256\], got \[130, 128\]",
        ),
        (lambda: LOW.block_scaled_matmul(Q, B, S.half(), BS, torch.bfloat16), "a_scale: expected float32"),
        (
            lambda: LOW.block_scaled_matmul(Q, B, torch.ones(2, 3), BS, torch.bfloat16),
            "a_scale: 3 groups do not divide the last axis of a, 256",
        ),
        (lambda: LOW.block_scaled_matmul(Q, B, torch.ones(3, 2), BS, torch.bfloat16), r"a_scale: .*\[2, 2\]"),
        (
            lambda: LOW.block_scaled_matmul(Q, B, S, BS[:1], torch.bfloat16),
            r"b_scale: expected shape \[2, 2\], got \[1, 2\]",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q, B.to(torch.int8), S, BS, torch.bfloat16),
            "b: expected float8_e4m3fn .*, got int8",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q.char(), B.char(), S, BS, torch.bfloat16),
            "a_scale: a product of int8 has one scale in a row, got 2",
        ),
        (lambda: LOW.block_scaled_matmul(Q, B, S, BS, torch.float64), "out_dtype: expected .*, got float64"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale": torch.ones(2)}, r"scale: expected one number for all of x, got \[2\]"),
        ({"scale": torch.ones(1, dtype=torch.bfloat16)}, "scale: expected float32, got bfloat16"),
        ({"x": torch.ones(3, dtype=torch.int32)}, "x: expected float32 or bfloat16"),
        ({"dtype": torch.int16}, "dtype: int16 is not available"),
        ({"quotient": "exact"}, "quotient: 'exact' is not available"),
        ({"limit": 500.0}, "limit: expected a number above 0, at most the 448"),
        ({"lowest": 1.0}, "lowest: expected a number below 0, at least the -448"),
    ],
)
def test_static_quant_refuses_what_does_not_fit(given: dict[str, Any], words: str) -> None:
    arguments = {"x": torch.ones(4, 32), "scale": torch.ones(1), **given}
    with pytest.raises(ValueError, match=words):
        LOW.static_quant(arguments.pop("x"), arguments.pop("scale"), **arguments)
