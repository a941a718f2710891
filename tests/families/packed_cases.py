"""Products with packed weights, on any target: operands, and what a result may be off by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lowering.families.instance import KernelInstance
from lowering.ops import shuffle_weight, unpacked_weight
from patterns.contracts import LinearSpec
from patterns.packed_matmul import PackedSpec
from tests.families.host_kernels import Launch, run
from tests.families.test_linear import assert_linear


def operands(case: PackedSpec, rows: int) -> list[torch.Tensor | None]:
    """a, codes, scale, zero and bias as ``packed_matmul`` takes them: every code, scales of both signs."""
    generator = torch.Generator().manual_seed(rows)
    groups, dtype = case.depth // case.group, getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(top: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)

    return [
        normal(rows, case.depth).to(dtype),
        integers(256, case.columns, case.row_bytes),
        (0.1 * normal(case.columns, groups)).to(getattr(torch, case.scale_dtype)),
        integers((1 << case.bits) + (case.bits == 4), case.columns, groups) if case.zeros else None,
        normal(case.columns).to(dtype) if case.bias else None,
    ]


def in_memory(case: PackedSpec, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The operands as a kernel is given them."""
    a, codes, scale, zero, bias = tensors
    assert a is not None and codes is not None and scale is not None
    given = [a, shuffle_weight(codes, case.b_layout), scale.t().contiguous()]
    return [*given, *([] if zero is None else [zero.t().contiguous()]), *([] if bias is None else [bias])]


def check(
    kernel: KernelInstance, launch: Launch, counts: Sequence[int], shifts: Callable[[int], int]
) -> None:
    """Run the kernel for each number of rows and compare what it wrote with float64.

    With weights rounded as the contract says: within the roundings of a float32 sum, and of the result.
    """
    case = kernel.spec
    assert isinstance(case, PackedSpec)
    for rows in counts:
        tensors = operands(case, rows)
        a, codes, scale, zero, bias = tensors
        assert a is not None and codes is not None and scale is not None
        weight = unpacked_weight(codes, scale, zero, case.bits).to(a.dtype)
        given = in_memory(case, tensors)
        (actual,) = run(kernel, launch, given, rows, shifts(rows), aligned=["b"])
        linear = LinearSpec(case.columns, case.depth, case.dtype, case.bias)
        assert_linear(linear, actual, [a, weight, *([] if bias is None else [bias])])
