"""What is computed of a scatter into a constant is computed before it, and is the same bit for bit."""

from __future__ import annotations

import torch

import lowering

INF = float("inf")


def scattered(x: torch.Tensor, ids: torch.Tensor, source: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full_like(x, value).scatter(1, ids, source)


class Scatters(torch.nn.Module):
    """Constants of which a cast or sigmoid is exact, and others; scatters that are read once, and twice."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, ...]:
        twice = scattered(x, ids, source, -INF)
        return (
            *(scattered(x, ids, source, value).sigmoid() for value in (-INF, 0.0, INF, 0.3, float("nan"))),
            *(scattered(x, ids, source, value).bfloat16() for value in (-INF, 0.0, 1.0000001)),
            torch.full(x.shape, -INF).scatter(1, ids, source).sigmoid().half(),
            (twice.sigmoid() + twice),
            scattered(x, ids, torch.cat([source, source], 1), -INF).sigmoid(),
            scattered(x, ids, source, -INF).int().sigmoid(),
        )


def test_a_function_of_a_scatter() -> None:
    x, ids = torch.randn(5, 9), torch.stack([torch.randperm(9)[:4] for _ in range(5)])
    source = torch.tensor([[0.5, -INF, 3.0, float("nan")]] * 5)
    program = lowering.load(lowering.compile(Scatters(), (x, ids, source)).vmfb)
    for number, (ours, eager) in enumerate(
        zip(program(x, ids, source), Scatters()(x, ids, source), strict=True)
    ):
        assert ours.dtype == eager.dtype, number
        torch.testing.assert_close(ours, eager, rtol=2**-22, atol=0.0, equal_nan=True, msg=str(number))
