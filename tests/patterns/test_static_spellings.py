"""Quantization by a scale that is given, as people write it: what it is raised to, and what fuses.

Nothing is summed in a quantization, so results are equal to eager's bit for bit on any input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering
from patterns.contracts import Norm, Quantization, static_quantization
from tests.raised import Function, bits, contracts, integers, sites

FP8 = torch.float8_e4m3fn
rms_norm, static_quant = torch.ops.lowering.rms_norm, torch.ops.lowering.static_quant


def to_fp8(values: Tensor) -> Tensor:
    return values.clamp(-448.0, 448.0).to(FP8)


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Quantization]] = {
    "a division": (lambda x, s: to_fp8(x.float() / s), static_quantization()),
    "a scale without axes": (lambda x, s: to_fp8(x.float() / s.reshape(())), static_quantization()),
    "a scale of three axes": (lambda x, s: to_fp8(x.float() / s.view(1, 1)), static_quantization()),
    "16 bits by a vector": (lambda x, s: to_fp8(x / s), static_quantization()),
    "the operation": (static_quant, static_quantization()),
    "its inverse": (
        lambda x, s: static_quant(x, s, quotient="inverse", limit=224.0),
        static_quantization(quotient="inverse", limit=224.0),
    ),
    "a product with 1 / scale": (
        lambda x, s: to_fp8(x.float() * (1.0 / s)),
        static_quantization(quotient="reciprocal"),
    ),
    "a reciprocal": (
        lambda x, s: to_fp8(torch.reciprocal(s) * x.float()),
        static_quantization(quotient="reciprocal"),
    ),
    "an inverse scale": (lambda x, s: to_fp8(x.float() * s), static_quantization(quotient="inverse")),
    "fewer bounds": (
        lambda x, s: torch.maximum(
            torch.minimum(x.float() / s, torch.tensor(240.0)), torch.tensor(-240.0)
        ).to(FP8),
        static_quantization(limit=240.0),
    ),
    "e5m2": (
        lambda x, s: (x.float() / s).clamp(-57344, 57344).to(torch.float8_e5m2),
        static_quantization("float8_e5m2"),
    ),
    "int8": (
        lambda x, s: (x.float() / s).round().clamp(-128, 127).to(torch.int8),
        static_quantization("int8", lowest=-128.0),
    ),
    "int8 without -128": (
        lambda x, s: (x.float() * s).clamp(-127, 127).round().to(torch.int8),
        static_quantization("int8", "inverse"),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_it_is_raised_to(name: str) -> None:
    function, contract = SPELLINGS[name]
    module = Function(lambda w, x, s: function(rms_norm(x, w, 1e-6), s))
    given = (torch.randn(4, 256, dtype=torch.bfloat16), torch.rand(1))
    assert contracts(module, *given) == [Norm(1e-6), contract]
    assert [record.pattern for record in sites(module, *given).records] == ["norm_quant"] * 2


def test_every_spelling_computes_what_eager_computes() -> None:
    """Whatever the scale: ordinary, tiny, huge, zero, negative, infinite, and no number."""
    names, x = list(SPELLINGS), torch.randn(12, 256)
    x[1], x[2], x[3] = x[1] * 1e-30, x[2] * 1e30, x[3] * 2.0**-125
    x[4, 3], x[4, 4], x[5, 5], x[6, 6], x[7] = 0.0, -0.0, math.inf, -math.inf, 448.0

    def function(w: Tensor, x: Tensor, s: Tensor) -> Any:
        return [SPELLINGS[name][0](x, s) for name in names]

    module, x, scale = Function(function), x.bfloat16(), torch.tensor([0.037])
    compiled = lowering.compile(module, (x, scale))
    assert compiled.report.summary()["unfused"] == 0 and len(compiled.report.sites) == len(names)
    program = lowering.load(compiled.vmfb)
    for value in (0.037, 1.0, 3e-39, 1e-35, 1e35, 3e38, 0.0, -0.5, math.inf, math.nan):
        scale = torch.tensor([value])
        for name, got, expected in zip(names, program(x, scale), module(x, scale), strict=True):
            # Where eager's int8 is of NaN it is undefined; here it is 0.
            number = ~torch.isnan(
                static_quant(x, scale, quotient="inverse" if "*" in name else "true").float()
            )
            same = (bits(got) == bits(expected)) | (torch.isnan(got.float()) & torch.isnan(expected.float()))
            same |= (got == 0) & ~number if got.dtype == torch.int8 else False
            assert same.all(), (name, value, got[~same][:5], expected[~same][:5])


def test_the_fan_out_of_a_norm_is_one_kernel() -> None:
    """Equal scales by the same tensor are one output; the stream, y and another scheme are others."""

    def function(w: Tensor, x: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Any:
        total = x + r
        y = rms_norm(total, w, 1e-6)
        codes = [static_quant(y, s), to_fp8(y.float() / s), static_quant(y.view(2, 2, 256), t)]
        return total, y, *codes, *torch.ops.lowering.group_quant(y, 128)

    module = Function(function)
    args = (integers(4, 256), integers(4, 256), torch.rand(1) + 0.1, torch.rand(()) + 0.1)
    compiled = lowering.compile(module, args)
    assert compiled.report.summary() == {"fused": 5, "unfused": 0, "dispatches": 1}
    assert "quant_static_quant_static_quant128" in (compiled.report.sites[0].kernel or "")
    for got, expected in zip(lowering.load(compiled.vmfb)(*args), module(*args), strict=True):
        assert got.shape == expected.shape and torch.equal(bits(got), bits(expected))


def test_more_quantizations_than_a_kernel_writes_are_shared_among_several() -> None:
    def function(w: Tensor, x: Tensor, r: Tensor, s: Tensor) -> Any:
        total = x + r
        y = rms_norm(total, w, 1e-6)
        static = [static_quant(y, s * n) for n in range(1, 7)]
        return total, y, *static, *torch.ops.lowering.group_quant(y, 64), static_quant(y, s * 1)

    module, args = Function(function), (integers(4, 256), integers(4, 256), torch.rand(1) + 0.1)
    compiled = lowering.compile(module, args)
    assert compiled.report.summary() == {"fused": 9, "unfused": 0, "dispatches": 2}
    for got, expected in zip(lowering.load(compiled.vmfb)(*args), module(*args), strict=True):
        assert torch.equal(bits(got), bits(expected))


def test_a_scale_that_comes_later_has_a_kernel_of_its_own() -> None:
    """One scale for a tensor is known when all of it is: the norm's kernel cannot use it."""

    def function(w: Tensor, x: Tensor) -> Any:
        y = rms_norm(x, w, 1e-6)
        scale = y.float().abs().max() / 448.0
        return to_fp8(y.float().view(2, 512) / scale), scale

    module, x = Function(function), integers(4, 256)
    compiled = lowering.compile(module, (x,))
    norm, quant = compiled.report.sites
    assert norm.status == "fused" and "its scale is computed behind what it quantizes" in (quant.reason or "")
    assert compiled.report.summary()["dispatches"] == 2
    for got, expected in zip(lowering.load(compiled.vmfb)(x), module(x), strict=True):
        assert torch.equal(bits(got), bits(expected))


NEAR_MISSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "not clamped": (lambda x, s: (x.float() / s).to(FP8), "use .clamp(-448, 448)"),
    "clamped to more": (lambda x, s: (x.float() / s).clamp(-500, 500).to(FP8), "use .clamp(-448, 448)"),
    "only one bound": (lambda x, s: (x.float() / s).clamp(max=448).to(FP8), "use .clamp(-448, 448)"),
    "int8 cut off": (lambda x, s: (x.float() / s).clamp(-128, 127).to(torch.int8), "round before it"),
    "rounded before fp8": (
        lambda x, s: (x.float() / s).round().clamp(-448, 448).to(FP8),
        "rounded to whole numbers before the cast to float8_e4m3fn",
    ),
    "in 16 bits": (
        lambda x, s: to_fp8(x / s.reshape(())),
        "the quotient is taken in bfloat16; widen the tensor",
    ),
    "a scale for each row": (
        lambda x, s: to_fp8(x.float() / s.expand(4).view(4, 1)),
        "one float32, for all rows",
    ),
    "a scale for each column": (lambda x, s: to_fp8(x.float() / s.repeat(256)), "one float32, for all rows"),
    "a constant": (lambda x, s: to_fp8(x.float() / 0.5), "the constant 0.5"),
    "a zero point": (
        lambda x, s: ((x.float() / s).round() + 3).clamp(-128, 127).to(torch.int8),
        "it has a zero point",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_nearly_one_says_why_not(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    module = Function(lambda w, x, s: function(x, s))
    records = sites(module, torch.randn(4, 256, dtype=torch.bfloat16), torch.rand(1)).records
    assert [record.op for record in records] == ["group_quant"]
    assert reason in (records[0].reason or ""), records[0].reason
