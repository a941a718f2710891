"""The quantizations of the row kernel against eager PyTorch, bit for bit: schemes, layouts, every amax.

Of AMD's little is emulated here: tests/gfx950 executes their machine code in the same tests.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lowering.families.row import instance
from lowering.families.row_support import why_unsupported
from lowering.targets import Target
from patterns.contracts import Quantization
from tests.families.host_kernels import assert_same, run
from tests.families.row_cases import (
    CPU,
    GFX942,
    GFX950,
    PRODUCERS,
    SCHEME_CASES,
    SCHEMES,
    SM90,
    scheme_case,
    scheme_lengths,
    spec,
)
from tests.families.row_reference import check, reference


@pytest.mark.parametrize(
    ("case", "target"),
    [
        *itertools.product(SCHEME_CASES, [CPU, SM90]),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(map(str, value)),
)
def test_schemes(case: tuple[str, str, int], target: Target, launcher) -> None:
    check(scheme_case(*case), target, launcher)


@pytest.mark.parametrize("target", [CPU, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("producer", ["add", "plain_f32", "silu"])
def test_fnuz_schemes(producer: str, target: Target, launcher) -> None:
    check(scheme_case(producer, "fnuz", 640), target, launcher)


@pytest.mark.slow
@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_scheme_of_every_producer(producer: str, schemes: str, target: Target, launcher) -> None:
    for hidden in scheme_lengths(producer, schemes, target):
        case = scheme_case(producer, schemes, hidden)
        if why_unsupported(case, target) is None:
            check(case, target, launcher)


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
def test_packed_scales(target: Target, launcher) -> None:
    """Any number of rows and of groups, from the tiniest to the largest values: pads are zero."""
    packed = Quantization(32, scale="ue8m0", layout="ue8m0_packed")
    for hidden, dtype in [(32, "bfloat16"), (96, "float32"), (160, "bfloat16")]:
        case = spec(hidden, dtype, None, quants=[packed])
        kernel = instance(case, target)
        generator = torch.Generator().manual_seed(hidden)
        for rows in (*range(1, 10), 18, 31):
            powers = torch.exp2(torch.randint(-149, 128, (rows, hidden // 32), generator=generator).double())
            x = torch.rand(rows, hidden, generator=generator, dtype=torch.float64).add(-0.5).mul(1.99)
            x = (x * powers.repeat_interleave(32, -1)).to(getattr(torch, dtype))
            x[0, :3] = torch.tensor([448.0, 0.0, -448.0]).to(x.dtype)  # a power of two is not rounded up
            assert_same(run(kernel, launcher(kernel), [x], rows), reference(case, [x]), (hidden, rows))


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
@pytest.mark.parametrize("schemes", ["layouts", "rows", "bounds", "inverse"])
def test_special_values_of_schemes(schemes: str, target: Target, launcher) -> None:
    case = scheme_case("plain", schemes, 128)
    finfo = torch.finfo(torch.bfloat16)
    finite = [0.0, -0.0, finfo.smallest_normal / 4, finfo.max, -finfo.tiny]
    specials = [torch.nan, torch.inf, -torch.inf, *finite]
    x = torch.randn(2 * len(specials), 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    for row, value in enumerate(specials):
        x[row, 7] = value
        x[len(specials) + row] = value
    kernel = instance(case, target)
    assert_same(run(kernel, launcher(kernel), [x], len(x)), reference(case, [x]), schemes)


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_amax(dtype: str, target: Target, launcher) -> None:
    """A group for each positive 16-bit float as its amax, inf and NaN among them."""
    others = [Quantization(32, "float8_e5m2"), Quantization(32, "int8", quotient="reciprocal")]
    infinite = dtype == "float16"  # else 2^127 is the largest power
    power = Quantization(32, scale="ue8m0", scale_division="reciprocal", infinite=infinite)
    case = spec(32, dtype, None, quants=[Quantization(32), *others, power])
    kernel = instance(case, target)
    amax = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    fractions = torch.linspace(-1, 1, 32).to(amax.dtype)
    x = amax.unsqueeze(1) * fractions
    x[:, 0] = -amax
    assert_same(run(kernel, launcher(kernel), [x], len(x)), reference(case, [x]), dtype)


@pytest.mark.parametrize("target", [CPU, GFX950], ids=lambda t: t.name)
def test_quotients_of_float32(target: Target, launcher) -> None:
    """Quotients are correctly rounded whatever the scale: ties and near ties of fp8 come out as divided."""
    case = spec(32, "float32", None, quants=[Quantization(32)])
    kernel = instance(case, target)
    generator = torch.Generator().manual_seed(1)
    rows = 4096
    amax = torch.exp2(torch.rand(rows, 1, generator=generator) * 150 - 30)
    # Quotients next to the middle of two fp8 values, an ulp or two either side.
    middles = (torch.randint(16, 32, (rows, 32), generator=generator) + 0.5) * torch.exp2(
        torch.randint(-13, 4, (rows, 32), generator=generator).float()
    )
    x = middles * (amax / 448.0)
    x = torch.nextafter(x, torch.randint(-1, 2, x.shape, generator=generator) * torch.inf)
    x[:, :1] = amax
    assert_same(run(kernel, launcher(kernel), [x], rows), reference(case, [x]))


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
def test_given_scales_of_every_magnitude(target: Target, launcher) -> None:
    """Floats of all bits by ordinary, tiny, huge, zero, negative and infinite scales, and by no number."""
    case = spec(64, "float32", None, quants=SCHEMES["static"])
    kernel = instance(case, target)
    launch = launcher(kernel)
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-(1 << 31), 1 << 31, (256, 64), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.randn(256, 64, generator=generator) * 30])
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    for value in (0.037, 1.0, 2.0**-80, 1e-35, 3e-39, 1e35, 3e38, 0.0, -0.5, torch.inf, torch.nan):
        inputs = [x, *[torch.tensor([value])] * 3]
        assert_same(run(kernel, launch, inputs, len(x)), reference(case, inputs), value)


def test_twofold_quotients_are_correctly_rounded() -> None:
    """Every 8-bit y by the scale of every 8-bit amax, the machine's reciprocal off by a unit either way."""
    y = torch.arange(128, 256, dtype=torch.float64)
    dtypes = {448.0: "float8_e4m3fn", 57344.0: "float8_e5m2", 127.0: "int8", 224.0: "float8_e4m3fn"}
    for (limit, dtype), division in itertools.product(dtypes.items(), ("true", "reciprocal")):
        quantization = Quantization(128, dtype, limit=limit, scale_division=division)
        assert ("QUOTIENT0", "2") in instance(spec(128, quants=[quantization]), SM90).defines
        inverse = division == "reciprocal"
        amax = torch.arange(128, 256, dtype=torch.float32)
        scale = amax * torch.tensor(1.0 / limit) if inverse else amax / torch.tensor(limit)
        exact = (y / scale.double().unsqueeze(1)).float()
        for off in (-1, 0, 1):
            near = ((1.0 / scale).view(torch.int32) + off - 2).view(torch.float32).double()
            error = (1.0 - scale.double() * near).float().double()
            rest = ((error + error * error).float().double() * near).float().double().unsqueeze(1)
            quotient = (y * near.unsqueeze(1) + (y * rest).float().double()).float()
            assert torch.equal(quotient, exact), (limit, inverse, off)
