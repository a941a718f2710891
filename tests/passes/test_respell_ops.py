"""Operations on indices, masks, bits and empty tensors that torch-mlir lowers wrongly or not at all."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

import lowering
from lowering.errors import CompileError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([True, False, True, True, False])
FEW = torch.tensor([[0, 2]] * 5)
SOME, OTHERS = torch.tensor([3, 2, 3]), torch.tensor([0, -1, 0])
UPDATES = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def check(function, args, *more, shapes=None):
    """``function`` compiled for ``args`` is what eager computes from them, and from each of ``more``."""
    dynamic = None if shapes is None else (tuple(shapes),)
    program = lowering.load(lowering.compile(Function(function), args, dynamic_shapes=dynamic).vmfb)
    for each in (args, *more):
        kept = [x.clone() for x in each]
        ours, eager = program(*each), function(*each)
        ours, eager = (x if isinstance(x, tuple) else (x,) for x in (ours, eager))
        for number, (a, b) in enumerate(zip(ours, eager, strict=True)):
            # Sums and interpolations of a few float32 values, in another order.
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, n=number: f"result {n}: {m}"
            )
        assert all(map(torch.equal, each, kept))


def test_axes_of_a_scatter_may_count_from_the_end():
    check(
        lambda x, i, v: (
            x.scatter(-1, i, 1.0),
            x.scatter(-1, i, v),
            x.scatter(-2, i, 2.0),
            x.scatter_add(-1, i, v),
            x.scatter_reduce(-1, i, v, "amax"),
            torch.zeros_like(x).scatter(-1, i, x[:, :2]) * x,
        ),
        (X, FEW, UPDATES),
    )


def test_masks_select_and_are_put():
    def masked(x, m, rows, v):
        return (
            x[m],
            x[rows],
            x.T[:, rows] * 2,
            x.masked_select(m),
            x.index_put((m,), torch.tensor(1.5)),
            x.index_put((rows,), v),
            x.masked_scatter(m, x * 2),
        )

    check(masked, (X, X > 0, ROWS, UPDATES[:3].repeat(1, 2)), (-X, X > 0.5, ~~ROWS, UPDATES[:3].repeat(1, 2)))


def test_a_mask_with_sizes_unknown():
    a, b = Dim("a"), Dim("b")
    check(
        lambda x, m: (x[:, m] * 2, m.nonzero()),
        (torch.randn(3, 5, 4), torch.randn(5, 4) > 0),
        (torch.randn(1, 2, 4), torch.randn(2, 4) > 0),
        (torch.randn(2, 7, 4), torch.zeros(7, 4, dtype=torch.bool)),
        shapes=({0: a, 1: b}, {0: b}),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_both_widths_from_both_ends(dtype):
    def indexed(x, i):
        return (
            x[i],
            x[:, i],
            x[i, i.flip(0)],
            x[None, :, None, i],
            x[i[:, None], i],
            x.index_put((i,), torch.tensor(3.0)),
            x.index_put((i,), x[:4], accumulate=True),
            x.index_select(0, i % 4),
            F.embedding(i % 4, x),
        )

    check(indexed, (X, torch.tensor([0, -1, -3, 1], dtype=dtype)))


def test_masks_and_scatters_with_two_sizes_unknown():
    def masked(x, m, i):
        return (
            x[m],
            x.masked_scatter(m, x * 2),
            x.index_put((m,), x[m] * 3),
            x.scatter(1, i, 2.0),
            x.scatter_add(-1, i, x),
        )

    def drawn(b, s):
        return torch.randn(b, s), torch.rand(b, s) > 0.4, torch.randint(0, s, (b, s))

    size = {0: Dim("b"), 1: Dim("s")}
    check(masked, drawn(2, 5), drawn(1, 1), drawn(3, 7), drawn(7, 2), shapes=(size, size, size))


def test_several_indices_with_a_size_unknown():
    i, j = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])
    check(
        lambda x, i, j: (x[i, :, j], x[:, i[:, None], j], x[i[:, None], j], x[..., i, j]),
        (torch.randn(5, 4, 6), i, j),
        (torch.randn(3, 4, 6), i, j),
        shapes=({0: Dim("n")}, None, None),
    )


def test_updates_at_a_few_indices_with_two_sizes_unknown():
    """In the order of the indices, of which some are equal and some count from the end."""

    def updated(x, y, i, j):
        n = torch.cat([i, j + 1]).expand(*y.shape[:-1], 6)
        v = y.float()
        w = v.cumsum(-1)[..., :6]
        put = torch.ops.aten.index_put
        return (
            y.scatter_add(-1, n[..., :1], y[..., :1]),
            v.scatter_add(-1, n, w),
            v.scatter(-1, n, w * 2),
            y.scatter(3, n, 0.1),
            (y > 0).scatter(-1, n[..., :2], True),
            v.scatter(-1, n[:1], w),
            x[1:-1].index_put((i,), torch.zeros(8)),
            x.index_put((i,), x[:3] * 2),
            x.index_put((i[:1],), x[:1], accumulate=True),
            put(v, [None, None, j[:2, None], i[:2]], w[0, 0, 0, :2], True),
            put(v, [j[:2] % 2, None, None, i[:2]], x[0, 0]),
        )

    def drawn(t, s):
        return torch.randn(t, 8), torch.randn(2, t, s, 8).bfloat16(), SOME, OTHERS

    a, b = Dim("a", min=6), Dim("b", min=5)
    check(updated, drawn(7, 5), drawn(6, 9), shapes=({0: a}, {1: a, 2: b}, None, None))


def test_indices_of_a_transposed_tensor_are_filled():
    def filled(x, i):
        return (
            x.transpose(0, 1).index_fill(2, i, 2),
            x[:, :, ::2].index_fill(-1, i, 3),
            x.mT.index_fill(0, i[2:], torch.tensor(3.5)),
            (x > 0).mT.index_fill(1, i[2:], True),
            x.sum().index_fill(0, i[2:] * 0, 3.0),
        )

    size = {0: Dim("a", min=3), 1: Dim("b", min=5)}
    i = torch.tensor([3, -1, 2])
    check(filled, (torch.randn(5, 6, 8), i), (torch.randn(3, 9, 8), i), shapes=(size, None))


def test_axes_of_many_with_two_sizes_unknown():
    def reduced(x):
        return (
            x.cumsum(-4),
            x.half().argmax(-4, keepdim=True),
            x.argmin(0),
            x.argmax(2),
            x.roll(1, -2),
            x.roll((-1, 2), (1, 2)),
            torch.fmax(x, x.mean()),
            torch.fmin(x.sum(-1), torch.tensor(torch.nan)),
        )

    size = {1: Dim("a"), 2: Dim("b")}
    check(reduced, (torch.randn(2, 8, 3, 64),), (torch.randn(2, 5, 7, 64),), shapes=(size,))


def test_what_is_known_is_compared_with_numbers_of_another_kind():
    def compared(x):
        zeros, whole = torch.zeros_like(x), torch.ones_like(x, dtype=torch.int32)
        true = torch.ones_like(x, dtype=torch.bool)
        return zeros < 0, zeros >= 0, zeros == 0, whole > 0.5, whole != 1.0, true > 0, true == 1, true < 1

    check(compared, (X,))


def test_nothing():
    check(
        lambda x: (
            x @ torch.ones(0, 3),
            F.linear(x, torch.ones(3, 0), torch.ones(3)),
            torch.addmm(torch.ones(3), x, torch.ones(0, 3)),
            torch.bmm(x[None], x.T[None]),
            torch.softmax(x, -1),
            torch.sort(x)[0],
            x.sum(-1),
            x.reshape(0, 5),
        ),
        (torch.zeros(5, 0),),
    )


def test_counts_bits_and_shifts():
    i = torch.randint(-1000, 1000, (30,), generator=torch.Generator().manual_seed(0))
    check(
        lambda i: (
            F.one_hot(i % 8, 8),
            torch.bincount(i % 8, minlength=8),
            torch.histc((i % 8).float(), 8, 0, 7),
            torch.histc(i.float(), 5),
            *(i | 3, i ^ 3, i & 3, i >> 1, i << 2),
            (i.to(torch.int32).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15,
        ),
        (i,),
    )


def test_places_in_ordered_rows():
    bounds = torch.tensor([-1.0, 0.0, 0.0, 2.0, math.inf])
    x = torch.tensor([[-2.0, -1.0, -0.0, 1.0], [2.0, 3.0, math.inf, 4.0]])
    check(
        lambda bounds, x: (
            torch.searchsorted(bounds, x),
            torch.searchsorted(bounds, x, right=True, out_int32=True),
            torch.searchsorted(torch.stack([bounds, bounds * 2]), x, side="right"),
            torch.searchsorted(bounds.flip(0), x, sorter=torch.arange(4, -1, -1)),
            torch.searchsorted(bounds, 0.5),
            torch.searchsorted(bounds, x.log()),
            torch.bucketize(x, bounds[1:], right=True),
        ),
        (bounds, x),
    )


def test_normalisations_and_interpolations():
    x = torch.randn(2, 4, 5, 5)
    check(
        lambda x: (
            F.batch_norm(x, torch.zeros(4), torch.full((4,), 2.0)),
            F.instance_norm(x),
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=2, mode="bicubic"),
            F.pad(x, (-1, 2, 1, -1)),
        ),
        (x,),
    )


def test_complex_times_real():
    def turned(x, i):
        whole = torch.view_as_complex(x)
        turns = torch.polar(x[..., 0].abs(), x[..., 1])
        products = (whole[i] * 2, turns * x[..., 0], x[..., 0] * whole)
        return *map(torch.view_as_real, products), whole.abs()

    check(turned, (torch.randn(5, 8, 2), torch.tensor([0, 2])))


def test_a_quantization_of_unknown_rows_is_refused_by_name():
    class Quantization(torch.nn.Module):
        def forward(self, x):
            return torch.ops.lowering.group_quant(x, 128)

    with pytest.raises(CompileError, match=r"test_respell_ops.py:\d+: lowering.group_quant .* last axis"):
        lowering.compile(Quantization(), (torch.randn(4, 512),), dynamic_shapes=({1: 128 * Dim("groups")},))


def test_reductions_of_a_tensor_without_axes():
    """Along the axis that it does not have, which torch allows."""

    def reduced(x):
        n = x.sum()
        return (
            *(n.amax(-1), n.amin(0), *n.max(0), *n.min(-1), (n > 0).any(0), n.prod(0)),
            *(n.var(0, correction=0), n.softmax(-1), n.log_softmax(0), n.logsumexp(0)),
            *(n.argmax(), n.argmin(0), n.argmax(0, keepdim=True), n.sum(0), n.mean(-1)),
        )

    check(reduced, (torch.randn(4, 8),))


class Experts(torch.nn.Module):
    """The product of a mixture of experts, and zeros with the strides of a transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 16, 32).bfloat16(), requires_grad=False)

    def forward(self, x, offs):
        return torch._grouped_mm(x, self.weight, offs=offs), torch.zeros_like(x.transpose(0, 1)) + 1


def test_a_product_of_groups_of_rows_at_every_division():
    model, rows = Experts(), torch.export.Dim("rows", max=64)
    x, offs = torch.randn(24, 16).bfloat16(), torch.tensor([8, 8, 24], dtype=torch.int32)
    program = lowering.load(lowering.compile(model, (x, offs), dynamic_shapes=({0: rows}, None)).vmfb)
    for ends, count in (([8, 8, 24], 24), ([0, 3, 40], 40), ([5, 5, 5], 5)):
        x, offs = torch.randn(count, 16).bfloat16(), torch.tensor(ends, dtype=torch.int32)
        product, ones = program(x, offs)
        group = (torch.arange(count)[:, None] >= offs).sum(-1)
        exact = torch.einsum("sk,skn->sn", x.double(), model.weight[group].double())
        # Sums of 16 products in float32, rounded once.
        assert (product.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert torch.equal(ones, torch.ones(16, count).bfloat16())
    behind = program(torch.randn(9, 16).bfloat16(), torch.tensor([2, 3, 5], dtype=torch.int32))[0]
    assert not behind[5:].any() and behind[:5].any()
