"""Slices of an axis of unknown size: eager's where it has enough elements, and a refused call where not."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

import lowering
from lowering.errors import LoweringError


class Slices(torch.nn.Module):
    def forward(self, x, y):
        return (
            x[1:-1] + 0,
            x[1::2] + 0,
            x[:, 2:] + 0,
            x[y.shape[0] :] + 0,
            x[: y.shape[0]] + 0,
            torch.slice_scatter(x, y[:2], 0, 1, 3),
            x[-3] + x[2],
            x[-3:] + 0,
        )


@pytest.fixture(scope="module")
def slices():
    n, m = Dim("n", min=6), Dim("m", min=2)
    args = (torch.randn(9, 4), torch.randn(3, 4))
    return lowering.load(lowering.compile(Slices(), args, dynamic_shapes=({0: n}, {0: m})).vmfb)


@pytest.mark.parametrize("n, m", [(9, 3), (6, 2), (9, 7), (12, 2)])
def test_slices_are_those_of_eager(slices, n, m):
    args = (torch.randn(n, 4), torch.randn(m, 4))
    for number, (ours, eager) in enumerate(zip(slices(*args), Slices()(*args), strict=True)):
        assert torch.equal(ours, eager), number


def test_a_symbolic_bound_beyond_the_end(slices):
    with pytest.raises(LoweringError, match="x: size 6 of axis 0"):
        slices(torch.randn(6, 4), torch.randn(7, 4))


@pytest.mark.parametrize(
    "function, what",
    [
        (lambda x: x[:2] + 0, "2 elements"),
        (lambda x: x[-2:] + 0, "2 elements"),
        (lambda x: x[1] + 0, "an element 1"),
        (lambda x: x[-2] + 0, "an element -2"),
    ],
)
def test_a_call_with_fewer_elements_is_refused(function, what):
    class Function(torch.nn.Module):
        def forward(self, x):
            return function(x)

    compiled = lowering.compile(Function(), (torch.randn(5, 4),), dynamic_shapes=({0: Dim("n")},))
    program = lowering.load(compiled.vmfb)
    x = torch.randn(2, 4)
    assert torch.equal(program(x), function(x))
    with pytest.raises(LoweringError, match=f"test_respell_slices.py:.* too short for {what}"):
        program(x[:1])
