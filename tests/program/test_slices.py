"""Slices that IREE reads wrongly when it is given them as a model writes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowering

ROWS = torch.tensor([3, 1])


class Slices(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = x.shape[1] // 2
        return (
            x[:, :1].index_select(0, ROWS),
            x[:, 2:4].index_select(0, ROWS),
            x[:, 1:3][ROWS, torch.tensor([1, 0])],
            x.scatter(1, torch.tensor([[1], [2], [3], [0]]), x[:, :1]),
            # Halves exchanged, the first of them negated; then what only looks like it.
            torch.cat([-x[..., half:], x[..., :half]], -1),
            torch.cat([-x[..., :half], x[..., half:]], -1),
            torch.cat([-x[..., 1::2], x[..., ::2]], -1),
            torch.cat([-x[..., ::2], x[..., 1::2]], -1),
            torch.cat([-x[..., half:], x[..., half:]], -1),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_slices_are_read_where_they_are(dynamic: bool) -> None:
    x = torch.randn(4, 6)
    shapes = ({1: 2 * torch.export.Dim("half", min=2, max=32)},) if dynamic else None
    program = lowering.load(lowering.compile(Slices(), (x,), dynamic_shapes=shapes).vmfb)
    for columns in (6, 10) if dynamic else (6,):
        x = torch.randn(4, columns)
        for number, (got, expected) in enumerate(zip(program(x), Slices()(x), strict=True)):
            assert torch.equal(got, expected), number
