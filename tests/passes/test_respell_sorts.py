"""Sorts and top-k are those of eager PyTorch, NaN and equal elements included, several in one program."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

import lowering

NAN, INF = float("nan"), float("inf")
FLOATS = torch.tensor(
    [
        [1.0, NAN, -0.0, 0.0, INF, -INF, NAN, 1.0, -NAN, 3e-39, -3e-39, 3.0],
        [0.0, -0.0, 0.0, NAN, NAN, 5.0, 5.0, 5.0, -1.0, INF, -INF, 2.0],
    ]
)
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


class EveryDtype(torch.nn.Module):
    """Indices in both directions: with a stable sort they say everything about the order."""

    def forward(self, *tensors):
        down = [torch.sort(x, dim=0, stable=True, descending=True)[1] for x in tensors]
        return tuple([torch.argsort(x, dim=-1, stable=True) for x in tensors] + down)


def test_every_dtype_in_both_directions():
    integers = torch.randint(-5, 5, (3, 9))
    args = tuple(FLOATS.to(t) if t.is_floating_point else integers.to(t) for t in DTYPES)
    program = lowering.load(lowering.compile(EveryDtype(), args).vmfb)
    for number, (ours, eager) in enumerate(zip(program(*args), EveryDtype()(*args), strict=True)):
        assert torch.equal(ours, eager), DTYPES[number % len(DTYPES)]


class Selections(torch.nn.Module):
    """Several of one shape, which may not share what they are sorted in; x and y have no equal elements."""

    def forward(self, x, y):
        return (
            *torch.topk(x, 2),
            *torch.topk(y, 2),
            *torch.topk(y, 3, dim=1, largest=False),
            *torch.sort(x, dim=0, descending=True),
            *torch.kthvalue(x, 2, dim=1),
            *torch.kthvalue(y, 3, dim=1, keepdim=True),
            torch.argsort(x.flatten()),
            torch.msort(y),
        )


@pytest.fixture(scope="module")
def selections():
    n, k = Dim("n"), Dim("k", min=3)
    args = (torch.randn(5, 4), torch.randn(5, 4))
    return lowering.load(
        lowering.compile(Selections(), args, dynamic_shapes=({0: n, 1: k}, {0: n, 1: k})).vmfb
    )


@pytest.mark.parametrize("n, k", [(5, 4), (1, 3), (3, 33), (17, 5)])
def test_several_selections_of_one_shape(selections, n, k):
    args = (torch.randn(n, k), torch.randn(n, k))
    kept = [x.clone() for x in args]
    for ours, eager in zip(selections(*args), Selections()(*args), strict=True):
        assert torch.equal(ours, eager)
    assert all(map(torch.equal, args, kept))


def test_a_sort_of_one_number():
    class Sort(torch.nn.Module):
        def forward(self, x):
            return torch.sort(x + 1)

    x = torch.tensor(2.0)
    program = lowering.load(lowering.compile(Sort(), (x,)).vmfb)
    assert [part.item() for part in program(x)] == [3.0, 0]


@pytest.mark.parametrize("target", ["h200", "gfx950"])
def test_what_is_widened_just_before_a_top_k_compiles_for_gpus(target, monkeypatch):
    """With a size unknown, IREE's code generation for NVIDIA GPUs did not come to an end of it."""

    class Widened(torch.nn.Module):
        def forward(self, x):
            return torch.topk(x.float(), 4)

    monkeypatch.setenv("VMFUSE_COMPILE_TIMEOUT", "60")
    x = torch.randn(6, 3, 64).bfloat16()
    lowering.compile(Widened(), (x,), dynamic_shapes=({0: Dim("n", min=6)},), target=target)
