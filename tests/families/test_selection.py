"""A top-k by itself: the kernel of ``kernels/select.c`` chooses what eager PyTorch chooses, equals too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering.families.selection import instance, why_unsupported
from lowering.targets import resolve
from patterns.contracts import SelectionSpec
from tests.families.host_kernels import launcher, run

CPU = resolve("cpu")

# Few of many are kept in a heap; of the others a partition is made, which for most is sorted by partitions,
# too.  The last are ordered so that partitions are as uneven as they can be.
CASES = {
    "heap": SelectionSpec(640, 10, "bfloat16"),
    "heap of one": SelectionSpec(64, 1, "float32"),
    "heap, smallest": SelectionSpec(1300, 20, "float16", largest=False),
    "router": SelectionSpec(64, 8, "bfloat16"),
    "router, unsorted": SelectionSpec(256, 6, "bfloat16", sorted=False),
    "smallest of odd rows": SelectionSpec(37, 5, "float16", largest=False),
    "more than an insertion sort takes": SelectionSpec(500, 60, "float32"),
    "all": SelectionSpec(300, 300, "int32"),
    "three of three": SelectionSpec(3, 3, "int64", largest=False),
    "one of two": SelectionSpec(2, 1, "float32"),
}


def rows_with_ties(spec: SelectionSpec, rows: int) -> Tensor:
    """Few different values, one row of equals, and, of floats, NaN, infinities and zeros of both signs."""
    dtype = getattr(torch, spec.dtype)
    x = torch.randint(-9, 10, (rows, spec.elements), generator=torch.Generator().manual_seed(spec.elements))
    x[1] = 1
    x = x.to(dtype)
    if dtype.is_floating_point:
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype)
        x[2:4, ::3] = special.repeat(spec.elements)[: x[2:4, ::3].numel()].reshape(2, -1)
    return x


def adverse(elements: int, dtype: torch.dtype) -> Tensor:
    """An order of which the median of three is always one of the largest: Musser's."""
    half = elements // 2
    x = torch.empty(elements, dtype=torch.int64)
    odd = torch.arange(half)
    x[:half] = torch.where(odd % 2 == 0, odd, half + odd - 1 + half % 2)
    x[half:] = 2 * torch.arange(elements - half) + 1
    return x.to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_orders_equals_as_eager_does(name: str, tmp_path: Path) -> None:
    spec = CASES[name]
    kernel = instance(spec, CPU)
    launch, x = launcher(kernel, tmp_path), rows_with_ties(spec, 70)
    x[4] = adverse(spec.elements, x.dtype)
    x[5] = x[4].flip(0)
    values, places = run(kernel, launch, [x], 70)
    eager = torch.topk(x, spec.count, -1, spec.largest, spec.sorted)
    assert torch.equal(places, eager.indices)
    assert torch.equal(values.nan_to_num(7), eager.values.nan_to_num(7))


def test_what_has_no_kernel() -> None:
    why = why_unsupported(SelectionSpec(64, 8, "float32"), resolve("h200"))
    assert why and "for the cpu, not for sm_90" in why
    for spec in (SelectionSpec(64, 0, "float32"), SelectionSpec(20000, 500, "float32")):
        assert why_unsupported(spec, CPU), "nothing is chosen, or too much is held"
    assert why_unsupported(SelectionSpec(64, 8, "bool"), CPU)


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(64).bfloat16(), requires_grad=False)

    def forward(self, gating: Tensor, x: Tensor, one: Tensor) -> tuple[Tensor, ...]:
        scores = gating.sigmoid()
        places = torch.topk(scores + self.bias, 8, dim=-1)[1]
        weights = scores.gather(-1, places)
        columns = (x[0, :3].round() / 4).reshape(3, 20, 2)
        return (
            weights / weights.sum(-1, keepdim=True),
            places,
            *x.topk(5),
            *x.topk(3, 1, largest=False),
            *one.topk(4),
            *columns.topk(7, dim=1, sorted=False),
        )


def test_routers_of_16_bits_choose_what_eager_chooses() -> None:
    """Bit for bit, ties and all, along every axis of known size."""
    torch.manual_seed(0)
    arguments = torch.randn(9, 64).bfloat16(), torch.randn(2, 9, 40).half(), torch.randint(0, 5, (50,))
    rows = torch.export.Dim("rows", min=4)
    module = Chosen()
    program = lowering.compile(module, arguments, dynamic_shapes=({0: rows}, {1: rows}, None))
    assert program.report.summary()["dispatches"] == 4
    called = lowering.load(program.vmfb)
    for size in (9, 33):
        given = torch.randn(size, 64).bfloat16(), torch.randn(2, size, 40).half(), torch.randint(0, 5, (50,))
        ours, eager = called(*given), module(*given)
        for number in (1, 2, 3, 4, 6, 7, 8, 9):
            assert torch.equal(ours[number], eager[number]), number
        torch.testing.assert_close(ours[0], eager[0])
