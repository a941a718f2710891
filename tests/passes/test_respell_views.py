"""Views with several sizes unknown until run time are those of eager PyTorch, at every size."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

import lowering
from lowering.passes import respell_views

SIZES = [(2, 5), (1, 1), (3, 7), (7, 2), (1, 6)]


class Views(torch.nn.Module):
    """Every kind of view of [b, s, 48], and products that are spelled with views; + 0 makes each a value."""

    def forward(self, x, y):
        b, s, _ = x.shape
        heads = x.view(b, s, 4, 12).transpose(1, 2)
        return (
            x.view(-1, 16).abs().amax(-1),
            x.view(b, s * 8, 6) + 0,
            x.view(s, b, 48) + 0,
            x.transpose(0, 1).reshape(s, b * 4, 12).transpose(0, 1) + 0,
            heads.reshape(b * 4, s, 12) @ heads.reshape(b * 4, s, 12).transpose(1, 2),
            heads.transpose(1, 2).reshape(b * s, -1) + 0,
            heads.flatten() + 0,
            x.unflatten(2, (3, -1)).flatten(1, 2) + 0,
            x[:, :, None].expand(-1, -1, 3, -1).reshape(b, -1, 48) + 0,
            x.repeat_interleave(2, dim=1),
            torch.einsum("bshd,bthd->bhst", heads.transpose(1, 2), y.view(b, -1, 4, 12)),
            torch.cat([x, y], 1).reshape(-1, 4) + 0,
            torch.stack([x, x], 2).flatten(1, 2) + 0,
            x.unsqueeze(0).reshape(b, 1, s, 1, 48) + 0,
        )


@pytest.fixture(scope="module")
def views():
    b, s, t = Dim("b"), Dim("s"), Dim("t")
    args = (torch.randn(2, 5, 48), torch.randn(2, 3, 48))
    return lowering.load(lowering.compile(Views(), args, dynamic_shapes=({0: b, 1: s}, {0: b, 1: t})).vmfb)


@pytest.mark.parametrize("b, s", [size for size in SIZES if size != (1, 1)])
def test_views_are_those_of_eager(views, b, s):
    args = (torch.randn(b, s, 48), torch.randn(b, s + 1, 48))
    for ours, eager in zip(views(*args), Views()(*args), strict=True):
        # Only the products round, and they sum 12 products.
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_sizes_that_the_export_has_ruled_out(views):
    """One of these views made torch.export assume that the sizes differ; the exported module says so too."""
    with pytest.raises(lowering.errors.RunError, match="exported for sizes with"):
        views(torch.randn(1, 1, 48), torch.randn(1, 2, 48))


class Windows(torch.nn.Module):
    """Windows of 4 x 4 of an image, as Swin cuts them, and pixels moved between channels and places."""

    def forward(self, x):
        b, h, w, c = x.shape
        cut = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        pixels = x.permute(0, 3, 1, 2)
        return cut + 0, F.pixel_unshuffle(pixels, 2), F.pixel_shuffle(pixels, 2)


def test_windows_and_pixels():
    b, h, w = Dim("b"), Dim("h"), Dim("w")
    program = lowering.load(
        lowering.compile(
            Windows(), (torch.randn(2, 8, 12, 4),), dynamic_shapes=({0: b, 1: 4 * h, 2: 4 * w},)
        ).vmfb
    )
    for shape in ((2, 8, 12, 4), (1, 8, 8, 4), (3, 8, 16, 4), (3, 12, 8, 4)):
        x = torch.randn(shape)
        for ours, eager in zip(program(x), Windows()(x), strict=True):
            assert torch.equal(ours, eager), shape


def test_attention_with_two_sizes_unknown():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(32, 32)

        def forward(self, q):
            return self.out(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(-1, 32))

    module = Attention()
    compiled = lowering.compile(
        module, (torch.randn(2, 4, 5, 8),), dynamic_shapes=({0: Dim("b"), 2: Dim("s")},)
    )
    program = lowering.load(compiled.vmfb)
    for b, s in SIZES:
        q = torch.randn(b, 4, s, 8)
        # float32 sums of at most 32 products, in another order.
        torch.testing.assert_close(program(q), module(q), rtol=1e-5, atol=1e-5)


def extents(*sizes):
    return [
        respell_views._Extent(size, Counter())
        if isinstance(size, int)
        else respell_views._Extent(1, Counter(size))
        for size in sizes
    ]


@pytest.mark.parametrize(
    "before, after, groups",
    [
        (["b", "s", 64], ["bs", 64], [([0, 1], [0]), ([2], [1])]),
        (["b", "s", 64], ["b", "s", 8, 8], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        (["b", "s"], ["s", "b"], [([0, 1], [0, 1])]),
        (["p", "q", 64], ["r", "t", 8, 8], [([0, 1], [0, 1]), ([2], [2, 3])]),
        (["b"], [1, "b", 1], [([0], [0, 1, 2])]),
        ([1, "b", 1], ["b"], [([0, 1, 2], [0])]),
    ],
)
def test_axes_are_grouped_by_what_is_proved(before, after, groups):
    assert respell_views._groups(extents(*before), extents(*after)) == groups
