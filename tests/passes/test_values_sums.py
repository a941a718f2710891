"""Sums of many elements on the CPU, against float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

import lowering


class Sums(nn.Module):
    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return (
            x.abs().sum(),
            x.square().mean(),  # beside the sum of the same elements: each has an accumulator of its own
            x.abs().sum(0),
            (x + 2).mean((0, 1), keepdim=True),
            torch.linalg.vector_norm(x),
            rows.abs().sum(-1),
            rows.bfloat16().abs().mean(-1),
            (rows > 0).float().sum() + 1,
        )


def test_long_sums_are_as_near_as_eagers() -> None:
    """In float32, one after the other, these lose up to 3%."""
    model, size = Sums(), Dim("size", min=2)
    examples = torch.randn(4, 4096), torch.randn(2, 5000)
    program = lowering.load(lowering.compile(model, examples, dynamic_shapes=({0: size}, None)).vmfb)
    for count in (2, 1024):
        x, rows = torch.randn(count, 4096) + 0.3, torch.randn(2, 5000)
        for number, (got, eager) in enumerate(zip(program(x, rows), model(x, rows), strict=True)):
            exact = model(x.double(), rows.double() if number != 6 else rows)[number].double()
            allowed = 2.0**-8 if eager.dtype == torch.bfloat16 else 2.0**-21
            assert ((got.double() - exact).abs() <= allowed * exact.abs()).all(), number


def test_softmax_and_other_long_reductions_are_eagers() -> None:
    class Others(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.softmax(-1), x.amax(-1), x.argmax(-1), x.std(-1), x.logsumexp(0), x.prod(0)

    model, x = Others(), torch.randn(3, 9000)
    program = lowering.load(lowering.compile(model, (x,)).vmfb)
    for number, (got, eager) in enumerate(zip(program(x), model(x), strict=True)):
        assert torch.allclose(got, eager, rtol=1e-5, atol=1e-6), number


def test_a_deviation_whose_square_overflows() -> None:
    class Deviations(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.std(0), x.std(), x.std((0, 1), keepdim=True, unbiased=False), x.bfloat16().std(-1)

    model = Deviations()
    program = lowering.load(lowering.compile(model, (torch.randn(6, 8),)).vmfb)
    for x in (torch.randn(6, 8), torch.randn(6, 8) * 1e38):
        for number, (got, exact) in enumerate(zip(program(x), model(x.double()), strict=True)):
            assert torch.allclose(got.double(), exact.double(), rtol=[1e-6, 2.0**-8][number == 3]), number


def test_running_sums_and_products_are_eagers() -> None:
    """PyTorch computes them in float64 on the CPU, where what overflows in float32 may come back."""

    class Running(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.cumsum(-1), x.cumprod(-1), x.cumsum(0, dtype=torch.float32), x.bfloat16().cumsum(-1)

    model, x = Running(), torch.randn(3, 9000)
    x[0, 3], x[0, 8], x[0, 40] = 3e38, 3e38, -torch.inf
    program = lowering.load(lowering.compile(model, (x,)).vmfb)
    for number, (got, eager) in enumerate(zip(program(x), model(x), strict=True)):
        # A product of so many numbers ends among the denormals, which are zeros here.
        allowed = torch.finfo(torch.float32).tiny if number == 1 else 0.0
        assert torch.allclose(got, eager, rtol=0.0, atol=allowed, equal_nan=True), number
