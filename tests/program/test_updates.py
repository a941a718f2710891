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


class Routed(nn.Module):
    """Scatter into fillings of one size, which only IREE knows: a norm's kernel is before each."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(16, 4, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores: list[Tensor] = []
        for router in self.routers:
            x = torch.ops.lowering.rms_norm(x, torch.ones(16), 1e-6)
            logits = router(x)
            values, chosen = logits.topk(1, 1)
            scores.append(torch.full_like(logits, float("-inf")).scatter_(1, chosen, values).sigmoid())
            x = x * scores[-1].sum(-1, keepdim=True)
        return tuple(scores)


def test_fillings_that_turn_out_to_be_one_are_updated_apart() -> None:
    model, tokens = Routed().requires_grad_(False), torch.export.Dim("tokens")
    program = lowering.load(
        lowering.compile(model, (torch.randn(9, 16),), dynamic_shapes=({0: tokens},)).vmfb
    )
    for size in (1, 14, 30):
        x = torch.randn(size, 16)
        for got, expected in zip(program(x), model(x), strict=True):
            assert torch.allclose(got, expected, atol=1e-5), size


class Counted(nn.Module):
    """Count which element of each row is the largest; nothing else reads where it is."""

    def forward(self, x: Tensor) -> Tensor:
        largest = x.argmax(-1)
        return torch.zeros(4, dtype=torch.long).index_add(0, largest, torch.ones_like(largest))


def test_an_update_at_the_places_of_the_largest() -> None:
    model, rows = Counted(), torch.export.Dim("rows")
    program = lowering.load(lowering.compile(model, (torch.randn(9, 4),), dynamic_shapes=({0: rows},)).vmfb)
    for size in (1, 9, 40):
        x = torch.randn(size, 4)
        assert torch.equal(program(x), model(x)), size


class Places(nn.Module):
    """Tell where the extremes are, along a dynamic axis and of all."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        four = x.unflatten(-1, (2, 4))
        return (
            *(x.argmax(1), x.argmin(0, keepdim=True), x.argmax(-1), x.argmin(), x.argmax(None, True)),
            *(four.argmin(1), four.argmax(3), x[0, 0, 0].argmax(0)),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_the_places_of_extremes_along_dynamic_axes(dtype: torch.dtype) -> None:
    def made(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, 8) * 3).round().abs().to(dtype)  # many are equal: the first counts

    model, shapes = Places(), {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("columns", min=2)}
    program = lowering.load(lowering.compile(model, (made(5, 6),), dynamic_shapes=(shapes,)).vmfb)
    for size in ((5, 6), (7, 3), (64, 200)):
        x = made(*size)
        if dtype.is_floating_point:
            x[1, 2, 3] = torch.nan  # the largest and the smallest
        assert all(map(torch.equal, program(x), model(x)))


class Added(nn.Module):
    """Update the second result of a kernel; another call of its name has one result."""

    def forward(self, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = torch.ops.lowering.add_rms_norm(x, y, w, 1e-6)[0]
        made, total = torch.ops.lowering.add_rms_norm(first, first, w, 1e-5)
        updated = made.contiguous().clone()
        updated[..., 0:1].fill_(4)
        return updated, total


def test_an_update_of_what_a_kernel_with_several_results_makes() -> None:
    model, args = Added(), (*torch.randn(2, 4, 128), torch.randn(128))
    results = lowering.load(lowering.compile(model, args).vmfb)(*args)
    for ours, eager in zip(results, model(*args), strict=True):
        torch.testing.assert_close(ours, eager)  # sums in another order


class Placed(nn.Module):
    """Put rows into a cache, at indices that have two axes of unknown sizes together."""

    def forward(self, cache: Tensor, rows: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        batch, head = torch.arange(cache.shape[0])[:, None], torch.zeros_like(at)[None]
        heads = torch.arange(2)[None, :, None]
        return (
            cache.index_put((batch, head, at[None]), rows[:, 0]),
            cache.index_put((batch, head, at[None] - 16), rows[:, 1], accumulate=True),
            cache.index_put((batch, head, at[None]), torch.tensor(2.0)),
            cache.index_put((batch[..., None], heads, at[None, None]), rows),
            cache.transpose(1, 2).index_put((batch, at[None]), rows.transpose(1, 2)),
        )


def test_updates_at_indices_of_several_unknown_sizes() -> None:
    def arguments(batch: int, count: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 2, 16, 8), torch.randn(batch, 2, count, 8), torch.arange(count) + 3

    batch, count = torch.export.Dim("batch"), torch.export.Dim("count", max=12)
    shapes = ({0: batch}, {0: batch, 2: count}, {0: count})
    model = Placed()
    program = lowering.load(lowering.compile(model, arguments(2, 3), dynamic_shapes=shapes).vmfb)
    for sizes in ((2, 3), (1, 1), (3, 5)):
        given = arguments(*sizes)
        for number, (got, expected) in enumerate(zip(program(*given), model(*given), strict=True)):
            assert torch.allclose(got, expected, atol=1e-6), (sizes, number)


class OneRow(nn.Module):
    """A value of one row, of which an element is put into one tensor and which another is made of."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.log1p(x.abs())
        z = y + 1
        z[..., 1] = y[..., 0]
        return y.select_scatter(x[..., 0], -1, 1) * 2, z


def test_what_an_element_is_picked_from_is_computed_whole() -> None:
    """IREE computes the element alone, where both are made in one dispatch."""
    x = torch.randn(1, 8)
    program = lowering.load(lowering.compile(OneRow(), (x,)).vmfb)
    for ours, eager in zip(program(x), OneRow()(x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
