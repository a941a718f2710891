"""Group quantization as people write it: what each spelling is raised to, and that it computes as eager does.

Nothing is summed here, so results are equal bit for bit on any input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering
from patterns.contracts import Norm, Quantization
from tests.raised import Function, bits, contracts, sites

FP8, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
rms_norm = torch.ops.lowering.rms_norm


def divided(
    x: Tensor,
    *,
    groups: Callable[[Tensor], Tensor] = lambda x: x.reshape(*x.shape[:-1], -1, 128).float(),
    amax: Callable[[Tensor], Tensor] = lambda g: g.abs().amax(dim=-1, keepdim=True),
    floor: Callable[[Tensor], Tensor] = lambda a: a.clamp(min=1e-10),
    scale: Callable[[Tensor], Tensor] = lambda a: a / 448.0,
    quotient: Callable[[Tensor, Tensor], Tensor] = lambda g, s: g / s,
    stored: Callable[[Tensor], Tensor] = lambda v: v.clamp(-448.0, 448.0).to(FP8),
) -> Any:
    """One spelling; each step can be given another."""
    blocks = groups(x)
    scales = scale(floor(amax(blocks)))
    return stored(quotient(blocks, scales)).reshape(x.shape), scales


def to_int8(values: Tensor) -> Tensor:
    return torch.round(values).clamp(-127, 127).to(torch.int8)


def per_token_cast_to_fp8(x: Tensor) -> Any:
    """As DeepGEMM has it, with power-of-two scales from the bits."""
    m, n = x.shape
    view = x.view(m, n // 128, 128)
    amax = view.abs().float().amax(dim=2).view(m, -1).clamp(1e-4)
    sf = amax / 448.0
    exponents = sf.abs().float().view(torch.int)
    exponents = ((exponents >> 23) & 0xFF) + (exponents & 0x7FFFFF).bool().int()
    sf = (exponents.clamp(1, 254) << 23).view(torch.float)
    return (view * (1.0 / sf.unsqueeze(2))).to(FP8).view(m, n).contiguous(), sf


def inverted(
    x: Tensor, inverse: Callable[[Tensor], Tensor], scale: Callable[[Tensor, Tensor], Tensor]
) -> Any:
    """Values times qmax over the largest magnitude, and what is kept of it."""
    blocks = x.reshape(*x.shape[:-1], -1, 128).float()
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    by = inverse(amax)
    q = (blocks * by).clamp(-448.0, 448.0).to(FP8)
    return q.reshape(x.shape), scale(amax, by)


def power(log: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda a: log(torch.ceil(torch.log2(a / 448.0)))


TRUE = Quantization(128)
RECIPROCAL = Quantization(128, quotient="reciprocal")
INVERSE = Quantization(128, quotient="inverse")
TWICE = Quantization(128, quotient="inverse", inverse="reciprocal")
INT8 = Quantization(128, dtype="int8")
UE8M0 = Quantization(128, scale="ue8m0", amax_floor=1e-4)
POWER = replace(UE8M0, infinite=True)

SPELLINGS: dict[str, tuple[Callable[[Tensor], Any], Quantization]] = {
    "divisions": (divided, TRUE),
    "1 / scale": (lambda x: divided(x, quotient=lambda g, s: g * (1.0 / s)), RECIPROCAL),
    "reciprocal": (lambda x: divided(x, quotient=lambda g, s: torch.reciprocal(s) * g), RECIPROCAL),
    "product with 1 / 448": (
        lambda x: divided(x, scale=lambda a: a * (1.0 / 448.0)),
        Quantization(128, scale_division="reciprocal"),
    ),
    "no floor": (lambda x: divided(x, floor=lambda a: a), Quantization(128, amax_floor=0.0)),
    "maximum with a tensor": (
        lambda x: divided(x, floor=lambda a: torch.maximum(torch.tensor(1e-4), a)),
        Quantization(128, amax_floor=1e-4),
    ),
    "clamp_min": (lambda x: divided(x, floor=lambda a: a.clamp_min(1e-10)), TRUE),
    "clamp to a tensor": (lambda x: divided(x, floor=lambda a: a.clamp(min=torch.tensor(1e-10))), TRUE),
    "upper bound": (
        lambda x: divided(x, floor=lambda a: a.clamp(1e-10, 2.0)),
        Quantization(128, amax_ceiling=2.0),
    ),
    "upper bound first": (
        lambda x: divided(x, floor=lambda a: torch.minimum(a, torch.tensor(2.0)).clamp(min=1e-10)),
        Quantization(128, amax_ceiling=2.0),
    ),
    "scale floor": (
        lambda x: divided(x, floor=lambda a: a, scale=lambda a: (a / 448.0).clamp(min=1e-3)),
        Quantization(128, amax_floor=0.0, scale_floor=1e-3),
    ),
    "constants as tensors": (lambda x: divided(x, scale=lambda a: a / torch.tensor(LARGEST)), TRUE),
    "a full tensor": (lambda x: divided(x, scale=lambda a: a / torch.full((), LARGEST)), TRUE),
    "minimum of maximum": (
        lambda x: divided(
            x,
            stored=lambda v: torch.minimum(
                torch.maximum(v, torch.tensor(-LARGEST)), torch.tensor(LARGEST)
            ).to(FP8),
        ),
        TRUE,
    ),
    "no clamp behind a floor": (lambda x: divided(x, stored=lambda v: v.to(FP8)), TRUE),
    "unflatten": (lambda x: divided(x, groups=lambda x: x.unflatten(-1, (-1, 128)).float()), TRUE),
    "widened first": (lambda x: divided(x, groups=lambda x: x.float().view(x.shape[0], -1, 128)), TRUE),
    "magnitude in 16 bit": (
        lambda x: divided(
            x,
            groups=lambda x: x.view(x.shape[0], -1, 128),
            amax=lambda g: g.abs().amax(-1, keepdim=True).float(),
        ),
        TRUE,
    ),
    "max": (lambda x: divided(x, amax=lambda g: g.abs().max(dim=-1, keepdim=True)[0]), TRUE),
    "max values": (lambda x: divided(x, amax=lambda g: g.abs().max(2, True).values), TRUE),
    "infinity norm": (
        lambda x: divided(
            x, amax=lambda g: torch.linalg.vector_norm(g, ord=float("inf"), dim=-1, keepdim=True)
        ),
        TRUE,
    ),
    "unsqueezed": (
        lambda x: divided(x, amax=lambda g: g.abs().amax(-1), quotient=lambda g, s: g / s.unsqueeze(-1)),
        TRUE,
    ),
    "the scale turned over": (
        lambda x: divided(x, scale=lambda a: 448.0 / a, quotient=lambda g, s: g * s),
        TWICE,
    ),
    "an inverse, and the scale": (
        lambda x: inverted(x, lambda a: torch.tensor(448.0) / a, lambda a, by: a / 448.0),
        INVERSE,
    ),
    "an inverse, and 1 over it": (
        lambda x: inverted(x, lambda a: torch.full((), 448.0) / a, lambda a, by: 1.0 / by),
        replace(INVERSE, scale_division="inverse"),
    ),
    "an inverse in two steps": (
        lambda x: inverted(x, lambda a: 448.0 / a, lambda a, by: torch.reciprocal(by).squeeze(-1)),
        replace(TWICE, scale_division="inverse"),
    ),
    "an inverse, and a product": (
        lambda x: inverted(x, lambda a: 448.0 * (1.0 / a), lambda a, by: a.squeeze(-1) * (1 / 448.0)),
        replace(TWICE, scale_division="reciprocal"),
    ),
    "indexed with None": (
        lambda x: divided(x, amax=lambda g: g.abs().amax(-1)[..., None]),
        TRUE,
    ),
    "written twice": (
        lambda x: (
            (
                x.view(x.shape[0], -1, 128)
                / (scale := x.view(x.shape[0], -1, 128).float().abs().amax(-1) / 448)[..., None]
            )
            .clamp(-448, 448)
            .to(FP8),
            scale,
        ),
        Quantization(128, amax_floor=0.0),
    ),
    "e5m2": (
        lambda x: divided(
            x,
            scale=lambda a: a / 57344.0,
            stored=lambda v: v.clamp(-57344.0, 57344.0).to(torch.float8_e5m2),
        ),
        Quantization(128, dtype="float8_e5m2"),
    ),
    "fnuz, vLLM's bound": (
        lambda x: divided(
            x,
            scale=lambda a: a / 224.0,
            stored=lambda v: v.clamp(-224.0, 224.0).to(torch.float8_e4m3fnuz),
        ),
        Quantization(128, dtype="float8_e4m3fnuz", limit=224.0),
    ),
    "int8, rounded first": (lambda x: divided(x, scale=lambda a: a / 127, stored=to_int8), INT8),
    "int8, bounded first": (
        lambda x: divided(
            x, scale=lambda a: a / 127, stored=lambda v: v.clamp(-127, 127).round().to(torch.int8)
        ),
        INT8,
    ),
    "int8, bounded to its range": (
        lambda x: divided(
            x, scale=lambda a: a / 127.0, stored=lambda v: v.round().clamp(-128, 127).to(torch.int8)
        ),
        INT8,
    ),
    "int8, whole rows": (
        lambda x: divided(x, groups=lambda x: x.float(), scale=lambda a: a / 127.0, stored=to_int8),
        Quantization(None, dtype="int8"),
    ),
    "whole rows": (lambda x: divided(x, groups=lambda x: x.float()), Quantization(None)),
    "groups of 32": (
        lambda x: divided(x, groups=lambda x: x.view(x.shape[0], -1, 32).float()),
        Quantization(32),
    ),
    "power of two, pow": (
        lambda x: divided(x, floor=lambda a: a.clamp(1e-4), scale=power(lambda e: torch.pow(2.0, e))),
        POWER,
    ),
    "power of two, exp2": (
        lambda x: divided(
            x,
            floor=lambda a: a.clamp(1e-4),
            scale=power(torch.exp2),
            quotient=lambda g, s: g * (1.0 / s),
            stored=lambda v: v.to(FP8),
        ),
        POWER,
    ),
    "DeepGEMM": (per_token_cast_to_fp8, UE8M0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_it_is_raised_to(name: str) -> None:
    function, contract = SPELLINGS[name]
    module = Function(lambda w, x: function(rms_norm(x, w, 1e-6)))
    assert contracts(module, torch.randn(4, 256, dtype=torch.bfloat16)) == [Norm(1e-6), contract]


def test_every_spelling_fuses_with_a_norm_before_it() -> None:
    for name, (function, _) in SPELLINGS.items():
        records = sites(
            Function(lambda w, x, function=function: function(rms_norm(x, w, 1e-6))),
            torch.randn(4, 256, dtype=torch.bfloat16),
        ).records
        assert [record.pattern for record in records] == ["norm_quant", "norm_quant"], name


def rows() -> Tensor:
    """Ordinary values, and zeros, tiny, large and constant ones."""
    x = torch.randn(12, 256)
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e30
    x[4, :128] = 0
    x[5] *= 2.0**-120
    x[6] = torch.arange(256) * 2.0**-20
    x[7] = 448.0
    return x.bfloat16()


def test_every_spelling_computes_what_eager_computes() -> None:
    names, x = list(SPELLINGS), rows()

    def function(w: Tensor, *xs: Tensor) -> Any:
        return [out for name, x in zip(names, xs, strict=True) for out in SPELLINGS[name][0](x)]

    module, xs = Function(function), [x.clone() for _ in names]
    compiled = lowering.compile(module, tuple(xs))
    assert compiled.report.summary()["unfused"] == 0 and len(compiled.report.sites) == len(names)
    outputs = zip(lowering.load(compiled.vmfb)(*xs), module(*xs), strict=True)
    for number, (got, expected) in enumerate(outputs):
        name = names[number // 2]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        same = bits(got) == bits(expected)
        assert same.all(), f"{name}, {number % 2}: {got[~same][:9]} where eager has {expected[~same][:9]}"


def test_a_scale_that_is_read_before_the_values_are_made() -> None:
    """The canonical op must stand before every reader of its scale."""

    def function(w: Tensor, x: Tensor) -> Any:
        groups = rms_norm(x, w, 1e-6).view(4, 2, 128).float()
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        doubled = torch.relu(scale) * 2
        q = (groups / scale).clamp(-448.0, 448.0).to(FP8)
        return q, scale, doubled

    module, x = Function(function), torch.randint(-8, 9, (4, 256)).bfloat16()
    compiled = lowering.compile(module, (x,))
    assert compiled.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}
    for got, expected in zip(lowering.load(compiled.vmfb)(x), module(x), strict=True):
        assert torch.equal(got.float(), expected.float())


def test_the_power_of_two_of_a_logarithm() -> None:
    """Equal to eager's but just above a power of two, where torch.log2 rounds down to a whole number.

    A contract's scale is never below amax / qmax; eager's then is, by less than 1 in 100,000.
    """
    function, _ = SPELLINGS["power of two, pow"]
    x = torch.zeros(4096, 256)
    x[:, 0] = torch.logspace(-3, 30, 4096, base=2.0) * 448
    x[:64, 0] = 448 * 2.0 ** torch.arange(-8, 56) * (1 + 2.0**-22)
    module = Function(lambda w, x: function(x))
    program = lowering.load(lowering.compile(module, (x,)).vmfb)
    got, expected = (run(x)[1][:, 0] for run in (program, module))
    ratio = (got / expected).flatten()
    assert set(ratio.tolist()) <= {1.0, 2.0}
    exact = x[:, 0].double() / 448
    assert (exact[ratio == 2] / expected.flatten()[ratio == 2].double() - 1).max() < 1e-5
    assert (got.flatten().double() >= exact * (1 - 2.0**-23)).all()
    x[::3, 7], x[::5, 200] = math.inf, -math.inf  # an infinite scale, finite values zero, infinite ones NaN
    for ours, theirs in zip(program(x), module(x), strict=True):
        there = torch.isinf(module(x)[1]).expand(-1, 2, ours[0].numel() // 2).reshape(ours.shape)
        assert torch.equal(ours.float()[there].nan_to_num(), theirs.float()[there].nan_to_num())
        assert torch.equal(ours.float()[there].isnan(), theirs.float()[there].isnan())


# -- what is not one ----------------------------------------------------------------------------------------

NEAR_MISSES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "another bound than the scale's": (
        lambda x: divided(x, stored=lambda v: v.clamp(-240.0, 240.0).to(FP8)),
        "made for values up to 448, and they are bounded to [-240, 240]",
    ),
    "bounds that are not opposite": (
        lambda x: divided(x, stored=lambda v: v.clamp(-448.0, 440.0).to(FP8)),
        "bounded to [-448, 440]",
    ),
    "something added to the scale": (
        lambda x: divided(x, scale=lambda a: a / 448.0 + 1e-8),
        "aten.add.Scalar is part of its scale",
    ),
    "zero scales replaced": (
        lambda x: divided(x, scale=lambda a: torch.where(a == 0, 1.0, a / 448.0)),
        "aten.where.self is part of its scale",
    ),
    "a bounded scale": (
        lambda x: divided(x, scale=lambda a: (a / 448.0).clamp(max=1.0)),
        "its scale has an upper bound; bound the largest magnitude instead",
    ),
    "int8 with a bounded magnitude": (
        lambda x: divided(x, floor=lambda a: a.clamp(1e-5, 2.0), scale=lambda a: a / 127.0, stored=to_int8),
        "which only 8-bit floats may have",
    ),
    "no rounding before int8": (
        lambda x: divided(x, scale=lambda a: a / 127.0, stored=lambda v: v.clamp(-127, 127).to(torch.int8)),
        "round before it",
    ),
    "rounding before fp8": (
        lambda x: divided(x, stored=lambda v: v.round().clamp(-448, 448).to(FP8)),
        "rounded to whole numbers before the cast to float8_e4m3fn",
    ),
    "no clamp without a floor": (
        lambda x: divided(x, floor=lambda a: a, stored=lambda v: v.to(FP8)),
        "values may exceed 448; clamp them",
    ),
    "a power of two of nothing": (
        lambda x: divided(x, floor=lambda a: a, scale=power(torch.exp2)),
        "the power of two of a row of zeros is zero here",
    ),
    "more than the type holds": (
        lambda x: divided(x, scale=lambda a: a / 500.0, stored=lambda v: v.clamp(-500, 500).to(FP8)),
        "float8_e4m3fn holds no such",
    ),
    "a scale over the wrong axis": (
        lambda x: divided(x, groups=lambda x: x.float(), amax=lambda g: g.abs().amax(0, keepdim=True)),
        "taken over axes [0]; the groups of a kernel lie in the last one",
    ),
    "blocks of two axes": (
        lambda x: divided(
            x,
            groups=lambda x: x.view(2, 2, 2, 128).float(),
            amax=lambda g: g.abs().amax((1, 3), keepdim=True),
        ),
        "taken over axes [1, 3]",
    ),
    "a constant scale": (
        lambda x: ((x.float() / 3.5).clamp(-448, 448).to(FP8), x),
        "not computed from the largest magnitude",
    ),
    "in 16 bit": (
        lambda x: divided(x, groups=lambda x: x.view(4, 2, 128)),
        "the quotient is taken in bfloat16; widen the tensor with .float() before",
    ),
    "a scale in 16 bit": (
        lambda x: divided(
            x, amax=lambda g: g.bfloat16().abs().amax(-1, keepdim=True), quotient=lambda g, s: g / s.float()
        ),
        "its scale is computed in bfloat16",
    ),
    "the largest value": (
        lambda x: divided(x, amax=lambda g: g.amax(-1, keepdim=True)),
        "take the largest magnitude",
    ),
    "another tensor's scale": (
        lambda x: divided(x, amax=lambda g: (g * 2).abs().amax(-1, keepdim=True)),
        "the largest magnitude of another tensor",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_nearly_a_quantization_says_why_not(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    records = sites(Function(lambda w, x: function(x)), torch.randn(4, 256, dtype=torch.bfloat16)).records
    assert [record.op for record in records] == ["group_quant"]
    assert reason in (records[0].reason or ""), records[0].reason


def test_a_cast_that_scales_nothing_is_no_site() -> None:
    module = Function(lambda w, x: (x.to(FP8), x.float().clamp(-1, 1).to(FP8), (x > 0).to(torch.int8)))
    assert sites(module, torch.randn(4, 256, dtype=torch.bfloat16)).records == []
