"""The row kernel against eager PyTorch: every family, special values, vector widths."""

from __future__ import annotations

import dataclasses
import itertools
import platform

import pytest
import torch

from lowering.families.row import instance
from lowering.targets import Target
from patterns.contracts import GatedActivation
from tests.families.host_kernels import assert_same, run
from tests.families.row_cases import CASES, CPU, Q128, SM90, integer_inputs, spec
from tests.families.row_reference import check, reference

# Those of AMD are not emulated: tests/gfx950 executes their machine code in the same test.
EVERY_CASE = list(itertools.product(CASES, [CPU, SM90]))


@pytest.mark.parametrize(("name", "target"), EVERY_CASE, ids=lambda value: getattr(value, "name", value))
def test_equals_eager_torch(name: str, target: Target, launcher) -> None:
    case = CASES[name]
    many = 17 if target is CPU or case.hidden < 2048 else 6  # fibers take their time
    check(case, target, launcher, [(0, 0), (1, 0), (3, 1), (many, 0), (5, 5)])


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
def test_rows_of_any_length_where_nothing_depends_on_all(target: Target, launcher) -> None:
    for case in (
        spec(18432, gate=GatedActivation("silu"), quants=[Q128]),
        spec(20480, rounding=None, quants=[Q128]),
        spec(1003, gate=GatedActivation("silu"), writes_y=True),
    ):
        kernel = instance(case, target)
        inputs = integer_inputs(case, 2)
        assert_same(run(kernel, launcher(kernel), inputs, 2), reference(case, inputs), kernel.entry)


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["plain", "none", "f32", "f16_once", "no_floor"])
def test_special_values(name: str, target: Target, launcher) -> None:
    """NaN, infinity, zeros of both signs, subnormals and the largest values, each in a row of its own."""
    case = CASES[name]
    dtype = getattr(torch, case.dtype)
    finfo = torch.finfo(dtype)
    specials = [
        torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        finfo.smallest_normal / 4,
        finfo.max,
        -finfo.tiny,
    ]
    inputs = integer_inputs(case, 2 * len(specials) + 2)
    x = inputs[0]
    for row, value in enumerate(specials):
        x[row, 7] = value
        x[len(specials) + row] = value
    x[-1] = torch.tensor([-0.0, 0.0]).repeat(case.hidden // 2)
    x[-2] = finfo.smallest_normal / 4
    kernel = instance(case, target)
    # A row of the largest value has no exact sum of squares where that does not overflow.
    keep = [
        r for r in range(len(x)) if not (case.norm and case.dtype == "float16" and x[r].abs().max() > 60000)
    ]
    actual = run(kernel, launcher(kernel), inputs, len(x))
    expected = reference(case, inputs)
    assert_same([a[keep] for a in actual], [e[keep] for e in expected], name)


def test_flushed_subnormals_do_not_leak_in(launcher) -> None:
    """IREE's workers flush subnormals to zero; the kernel does not, and leaves the mode as it was."""
    case = CASES["no_floor"]
    kernel = instance(case, CPU)
    x = torch.full((3, case.hidden), torch.finfo(torch.bfloat16).smallest_normal / 8, dtype=torch.bfloat16)
    expected = reference(case, [x])
    launch = launcher(kernel)
    torch.set_flush_denormal(True)
    try:
        actual = run(kernel, launch, [x], 3)
        still_flushed = float(torch.tensor(1e-38) * 0.01) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)
    assert still_flushed


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["once", "add_exact_all", "none"])
def test_random_rows(name: str, target: Target, launcher) -> None:
    """Where the order of the sum can show, it moves few values by one step."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in integer_inputs(case, 16)]
    kernel = instance(case, target)
    actual, expected = run(kernel, launcher(kernel), inputs, 16), reference(case, inputs)
    for a, e in zip(actual, expected, strict=True):
        if a.dtype == torch.float8_e4m3fn:
            steps = (a.view(torch.int8).int() - e.view(torch.int8).int()).abs()
            assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
        elif a.dtype == torch.float32:
            torch.testing.assert_close(
                a, e, rtol=2**-8 if case.norm and case.norm.rounding == "once" else 2**-20, atol=0
            )
        else:
            assert (a != e).float().mean() < 1e-3


@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_other_vector_widths(arch: str, launcher) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these are x86-64 levels")
    if arch == "x86-64-v4" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this host has no AVX-512")
    target = dataclasses.replace(CPU, arch=arch)
    for name in ("add_exact_all", "f16_twice", "f32", "plain", "norm_any_length"):
        inputs = integer_inputs(CASES[name], 5)
        kernel = instance(CASES[name], target)
        assert_same(run(kernel, launcher(kernel), inputs, 5, 1), reference(CASES[name], inputs), (name, arch))
