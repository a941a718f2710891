"""Linear layers that are not quantized, on the CPU: the kernel against float64, and programs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lowering
from lowering.errors import CompileError
from lowering.families.linear import instance, why_unsupported
from lowering.targets import resolve
from patterns.contracts import LinearSpec
from tests.families.host_kernels import run
from tests.families.test_matmul import VARIANTS, variant

CASES = {
    "several_tiles": LinearSpec(200, 192, "float32"),
    "one_column": LinearSpec(1, 64, "float32", bias=True),
    "bfloat16": LinearSpec(130, 320, "bfloat16"),
    "bfloat16_bias": LinearSpec(33, 64, "bfloat16", bias=True),
    "float16_bias": LinearSpec(97, 128, "float16", bias=True),
}
_HALF_A_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def operands(case: LinearSpec, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, case.depth), (case.columns, case.depth), (case.columns,)][: 2 + case.bias]
    dtype = getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_linear(case: LinearSpec, actual: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Within the roundings of a float32 sum in any order, and the one of the result."""
    a, b, *bias = (tensor.double() for tensor in tensors)
    value, magnitude = a @ b.T, a.abs() @ b.abs().T
    if bias:
        value, magnitude = value + bias[0], magnitude + bias[0].abs()
    accumulated = (case.depth + 2) * 2.0**-24 * magnitude
    allowed = accumulated + _HALF_A_STEP[case.dtype] * (value.abs() + accumulated) + 2.0**-25
    assert actual.shape == value.shape and actual.dtype == getattr(torch, case.dtype)
    assert ((actual.double() - value).abs() <= allowed).all(), case


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_within_the_bound(name: str, arch: str, launcher) -> None:
    """Any number of rows, and pointers aligned to nothing but their element."""
    case = CASES[name]
    kernel = instance(case, variant(arch))
    launch = launcher(kernel)
    for shift, rows in enumerate((0, 1, 2, 3, 17, 64, 129)):
        tensors = operands(case, rows)
        (actual,) = run(kernel, launch, tensors, rows, shift)
        assert_linear(case, actual, tensors)


def test_the_bound_is_no_formality() -> None:
    case = CASES["several_tiles"]
    a, b = operands(case, 5)
    assert_linear(case, a @ b.T, [a, b])
    short = b.clone()
    short[:, -1] = 0
    with pytest.raises(AssertionError):
        assert_linear(case, a @ short.T, [a, b])


def test_infinite_and_nan_elements(launcher) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        case = LinearSpec(20, 64, dtype)
        a, b = operands(case, 3)
        a[0, 3], b[4, 60], b[5, 1] = torch.inf, torch.nan, -torch.inf
        (found,) = run(
            instance(case, variant("native")), launcher(instance(case, variant("native"))), [a, b], 3
        )
        expected = (a.double() @ b.double().T).to(found.dtype)
        assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize(
    ("case", "target", "reason"),
    [
        (LinearSpec(64, 64, "float32"), "gfx950", "written for the cpu, not for gfx950"),
        (LinearSpec(64, 64, "float64"), "cpu", "computes in bfloat16, float16, float32, not float64"),
        (LinearSpec(64, 96, "float32"), "cpu", "takes whole 64 features, not 96"),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(case: LinearSpec, target: str, reason: str) -> None:
    assert reason in (why_unsupported(case, resolve(target)) or "")
    with pytest.raises(CompileError, match=reason):
        instance(case, resolve(target))


# -- programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (4,)])
def test_a_program(bias: bool, leading: tuple[int, ...]) -> None:
    layer = torch.nn.Linear(128, 200, bias=bias).requires_grad_(False)
    shapes = ({0: torch.export.Dim("T")},)
    compiled = lowering.compile(layer, (torch.randn(7, *leading, 128),), dynamic_shapes=shapes)
    assert [launch.kernel.source for launch in compiled.dispatched.launches] == ["matmul.c"]
    program = lowering.load(compiled.vmfb)
    for count in (0, 1, 2, 40):
        x = torch.randn(count, *leading, 128)
        torch.testing.assert_close(program(x), layer(x))


def test_what_has_no_kernel_is_computed_by_iree() -> None:
    """Features that fill no block; a weight whose size is unknown until run time."""

    class Given(torch.nn.Module):
        def forward(self, x, weight):
            return torch.nn.functional.linear(x, weight)

    def launches(module: torch.nn.Module, *args: torch.Tensor, shapes=None) -> int:
        compiled = lowering.compile(module, args, dynamic_shapes=shapes)
        torch.testing.assert_close(lowering.load(compiled.vmfb)(*args), module(*args))
        return len(compiled.dispatched.launches)

    x = torch.randn(3, 64)
    assert launches(torch.nn.Linear(96, 8).requires_grad_(False), torch.randn(3, 96)) == 0
    assert launches(Given(), x, torch.randn(8, 64), shapes=(None, {0: torch.export.Dim("N")})) == 0
    assert launches(Given(), x, torch.randn(8, 64)) == 1


def test_the_spec_says_what_distinguishes_kernels() -> None:
    case = CASES["several_tiles"]
    names = {instance(case, variant("native")).entry}
    for change in ({"bias": True}, {"dtype": "bfloat16"}, {"columns": 201}, {"depth": 256}):
        names.add(instance(dataclasses.replace(case, **change), variant("native")).entry)
    assert len(names) == 5
