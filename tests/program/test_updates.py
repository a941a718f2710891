"""Updates whose values come from what they update: all is read before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowering

ROWS = torch.tensor([1, 6, 3, 4])


class OfItself(nn.Module):
    """Each value is read at a place that another has been written to, if they are not kept apart."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z, row = y + 1, x[:1] * 2
        columns = ROWS.expand(*y.shape[:-1], 4)
        zeros, mask = torch.zeros_like(y), y > 3
        return (
            x.index_put((ROWS,), x[:4]),
            x.index_put((ROWS,), x[:4] * 2),
            x.index_put((ROWS,), x.flip(0)[:4]),
            x.index_put((ROWS,), x.sum(0).expand(4, 8)),
            x.index_put((ROWS,), x[:4], accumulate=True),
            x.scatter(0, ROWS[:, None].expand(4, 8), x[:4]),
            z.index_put((ROWS,), z[ROWS - 1]),
            z.scatter(-1, columns, z[..., :4]),
            z.scatter_add(-1, columns, z[..., :4]),
            y.index_copy(-1, ROWS, y[..., :4]),
            y.index_add(-1, ROWS, y[..., :4]),
            y.index_put((ROWS,), y[:4]),
            y.index_put((ROWS,), y[:4], accumulate=True),
            z.slice_scatter(z[..., :4], -1, 2, 6),
            z.select_scatter(z[:, 0], -1, 3),
            x.slice_scatter(x[:-1], 0, 1),
            x.slice_scatter(x[:, :-1], 1, 1),
            x.slice_scatter(x[:2], 0, 1, 3).slice_scatter(x[:2], 0, 2, 4),
            z.slice_scatter(z[:2] * 2, 0, 1, 3),
            x.scatter(0, ROWS[:, None].expand(4, 8), x),
            row.slice_scatter(row[:, :2], -1, 1, 3),
            row[None].slice_scatter(row[None, :, :2], -1, 1, 3),
            # Two updates of one tensor, of zeros and of what is no number.
            zeros.index_copy(0, ROWS[:1], y[:1]),
            zeros.scatter(-1, columns, y[..., :4]),
            mask.index_fill(0, ROWS, True),
            mask.scatter(-1, columns, True),
        )


def test_updates_with_values_of_what_they_update() -> None:
    model, x = OfItself(), torch.randn(8, 8)
    rows = torch.export.Dim("rows", min=8)
    program = lowering.load(
        lowering.compile(model, (x, torch.randn(9, 8)), dynamic_shapes=(None, {0: rows})).vmfb
    )
    for size in (9, 30):
        y = torch.randn(size, 8)
        for number, (got, expected) in enumerate(zip(program(x, y), model(x, y), strict=True)):
            assert torch.allclose(got.float(), expected.float(), atol=1e-5), number


class WithIt(nn.Module):
    """What is put is computed with what is there: one dispatch has both for results."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z, powers = x + 1, x.exp()
        chosen = torch.where(y > 0, y, z)
        twice = torch.zeros(10, 8) + y[0]
        twice[0:3] = powers[:3] * 2
        twice[2:5] = powers[:3] * 3
        steps = x + 2
        steps[-1, 1::3] = y[-1, 1::3]
        scale = x.abs().amax(-1, keepdim=True)
        quotient, scales = x / scale, scale.squeeze(-1).clone()
        scales[0:1] = 4
        halves = x.unflatten(-1, (2, 4))
        exchanged = halves.clone()
        exchanged[:, 1] = halves[:, 0] * y[:, :4]
        return z.slice_scatter(chosen), twice, steps, quotient, scales, exchanged


class OfZeros(nn.Module):
    """Two tensors of zeros, of which one is updated: they are not one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        value, place = torch.topk(torch.softmax(x, -1), 1, dim=-1)
        put = torch.zeros_like(x).scatter(-1, place, value)
        zeros = torch.zeros_like(torch.ops.lowering.rms_norm(x, self.weight, 1e-5))
        zeros[-1, ..., ::2] = put[-1, ..., ::2]
        return zeros, place


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", [WithIt(), OfZeros()], ids=["computed with", "zeros"])
def test_updates_computed_with_what_they_update(model: nn.Module, dynamic: bool) -> None:
    shape = (6, 8) if isinstance(model, WithIt) else (6, 3, 8)
    rows = torch.export.Dim("rows", min=4)
    shapes = ({0: rows}, {0: rows}) if dynamic else None
    program = lowering.load(
        lowering.compile(model, (torch.randn(shape), torch.randn(shape)), dynamic_shapes=shapes).vmfb
    )
    for size in (6, 9) if dynamic else (6,):
        x, y = torch.randn(size, *shape[1:]), torch.randn(size, *shape[1:])
        for number, (got, expected) in enumerate(zip(program(x, y), model(x, y), strict=True)):
            # A sum in another order, of a softmax or an exponential: some units in the last place.
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6), number


class Twice(nn.Module):
    """Each tensor is updated twice."""

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        columns, zeros, z = ROWS.expand(*y.shape[:-1], 4), torch.zeros_like(y), y + 1
        return (
            zeros.index_copy(0, ROWS[:1], y[:1]),
            zeros.scatter(-1, columns, y[..., :4]),
            z.scatter(-1, columns, y[..., :4]),
            z.scatter(-1, columns, y[..., :4] * 2),
        )


def test_a_tensor_that_is_updated_twice_does_not_cost_the_results_their_memory() -> None:
    model, rows = Twice(), torch.export.Dim("rows", min=8)
    compiled = lowering.compile(model, (torch.randn(9, 8),), dynamic_shapes=({0: rows},))
    program = lowering.load(compiled.vmfb)
    assert program["main"].signature.placed == ((0,), (1,), (2,), (3,)) and not compiled.report.remarks
    for size in (9, 30):
        y = torch.randn(size, 8)
        assert all(map(torch.equal, program(y), model(y))), size
